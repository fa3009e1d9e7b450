"""The error of this package."""

from unipool_jax.config.errors import UserError


class ConversionError(UserError, RuntimeError):
    """The requested conversion is impossible; the message names the tensors and what to do."""
