"""Several machines: what the options mean, and how the machines meet and lose each other."""

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from align.errors import InputError
from launch.nodes import Host, Nodes, find_nodes, processes_on_each, read_hostfile
from tests.stand_ins import ROOT, align, build

HOSTS = "# all of them\nfirst slots=4\n\nsecond.domain slots=4  # slower\n"


def free_port() -> int:
    """Return a port that nobody listens at, below those that the system gives away by itself."""
    while True:
        port = random.randrange(10_000, 16_000)
        with socket.socket() as trial:
            try:
                trial.bind(("localhost", port))
            except OSError:
                continue
            return port


def nodes(
    count: int | None = None,
    rank: int | None = None,
    rendezvous: str | None = None,
    hostfile: Path | None = None,
    wait: float | None = None,
    **more: Any,
) -> tuple[Nodes | None, int | None]:
    return find_nodes(count, rank, rendezvous, hostfile, wait, **{"environ": {}} | more)


def test_no_option_is_one_machine() -> None:
    assert nodes() == (None, None)
    assert nodes(1, 0, "h:1") == (None, None)


def test_every_machine_has_a_number() -> None:
    assert nodes(2, 1, "h:29500") == (Nodes(2, 1, "h:29500", 600.0), None)
    assert nodes(4, None, "h:1", wait=9.0, environ={"SLURM_NODEID": "3"})[0] == Nodes(
        4, 3, "h:1", 9.0
    )
    assert nodes(2, None, "h:1", all_of_them=True)[0] == Nodes(2, None, "h:1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 1}, "--node-rank: needs --nodes or --hostfile"),
        ({"rendezvous": "h:1"}, "--rendezvous: needs --nodes or --hostfile"),
        ({"count": 2, "rendezvous": "h:1"}, "--nodes: needs --node-rank"),
        ({"count": 2, "rank": 2, "rendezvous": "h:1"}, "--node-rank=2: allowed .*: 0 to 1"),
        ({"count": 2, "rank": 0}, "--nodes: needs --rendezvous HOST:PORT"),
        ({"count": 2, "rank": 0, "rendezvous": "h"}, "--rendezvous=h: allowed: HOST:PORT"),
        ({"count": 2, "rank": 0, "rendezvous": "h:70000"}, "a port from 1 to 65535"),
        ({"count": 2, "rank": 0, "rendezvous": "h:0"}, "a port from 1 to 65535"),
    ],
)
def test_what_is_missing_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nodes(**given)


def test_a_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hosts"
    file.write_text(HOSTS)
    assert read_hostfile(file) == [Host("first", 4), Host("second.domain", 4)]
    for name, rank in (("first", 0), ("first.domain", 0), ("second.domain", 1), ("second", 1)):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert nodes(hostfile=file) == (Nodes(2, rank, "first:29500"), 4)
    monkeypatch.setattr(socket, "gethostname", lambda: "third")
    with pytest.raises(InputError, match=r"this machine, third, is none of first, second\.domain"):
        nodes(hostfile=file)
    assert nodes(rank=1, hostfile=file, rendezvous="h:5")[0] == Nodes(2, 1, "h:5")
    with pytest.raises(InputError, match="leave --nodes out"):
        nodes(2, hostfile=file)


