"""Start the processes of a stage that trains in several, and end all when one of them fails.

    python -m pipelines.several PROCESSES STAGE RECIPE [key=value ...] [--force] [--debug]

Each is a ``python -m pipelines.stage`` of torchrun's (``torch.distributed.launcher``). When one has
ended in failure, the others are asked to end, and after some seconds made to. Signals are passed on
to all: they end after their step, with a checkpoint.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from types import FrameType
from uuid import uuid4

import psutil

_SECONDS_TO_END = 15  # that the others have when one has failed


def main(arguments: list[str]) -> int:
    """Run the processes; return 0, or the exit code of the first that failed, as a stage's own."""
    processes, stage = int(arguments[0]), arguments[1]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _pass_on)
    # Blocked by the launcher until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return _run(processes, stage, arguments[1:])


def _pass_on(signum: int, frame: FrameType | None) -> None:
    """Send a signal on to the processes; end where there are none yet.

    Torchrun's own way is to kill them some seconds later, and a step may take minutes.
    """
    processes = psutil.Process().children()
    if not processes:
        sys.exit(128 + signum)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def _run(processes: int, stage: str, arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as logs:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            max_restarts=0,
            signals_to_handle="SIGQUIT",  # the others are ours
            shutdown_timeout=_SECONDS_TO_END,
        )
        try:
            elastic_launch(settings, sys.executable)("-m", "pipelines.stage", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _explain(stage, rank, failure.exitcode)
    return 0


def _explain(stage: str, rank: int, code: int) -> int:
    """Say which process has failed and how; return the exit code for all."""
    if code == 2 or code > 128:  # it has said so itself
        return code
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += "; the machine may be out of memory"
    print(f"{stage}: rank {rank} {how}; the others were ended", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
