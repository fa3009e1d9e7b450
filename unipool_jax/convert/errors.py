"""The error of this package."""


class ConversionError(RuntimeError):
    """The requested conversion is impossible; the message names the tensors and what to do."""
