"""TensorBoard's files of a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType

from unipool_jax.config.files import writing


class Events:
    """Writes scalars to a TensorBoard event file.

    Not with `tensorboardX.SummaryWriter`, which writes in a thread: on a full disk that thread dies with a traceback,
    its queue fills up, and the run waits for ever.

    Args:
      folder: made if needed.
      first_step: TensorBoard forgets what an earlier file says of this step and later ones.

    Raises:
      FileError: from every method, if the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int):
        self._folder = folder
        writer, self._proto = _import_writer()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = writer.EventsWriter(str(folder / "events"))
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._file.write_event(self._proto.Event(step=first_step, session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write one number."""
        from tensorboardX.summary import scalar

        event = self._proto.Event(step=step, wall_time=time.time(), summary=scalar(name, value))
        with writing(self._folder):
            self._file.write_event(event)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        with writing(self._folder):
            self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        with writing(self._folder):
            self._file.close()


def _import_writer() -> tuple[ModuleType, ModuleType]:
    """`tensorboardX.event_file_writer` and its protocol buffers, imported without PyTorch.

    Where that is installed, tensorboardX imports it only to recognize its tensors, and that takes longer than all else
    that training imports. None in `sys.modules` is how an import is told that there is no such module.
    """
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2
    finally:
        if absent:
            del sys.modules["torch"]
    return event_file_writer, event_pb2
