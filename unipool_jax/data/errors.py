"""The exception for everything a user can correct."""

from unipool_jax.config.errors import UserError


class DataError(UserError, ValueError):
    """Bad input, a damaged or unsuitable store, or an impossible setting.

    The message names the file (and line) or setting, what was found, and what to do.
    """
