"""A stage's TensorBoard event file: the rows of ``metrics.jsonl``, under the same keys and steps.

Written record by record, at once: TensorBoard's own threaded writer, and torch's on top of it, show
a stack trace when the disk is full.
"""

import os
import time
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"  # in the run directory; a folder in it for each stage
_FILES = "events.out.tfevents."  # how TensorBoard knows an event file by its name


class EventFile:
    """The event file of one stage; TensorBoard shows ``folder``, its name is the run's there."""

    id = None  # a resumed stage needs none
    behind = True  # the file is new

    def __init__(self, folder: Path) -> None:
        """Begin a file that stands for all before it.

        Earlier files stay, since a TensorBoard that reads one of them would wait for it for ever.

        Raises:
            ImportError: TensorBoard is not installed.
            OSError: the folder cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads them in the order of these times, and the clock may have gone back.
        earlier = [int(path.name.split(".")[3]) for path in folder.glob(f"{_FILES}*")]
        began = max([int(time.time()), *(second + 1 for second in earlier)])
        name = f"{_FILES}{began:010d}.{os.uname().nodename}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")
        # By this TensorBoard forgets all steps from 0 on that it has read before.
        self._write(step=0, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the values of one step; TensorBoard keeps them in float32.

        Raises:
            OSError: the disk is full.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))

    def record(self, manifest: dict[str, Any], folder: Path) -> None:
        """Leave the manifest and the samples where they are: beside the rows."""

    def finish(self, exit_code: int) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()
