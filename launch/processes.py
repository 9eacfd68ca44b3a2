"""Start a process, wait for it, and let a signal that reaches us reach it too."""

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn, TextIO

from launch.command import Command

# A Ctrl-C in a terminal reaches the process without us. It gets this long to react before the
# signal is sent on, since a second one makes it drop what it was still writing.
_GRACE_SECONDS = 5.0
_LAST_SECONDS = 30.0


class Stopped(BaseException):
    """A signal asked us to end; ``announced`` says whether the user has been told so."""

    def __init__(self, signum: int) -> None:
        """Keep the signal's number."""
        super().__init__(signum)
        self.signum = signum
        self.announced = False


def catch_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into ``Stopped``."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(signum)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def run(command: Command, stdout: int | TextIO | None = None) -> int:
    """Run to the end and return the exit code; 1 if a signal killed the process.

    Args:
        stdout: where its standard output goes; None: where ours goes.

    Raises:
        Stopped: we were asked to end; the process has ended by then.
    """
    # Until the process can end cleanly, which it says by catching SIGINT, it does not hear one.
    with subprocess.Popen(
        command.argv, env=os.environ | command.env, stdout=stdout, preexec_fn=_ignore_interrupts
    ) as process:
        try:
            code = process.wait()
        except Stopped as stopped:
            _end(process, stopped.signum)
            stopped.announced = process.returncode == 128 + stopped.signum
            raise
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
        print(f"error: the process was killed by {name}{hint}", file=sys.stderr)
        return 1
    return code


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(process: subprocess.Popen[bytes], signum: int) -> None:
    """Wait until the process has ended, sending the signal on if it did not get it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signum)
        try:
            process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
