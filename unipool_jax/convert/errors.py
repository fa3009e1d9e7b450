"""The error of this package."""


class ConversionError(RuntimeError):
    """Weights that cannot be converted as asked; the message names the tensors and what to do."""
