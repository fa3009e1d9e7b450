"""Errors that nobody waits for any more.

Orbax ends a read or a save at its first error and closes its event loop. TensorStore's other operations then report to
a loop that is gone, or to a future that nobody asks, and Python prints a traceback for each, before or after the one
message that says what is wrong.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any


@functools.cache
def hush_late_errors() -> None:
    """Print no such tracebacks from now on; every other one as before."""
    before = sys.unraisablehook

    def show(unraisable: Any) -> None:
        if not _late(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = show
    logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and _late(record.exc_info[1])))


def _late(error: BaseException | None) -> bool:
    text = str(error)
    return text == "Event loop is closed" or "OCDBT" in text or "TensorStore" in text
