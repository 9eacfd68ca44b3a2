"""A stage that several machines make together: here they are processes, or network namespaces."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.stages.test_llama2_recipes import base
from tests.stages.test_several_processes import (
    LORA,
    LORA_IN_FLOAT32,
    ROOT,
    alone,
    check_same,
    command,
)
from tests.unit.test_nodes import free_port

TWO = ("--nodes", "2", "--nproc", "1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nodes")
    base(root, 4)
    return root


def start(words: Sequence[str], *before: str, **environ: str) -> subprocess.Popen[str]:
    """Start a node's command, perhaps by another that places it somewhere."""
    return subprocess.Popen(
        [*before, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(nodes: Sequence[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """Wait for the nodes; return what each has said."""
    said = ["".join(node.communicate(timeout=240)) for node in nodes]
    assert [node.returncode for node in nodes] == [code] * len(nodes), said
    return said


@pytest.mark.slow
def test_two_nodes_train_what_one_process_does(root: Path) -> None:
    one = alone(root, "one", LORA, ("sft",), *LORA_IN_FLOAT32)
    meet = (*TWO, "--rendezvous", f"localhost:{free_port()}", "--node-rank")
    words = command(root, "sft", LORA, "two", *LORA_IN_FLOAT32, *meet)
    first, second = ended([start([*words, rank]) for rank in ("0", "1")])
    check_same("sft", one, root / "runs" / "two")
    assert "sft: done in" in first
    assert "sft: running as node 1 (no finished result yet)" in second
    assert "rows" not in second  # one process speaks
    assert "up to date" in ended([start([*words, "1"])])[0]


HOSTS = ("align-a", "align-b")
ADDRESS = "10.77.0.1"
PLUMBING = [
    *(f"ip netns add {host}" for host in HOSTS),
    "ip link add al0 netns align-a type veth peer name al1 netns align-b",
    f"ip -n align-a addr add {ADDRESS}/24 dev al0",
    "ip -n align-b addr add 10.77.0.2/24 dev al1",
    *(f"ip -n {host} link set lo up" for host in HOSTS),
    "ip -n align-a link set al0 up",
    "ip -n align-b link set al1 up",
]


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces that see each other by one link, and share the host's name."""
    try:
        for line in PLUMBING:
            done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: `{line}`: {done.stderr.strip()}")
        yield
    except FileNotFoundError:
        pytest.skip("no network namespaces here: there is no `ip`")
    finally:
        for host in HOSTS:
            kill(host)
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def kill(host: str) -> None:
    """End everything that runs there at once, as when the power fails."""
    found = subprocess.run(
        ["ip", "netns", "pids", host], capture_output=True, text=True, check=False
    )
    for number in found.stdout.split():
        os.kill(int(number), signal.SIGKILL)


@pytest.mark.slow
def test_two_hosts_make_all_stages_and_go_on_after_one_has_died(
    tmp_path: Path, hosts: None
) -> None:
    def both(stage: str) -> list[subprocess.Popen[str]]:
        words = [sys.executable, "-m", "launch", stage, "miniature/smoke", *TWO]
        words += ["tracking.mode=disabled", "run.threads=1", f"run.root={tmp_path}", "name=x"]
        words += ["sft.epochs=10.0", "run.checkpoint_steps=1", "distributed.zero=2"]
        words += ["--rendezvous", f"{ADDRESS}:{free_port()}", "--node-rank"]
        return [
            start([*words, str(rank)], "ip", "netns", "exec", host)
            for rank, host in enumerate(HOSTS)
        ]

    run = tmp_path / "x"
    ended(both("pretrain"))

    nodes = both("sft")
    while not list((run / "sft" / "checkpoints").glob("step-*[2-9]")):
        assert nodes[0].poll() is None, nodes[0].communicate()
        time.sleep(0.1)
    kill(HOSTS[1])
    killed = time.monotonic()
    errors = "".join(nodes[0].communicate(timeout=120))
    assert nodes[0].returncode == 1
    assert time.monotonic() - killed < 30
    assert "sft: node 1 is gone: it has said nothing for 10 s; the others were ended" in errors
    assert not (run / "sft" / "stage.json").exists()
    assert "goes on after step" in ended(both("sft"))[0]

    for stage in ("reward", "ppo"):
        said = ended(both(stage))
        assert f"{stage}: done in" in said[0]
        assert f"{stage}: running as node 1" in said[1]
    assert {path.parent.name for path in run.glob("*/stage.json")} == {
        *("pretrain", "sft", "reward", "ppo")
    }
