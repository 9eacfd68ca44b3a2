"""The process that a stage runs in: quiet libraries, seeded generators, a clean end on signals."""

import contextlib
import io
import logging
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType

from align import group
from align.errors import AlignError, printable_lines, stopped_by
from align.recipe import Recipe

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONE_SIGNAL_SECONDS = 1.0  # signals that come within this time count as one


class Stopped(BaseException):
    """A signal asked the process to end; ``signum`` says which."""

    def __init__(self, signum: int) -> None:
        """Keep the signal's number."""
        self.signum = signum


class Signals:
    """Which signal has asked the process to end, and whether it has to wait with that."""

    def __init__(self) -> None:
        self.asked = 0  # the number of the signal that has come and waits; 0: none
        self._held = False

    def come(self, signum: int) -> None:
        """Raise ``Stopped``; in ``held``, keep the signal until ``end_if_asked``."""
        if not self._held:
            raise Stopped(signum)
        self.asked = signum
        name = signal.Signals(signum).name
        if group.is_first():
            print(f"{name}: stopping after this step; the next one stops at once", file=sys.stderr)

    def end_if_asked(self) -> None:
        """Raise ``Stopped`` if a signal waits: now is a good moment."""
        if self.asked:
            raise Stopped(self.asked)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait: for training, which ends well at the boundaries of its steps only."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.end_if_asked()


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[Signals]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into ``Stopped``; a later one ends the process.

    What is ignored stays so: ``nohup`` and a shell's background jobs count on it. The launcher
    starts us with SIGINT blocked; one that came since ends the process here, nothing having begun.
    """
    first: float | None = None
    signals = Signals()

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            signals.come(signum)
            return
        # The launcher sends on what a terminal has sent to both of us.
        if time.monotonic() - first > _ONE_SIGNAL_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    heard = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, stop) for n in heard}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    except Stopped as stopped:
        print(stopped_by(stopped.signum), file=sys.stderr)
        sys.exit(128 + stopped.signum)
    try:
        yield signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(name: str, work: Callable[[], None], *, debug: bool) -> int:
    """Do the work and return the exit code: 0 done, 1 failed, 2 bad input, 128 + n signal n.

    What ended it is told in one line that begins with the name; debug adds the stack trace.
    """
    with signals_as_exceptions():
        try:
            work()
        except Stopped as stopped:
            print(f"{name}: {stopped_by(stopped.signum)}", file=sys.stderr)
            return 128 + stopped.signum
        except (AlignError, OSError) as error:
            if debug:
                traceback.print_exc()
            print(printable_lines(f"{name}: {error}"), file=sys.stderr)
            return error.exit_code if isinstance(error, AlignError) else 1
    return 0


def share_processors() -> None:
    """Let threads that wait for work give their core away.

    Spinning gains a little on an idle machine and halves the speed on a shared one. To be called
    before torch is imported, and without effect where the user has chosen.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars, advice and telemetry; their errors still show.

    To be called before any of them is imported: they read the environment then.
    """
    for name, value in (
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("DATASETS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed warns when it finds out itself
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    # transformers prints a remark about WANDB_MODE on import.
    with contextlib.redirect_stdout(io.StringIO()):
        import transformers.integrations.integration_utils
    transformers.utils.logging.disable_progress_bar()


def seed_generators(recipe: Recipe) -> None:
    """Fix the thread count and every global generator; before any parameter exists."""
    import numpy
    import torch

    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    random.seed(recipe.seed)
    numpy.random.seed(recipe.seed % 2**32)
    torch.manual_seed(recipe.seed)
