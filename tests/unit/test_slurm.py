"""The sbatch script, run by bash with a ``srun`` and a ``scontrol`` of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stand_ins import ROOT

SCONTROL = '#!/bin/bash\n[[ "$*" == "show hostnames a[1-2]" ]] && printf "a1\\na2\\n"\n'
SAY = '#!/bin/bash\necho "srun $*"\n'
# A process for each node, as srun starts them; --kill-on-bad-exit is its own.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@" || exit $?
wait $other
"""


def script(place: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "launch", "slurm", *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout or done.stderr


def run(place: Path, text: str, srun: str, port: int = 10_007) -> str:
    """Run a script as Slurm does, on "nodes" of this machine; return what it printed."""
    for name, content in (("srun", srun), ("scontrol", SCONTROL)):
        (place / name).write_text(content)
        (place / name).chmod(0o755)
    (place / "job.sh").write_text(text)
    subprocess.run(["bash", "-n", "job.sh"], cwd=place, check=True)
    slurm = {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": str(port - 10_000)}
    done = subprocess.run(
        ["bash", "job.sh"],
        cwd=place,
        env=os.environ | slurm | {"PATH": f"{place}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_stage_is_made_on_all_nodes_and_the_rest_on_one(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "here $*"\n')
    python.chmod(0o755)
    text = script(tmp_path, "miniature/smoke", "name=a b", code=2)
    assert "name=a b" in text
    words = ("miniature/smoke", "seed=7", "data.root=a b", "--nodes", "2", "--nproc", "2")
    assert script(tmp_path, *words, "--output", "job") == "job\n"
    assert "job: exists already" in script(tmp_path, *words, "--output", "job", code=2)
    text = (tmp_path / "job").read_text()
    places = ("nodes=2", "ntasks-per-node=1", "gpus-per-node=2")
    for line in ("job-name=miniature-smoke", *places, "signal=TERM@300"):
        assert f"#SBATCH --{line}\n" in text
    said = run(tmp_path, text.replace(sys.executable, str(python)), SAY).splitlines()
    recipe = f"{ROOT}/pipelines/recipes/miniature/smoke.yaml seed=7 data.root=a b"
    srun = f"srun --kill-on-bad-exit=1 --cpu-bind=none {python} -m launch"
    together = "--nodes 2 --nproc 2 --rendezvous a1:10007"
    assert said == [
        *(f"{srun} {stage} {recipe} {together}" for stage in ("pretrain", "sft", "reward", "ppo")),
        f"here -m launch run {recipe} distributed.processes=4",
    ]


def test_processes_that_nodes_cannot_share(tmp_path: Path) -> None:
    said = script(tmp_path, "llama2-7b/lora-zero2", "--nodes", "3", code=2)
    assert "distributed.processes=4: --nodes=3 cannot share them equally" in said


@pytest.mark.slow
def test_the_script_makes_a_run(tmp_path: Path) -> None:
    from tests.unit.test_nodes import free_port

    settings = ["reward=null", "ppo=null", "tracking.mode=disabled", "run.threads=1"]
    words = ["miniature/smoke", *settings, "evaluate.prompts=2", "--nodes", "2", "--nproc", "1"]
    text = script(tmp_path, *words).replace("${hosts[0]}", "localhost")
    said = run(tmp_path, text, SRUN, free_port())
    for line in ("pretrain: done in", "sft: running as node 1", "sft: up to date", "report: "):
        assert line in said
    assert (tmp_path / "runs" / "miniature-smoke" / "report.html").is_file()
