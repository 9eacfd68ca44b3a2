"""Reward models of other runs: they count as inputs, and what is none is refused by name."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from align import places, stages
from align.errors import ParentError
from align.recipe import Recipe, StageName
from pipelines.record import _parent_facts
from pipelines.stage import StageJob
from tests.finished import edit_manifest, finish, placeholder, unfinish

ROOT = Path(__file__).resolve().parents[2]
STAGES: tuple[StageName, ...] = ("sft", "reward", "ppo", "evaluate")
BOTH = [{"model": "reward"}, {"model": "other/reward", "weight": 0.5}]


def recipe(reward: object, **ppo: object) -> Recipe:
    world = {"train": [{"world": "prompts"}]}
    return Recipe.model_validate(
        {
            "name": "x",
            "base": {"id": "b"},
            "data": {"sft": {"train": [{"world": "demonstrations"}]}, "prompts": world}
            | {"reward": {"train": [{"world": "pairs"}]}},
            "sft": {"lr": 0.1, "batch_size": 2},
            "reward": {"lr": 0.1, "batch_size": 2},
            "ppo": {"lr": 0.1, "batch_size": 2, "minibatch_size": 2, "steps": 1}
            | {"max_new_tokens": 2, "reward": reward}
            | ppo,
            "evaluate": {},
        }
    )


def finish_all(whole: Recipe) -> None:
    for stage in STAGES:
        directory = placeholder(places.stage_directory(whole, stage), stage)
        parents = stages.read_parents(whole, stage)
        others = stages.read_reward_models(whole, stage)
        made_from = [(name, f"../{name}", made, True) for name, made in parents.items()]
        made_from += [("reward", f"../../../{n}", made, False) for n, made in others.items()]
        finish(
            directory,
            stage,
            recipe_sha256=stages.recipe_sha256(whole, stage),
            inputs_sha256=stages.inputs_sha256(whole, stage, parents),
            parents=tuple(
                {"stage": name, "path": path, "sha256": made.outputs_sha256(), "in_chain": chain}
                for name, path, made, chain in made_from
            ),
        )


def stale(whole: Recipe) -> list[str]:
    return [stage for stage in STAGES if stages.why_not_done(whole, stage) is not None]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a finished reward stage of another run."""
    monkeypatch.chdir(tmp_path)
    placeholder(Path("other/reward"), "reward")
    placeholder(Path("other/sft"), "sft")
    return tmp_path


@pytest.mark.parametrize(
    "reward",
    [BOTH, [{"ensemble": ["reward", "other/reward"]}], [{"model": "other/reward"}]],
    ids=["sum", "ensemble", "alone"],
)
def test_another_runs_reward_model_is_an_input_of_ppo_and_evaluation(
    home: Path, reward: object
) -> None:
    whole = recipe(reward)
    finish_all(whole)
    assert stale(whole) == []
    placeholder(Path("other/reward"), "reward", "trained again")
    assert stale(whole) == ["ppo", "evaluate"]
    assert stages.why_not_done(whole, "ppo") == "its parent reward has changed"
    placeholder(Path("other/reward"), "reward")
    assert stale(whole) == []
    unfinish(Path("other/reward"))
    assert stale(whole) == ["ppo", "evaluate"]
    assert "other/reward: no finished reward stage here" in str(stages.why_not_done(whole, "ppo"))


def test_a_held_out_reward_is_an_input_of_ppo_alone(home: Path) -> None:
    whole = recipe("model", heldout_reward="other/reward")
    finish_all(whole)
    placeholder(Path("other/reward"), "reward", "trained again")
    assert stale(whole) == ["ppo"]


def test_a_held_out_function_is_an_input_of_ppo(home: Path) -> None:
    Path("judge.py").write_text("def f(prompts, responses): ...")
    whole = recipe("model", heldout_reward="judge.py:f")
    finish_all(whole)
    assert stale(whole) == []
    Path("judge.py").write_text("def f(prompts, responses): return []")
    assert stale(whole) == ["ppo"]


def test_parents_follow_from_what_is_named(home: Path) -> None:
    for reward, heldout, expected in (
        ("model", None, ("sft", "reward")),
        ("a:f", None, ("sft",)),
        ("a:f", "reward", ("sft", "reward")),
        ([{"model": "other/reward"}], None, ("sft",)),
        ([{"function": "a:f"}, {"ensemble": ["reward", "other/reward"]}], None, ("sft", "reward")),
    ):
        whole = recipe(reward, heldout_reward=heldout)
        assert stages.parent_stages(whole, "ppo") == expected
        assert stages.parent_stages(whole, "sft") == ()


