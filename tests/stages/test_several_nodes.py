"""A stage that several machines make together: here they are processes, or network namespaces."""

import os
import subprocess
from collections.abc import Sequence
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
