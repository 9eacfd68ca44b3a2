"""Start a process, wait for it, and let a signal that reaches us reach it too."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TextIO

from launch.command import Command

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked us to end; ``announced`` says whether the user has been told so."""

    def __init__(self, signum: int) -> None:
        """Keep the signal's number."""
        super().__init__(signum)
        self.signum = signum
        self.announced = False


def catch_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into ``Stopped``, unless they are ignored, as by nohup."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(signum)

    _handle(stop)


def run(command: Command, stdout: int | TextIO | None = None) -> int:
    """Run to the end and return the exit code; 1 if a signal killed the process.

    Args:
        stdout: where its standard output goes; None: where ours goes.

    Raises:
        Stopped: we were asked to end; the process has ended by then.
    """
    # Until the process can end cleanly, which it says by unblocking SIGINT, one has to wait. It
    # inherits the lock of the run directory; nothing else of ours is open to it.
    with subprocess.Popen(
        command.argv,
        env=os.environ | command.env,
        stdout=stdout,
        preexec_fn=_block_interrupts,
        close_fds=False,
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


def _block_interrupts() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def _end(process: subprocess.Popen[bytes], signum: int) -> None:
    """Send the signal on, and those that come later, and wait until the process has ended.

    A stage ends after its training step, however long that takes; a second signal ends it at once.
    A terminal's Ctrl-C has reached it without us; it takes two that come together for one.
    """
    _handle(lambda number, frame: process.send_signal(number))
    process.send_signal(signum)
    process.wait()


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