def test_where_the_models_lie_does_not_decide_what_evaluation_found(home: Path) -> None:
    finish_all(recipe(BOTH))
    before = json.loads(Path("runs/x/evaluate/stage.json").read_text())["inputs_sha256"]
    Path("other").rename("elsewhere")
    moved = recipe([{"model": "reward"}, {"model": "elsewhere/reward", "weight": 0.5}])
    parents = stages.read_parents(moved, "evaluate")
    assert stages.inputs_sha256(moved, "evaluate", parents) == before
    heavier = recipe([{"model": "reward"}, {"model": "elsewhere/reward", "weight": 0.6}])
    assert stages.inputs_sha256(heavier, "evaluate", parents) != before


def test_what_was_read_in_the_beginning_holds(home: Path) -> None:
    """A reward model that is redone or removed during a training does not change its record."""
    whole = recipe(BOTH)
    finish_all(whole)
    before = json.loads(Path("runs/x/ppo/stage.json").read_text())["inputs_sha256"]
    parents, models = stages.read_parents(whole, "ppo"), stages.read_reward_models(whole, "ppo")
    job = StageJob(whole, "ppo", Path("runs/x/ppo"), parents, {}, Console(), models)
    made_from = models["other/reward"].outputs_sha256()
    shutil.rmtree("other")
    assert stages.inputs_sha256(whole, "ppo", parents, job.reward_models) == before
    *chain, other = _parent_facts(job)
    assert [(fact.stage, fact.in_chain) for fact in chain] == [("sft", True), ("reward", True)]
    assert (other.stage, other.in_chain, other.sha256) == ("reward", False, made_from)
    assert other.path == "../../../other/reward"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", r"nowhere: no finished reward stage here .*; allowed: `reward`, this recipe's"),
        (
            "other/sft",
            "other/sft: holds stage sft; stage reward is needed; did you mean other/",
        ),
        ("other", "other: no finished reward stage here .*; did you mean other/reward"),
        ("other/reward/model", "other/reward/model: no finished .*; did you mean other/reward"),
    ],
)
def test_what_is_no_reward_stage_is_refused(home: Path, folder: str, message: str) -> None:
    for reward, heldout, key in (
        ([{"model": "reward"}, {"model": folder}], None, "ppo.reward.1"),
        ([{"ensemble": ["reward", folder]}], None, "ppo.reward.0"),
        ("model", folder, "ppo.heldout_reward"),
    ):
        whole = recipe(reward, heldout_reward=heldout)
        with pytest.raises(ParentError, match=f"^{key}: {message}"):
            stages.read_reward_models(whole, "ppo")


def test_a_damaged_reward_stage_is_refused(home: Path) -> None:
    whole = recipe([{"model": "other/reward"}])
    Path("other/reward/model/w").unlink()
    with pytest.raises(ParentError, match=r"its output model/w is missing"):
        stages.read_reward_models(whole, "ppo")
    edit_manifest(Path("other/reward"), seed="many")
    with pytest.raises(ParentError, match=r"stage\.json: not a manifest: seed"):
        stages.read_reward_models(whole, "ppo")


def test_stages_that_do_not_score_do_not_look(home: Path) -> None:
    whole = recipe([{"model": "nowhere"}])
    for stage in ("pretrain", "sft", "reward"):
        assert stages.read_reward_models(whole, stage) == {}  # type: ignore[arg-type]


def test_the_command_refuses_at_once_and_writes_nothing(home: Path) -> None:
    finish_all(recipe("model"))
    text = recipe([{"model": "reward"}, {"model": "other/sft"}]).model_dump_json()
    Path("r.yaml").write_text(text)
    with pytest.raises(ParentError, match="other/sft"):
        stages.read_parents(recipe([{"model": "other/sft"}]), "ppo")
    before = sorted(home.rglob("*"))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "launch", "ppo", "r.yaml"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert time.monotonic() - started < 5  # alone, half a second
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ppo.reward.1: other/sft: holds stage sft; stage reward is needed" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""  # no process was started
    assert sorted(home.rglob("*")) == before
