"""Start the processes of a stage that trains in several, and end all when one of them fails.

    python -m pipelines.several [--nodes N --node-rank R --rendezvous HOST:PORT --wait SECONDS]
        PROCESSES STAGE RECIPE [key=value ...] [--force] [--debug]

Each is a ``python -m pipelines.stage`` of torchrun's (``torch.distributed.launcher``). When one has
ended in failure, the others are asked to end, and after some seconds made to. Signals are passed on
to all: they end after their step, with a checkpoint. Of several machines each runs this, with as
many processes (``pipelines.meeting``).
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
from types import FrameType
from typing import Any
from uuid import uuid4

import psutil

from align.errors import AlignError
from pipelines.meeting import Meeting, Place, meet

_SECONDS_TO_END = 10  # that the others have when one has failed


def main(arguments: list[str]) -> int:
    """Run the processes; return 0, or the exit code of the first that failed, as a stage's own."""
    options = _parser().parse_args(arguments)
    stage = options.work[0]
    share = max(1, (os.cpu_count() or 1) // options.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _pass_on)
    # Blocked by the launcher until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if options.nodes == 1:
        return _run(options.processes, options.work)
    host, _, port = options.rendezvous.rpartition(":")
    place = Place(options.nodes, options.node_rank, host.strip("[]"), int(port), options.wait)
    try:
        meeting = meet(place, [str(options.processes), *options.work])
    except AlignError as error:
        print(f"{stage}: {error}", file=sys.stderr)
        return error.exit_code
    meeting.watch()
    try:
        return _run(options.processes, options.work, meeting)
    except BaseException:  # a signal, before there were processes to pass it on to
        meeting.fail("has stopped")
        raise
    finally:
        meeting.leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.several")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--rendezvous", metavar="HOST:PORT")
    parser.add_argument("--wait", type=float, metavar="SECONDS", default=600.0)
    parser.add_argument("processes", type=int, help="on each node")
    parser.add_argument("work", nargs=argparse.REMAINDER, help="what each process is started with")
    return parser


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


def _run(processes: int, work: list[str], meeting: Meeting | None = None) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Where a process has failed, torchrun does not go by its own shutdown_timeout.
    PContext.close.__defaults__ = (None, _SECONDS_TO_END)
    nodes = meeting.place.nodes if meeting is not None else 1
    with tempfile.TemporaryDirectory() as logs:
        settings = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            **_rendezvous(meeting),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            max_restarts=0,
            signals_to_handle="SIGQUIT",  # the others are ours
            shutdown_timeout=_SECONDS_TO_END,
        )
        try:
            elastic_launch(settings, sys.executable)("-m", "pipelines.stage", *work)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _explain(work[0], rank, failure.exitcode, meeting)
        except RuntimeError as error:  # of the store of another machine
            if meeting is None:
                raise
            print(f"{work[0]}: {meeting.find_failure() or error}", file=sys.stderr)
            return 1
    return 0


def _rendezvous(meeting: Meeting | None) -> dict[str, Any]:
    """Return where torchrun's own agents meet."""
    if meeting is None:
        own = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
        return {"run_id": uuid4().hex, **own}
    # Who is who has been said: c10d's own choice of the machine that keeps its store fails where
    # host names mislead.
    return {
        "run_id": "align",
        "rdzv_backend": "static",
        "rdzv_endpoint": str(meeting.place),
        "rdzv_configs": {"rank": meeting.place.rank, "timeout": 60},
    }


def _explain(stage: str, rank: int, code: int, meeting: Meeting | None) -> int:
    """Say which process has failed and how; return the exit code for all."""
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += "; the machine may be out of memory"
        if -code == signal.SIGABRT:  # as NCCL's watchdog does
            how += "; it may have waited for one that hangs (distributed.timeout_minutes)"
    reason = f"rank {rank} {how}"
    if meeting is not None:
        meeting.fail(reason)
    if code == 2 or code > 128:  # it has said so itself
        return code
    elsewhere = meeting.find_failure() if meeting is not None else ""
    print(f"{stage}: {elsewhere or reason}; the others were ended", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
