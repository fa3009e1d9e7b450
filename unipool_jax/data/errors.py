"""The one exception that this package raises for anything a user can put right."""


class DataError(ValueError):
    """Bad input, a damaged or unsuitable store, or a setting that cannot be honoured.

    The message names the file (and line) or setting, what was found, and what to do.
    """
