"""From an error to a message and an exit code."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable

from unipool_jax.config.errors import UserError
from unipool_jax.config.files import remedy

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNREAD = 1, 130, 141


def guarded(main: Callable[[], int], failure: int | None = None) -> int:
    """Run `main`; what a user can put right becomes a message on stderr and an exit code, not a traceback.

    Args:
      main: returns an exit code.
      failure: the exit code of an error, where it is not the error's own.

    Returns:
      What `main` returned; 2 for settings that cannot be used; 1 for other errors, about data, checkpoints, run folders
      and locks; 130 after Ctrl-C; 141 where nobody reads what is printed.
    """
    # Orbax and Abseil log every failure with its traceback before raising it; the exception says the same once.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name or a letter that the terminal cannot show must not end a command.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return _leave(failure or error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: give the same command again", file=sys.stderr)
        return _leave(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # A reader such as `head` has seen enough; nothing may be written when Python ends either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(EXIT_UNREAD)
    except BaseException as error:
        if isinstance(error, OSError) and (advice := remedy(error)):
            print(f"{error.filename or 'writing'}: {error.strerror}; {advice}", file=sys.stderr)
            return _leave(failure or EXIT_FAILED)
        if not _distributed():
            raise
        traceback.print_exc()
        return _leave(EXIT_FAILED)


def _distributed() -> bool:
    """Whether this is one of several processes. A command that has not imported JAX is alone."""
    jax = sys.modules.get("jax")
    return jax is not None and bool(jax.distributed.is_initialized())


def _leave(code: int) -> int:
    """`code`; of several processes this one ends at once, for those that wait for it to notice and stop too."""
    if _distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