def test_two_machines_of_one_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hosts"
    file.write_text("node.east slots=1\nnode.west slots=1\n")
    monkeypatch.setattr(socket, "gethostname", lambda: "node.west")
    assert nodes(hostfile=file)[0].rank == 1
    monkeypatch.setattr(socket, "gethostname", lambda: "node")  # either of them
    with pytest.raises(InputError, match="say which it is by --node-rank"):
        nodes(hostfile=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb slots=3\n", ":2: b has slots=3, a slots=2; allowed: as many on each"),
        ("a slots=2\na slots=2\n", ":2: a stands there twice"),
        ("a\n", ":1: found `a`; allowed: a line `name slots=N`"),
        ("# none\n", "names no host"),
    ],
)
def test_a_hostfile_that_means_nothing(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(InputError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_machines_share_processes_equally() -> None:
    assert processes_on_each(8, 2) == 4
    with pytest.raises(InputError, match=r"distributed\.processes=3: --nodes=2 .* multiples of 2"):
        processes_on_each(3, 2)


def test_a_dry_run_prints_the_command_of_every_machine(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    output, _ = align(tmp_path, "sft", "r.yaml", "--hostfile", "hosts", "--dry-run")
    lines = output.splitlines()
    assert lines[0] == "sft: would run (no finished result yet)"
    for rank in (0, 1):
        words = ["-m", "pipelines.several", "--nodes", "2", "--node-rank", str(rank)]
        words += ["--rendezvous", "a:29500", "--wait", "600", "1", "sft", "r.yaml"]
        words += ["distributed.processes=2"]
        assert lines[1 + rank].startswith(f"  node {rank}: PYTHONSAFEPATH=1 ")
        assert lines[1 + rank].split()[-len(words) :] == words
    assert not (tmp_path / "runs").exists()
    patient = ("--hostfile", "hosts", "--rendezvous-timeout", "90", "--dry-run")
    assert align(tmp_path, "sft", "r.yaml", *patient)[0].count(" --wait 90 ") == 2
    _, errors = align(
        tmp_path, "sft", "r.yaml", "--nodes", "3", "--rendezvous", "a:1", "--dry-run", code=2
    )
    assert "distributed.processes=1: --nodes=3 cannot share them equally" in errors


MEETING = """
import os, sys
from pipelines.meeting import Place, meet
from align.errors import AlignError
rank, nodes, port, seconds, work = int(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
try:
    meeting = meet(Place(nodes, rank, "localhost", port, seconds), work.split())
except AlignError as error:
    sys.exit(f"{error.exit_code} {error}")
meeting.watch()
print(os.environ["GLOO_SOCKET_IFNAME"], flush=True)
if sys.stdin.readline() == "fail\\n":
    meeting.fail("broken")
print(meeting.find_failure())
meeting.leave()
"""


def node(rank: int, count: int, port: int, seconds: int, work: str) -> subprocess.Popen[str]:
    words = [str(word) for word in (rank, count, port, seconds, work)]
    return subprocess.Popen(
        [sys.executable, "-c", MEETING, *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_machines_that_do_not_come_are_named() -> None:
    port = free_port()
    found = [node(0, 3, port, 2, "sft"), node(1, 3, free_port(), 2, "sft")]
    first, second = (one.communicate(timeout=60)[1] for one in found)
    assert all(one.returncode == 1 for one in found)
    assert (
        f"1 rendezvous at localhost:{port}: of 3 nodes these have not come within 2 s: 1, 2"
        in first
    )
    assert "node 0 does not answer within 2 s" in second


def test_machines_that_were_started_for_other_work_part() -> None:
    port = free_port()
    found = [node(rank, 2, port, 40, work) for rank, work in enumerate(("sft seed=1", "sft"))]
    errors = found[1].communicate(timeout=60)[1]
    assert "2 node 0 was started for `sft seed=1`, this one for `sft`" in errors
    found[0].communicate(timeout=60)


@pytest.mark.slow
def test_the_failure_and_the_death_of_a_machine_are_noticed() -> None:
    port = free_port()
    found = [node(rank, 3, port, 60, "sft") for rank in range(3)]
    pipes = [(one.stdin, one.stdout) for one in found]
    for _, said in pipes:
        assert said is not None
        assert said.readline() == "lo\n"
    said_by_two = found[2].communicate("fail\n", timeout=60)[0]
    said_by_zero = found[0].communicate("\n", timeout=60)[0]
    assert said_by_zero == f"node 2 ({socket.gethostname()}): broken\n"
    found[1].kill()
    assert said_by_two == "\n"

    port = free_port()
    found = [node(rank, 2, port, 60, "sft") for rank in range(2)]
    for one in found:
        assert one.stdout is not None
        one.stdout.readline()
    found[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    said = found[0].communicate("\n", timeout=60)[0]
    assert said == "node 1 is gone: it has said nothing for 10 s\n"
    assert time.monotonic() - stopped < 20
    found[1].kill()
