"""Short PPO runs in this process: what each key of the recipe does to the weights and the log."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.testing import assert_close

from align.adapters import WEIGHTS
from align.errors import TrainingError
from align.recipe import Recipe
from align.roles import Roles
from align.sequences import join
from align.stages import read_parents, read_reward_models
from data.load import LoadedData
from data.records import Message, Prompt
from pipelines import ppo
from pipelines.load_roles import LoadedRoles
from pipelines.rollout import Rollout
from pipelines.stage import StageJob
from pipelines.update import Updater
from tests.finished import plain, rewarded_run

WORDS = ["hello", "What is red?", "Tom", "Say hello to Mira.", "kite", "Paris"]
PROMPTS = tuple(Prompt((Message("user", text),)) for text in WORDS)
SOURCE = {"train": [{"world": "prompts"}]}
PROBED = SOURCE | {"heldout": [{"world": "prompts", "split": "heldout"}]}
PPO = {"lr": 0.02, "steps": 4, "batch_size": 4, "minibatch_size": 4, "epochs": 2}
SHORT = PPO | {"steps": 2, "max_new_tokens": 6, "probe_every": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an SFT stage and two reward stages, one of them another run's; not to be changed."""
    home = tmp_path_factory.mktemp("steps")
    rewarded_run(home)
    return home


# The held-out reward is asked by the probe only: at step 0, at step 1, at step 2.
REWARDS = """
looks = iter([9.0, 1.0, 1.0])

def same(prompts, responses):
    return [1.0 for text in responses]

def falling(prompts, responses):
    look = next(looks)
    return [look for text in responses]
"""


def job_of(home: Path, directory: Path, **section: Any) -> StageJob:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "base": {"id": str(home / "base/model")},
            "adapter": {"r": 4, "alpha": 8.0},
            "data": {"sft": SOURCE, "reward": SOURCE, "prompts": PROBED}
            | {"max_prompt_tokens": 64, "max_response_tokens": 64},
            "sft": {"lr": 0.1, "batch_size": 2},
            "reward": {"lr": 0.1, "batch_size": 2, "center_on": "none"},
            "ppo": section,
            "tracking": {"mode": "disabled"},
            "run": {"root": str(home / "runs")},
        }
    )
    return StageJob(
        recipe,
        "ppo",
        directory / "x/ppo",
        read_parents(recipe, "ppo"),
        {"prompts": LoadedData(PROMPTS, PROMPTS[:2], ())},
        Console(file=io.StringIO()),
        read_reward_models(recipe, "ppo"),
    )


def steps_of(job: StageJob) -> list[dict[str, float]]:
    lines = (job.directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(roles: Roles, role: str) -> dict[str, torch.Tensor]:
    """The role's adapter as it stands, under the names that its file has."""
    return {
        f"base_model.model.{name.replace(f'.{role}', '')}": p.detach().clone()
        for name, p in roles.base.named_parameters()
        if f".{role}." in name
    }


class Watched:
    """A run with a warm-up, an adaptive KL and an average; the weights around each update."""

    def __init__(self, home: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rollouts: list[Rollout] = []
        self.looks: list[dict[str, dict[str, torch.Tensor]]] = []
        update = Updater.update

        def watched(updater: Updater, rollout: Rollout, *rest: Any, **more: Any) -> Any:
            self.rollouts.append(rollout)
            if not self.looks:
                self.look(updater._roles)
            metrics = update(updater, rollout, *rest, **more)
            self.look(updater._roles)
            return metrics

        monkeypatch.setattr(Updater, "update", watched)
        section = PPO | {
            "max_new_tokens": 6,
            "value": {"warmup_steps": 1},
            "kl": {"coef": 0.3, "target": 0.01, "horizon": 20},
            "ema": 0.75,
        }
        self.job = job_of(home, directory, **section)
        assert ppo.run(self.job) is not None
        self.steps = [step for step in steps_of(self.job) if step["step"] > 0]

    def look(self, roles: Roles) -> None:
        self.looks.append({role: weights(roles, role) for role in ("policy", "value")})

    def saved(self, role: str) -> dict[str, torch.Tensor]:
        return load_file(self.job.directory / role / WEIGHTS)


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Watched(home, tmp_path_factory.mktemp("run"), monkeypatch)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# T23: the first rollouts train the critic only.
def test_t23_the_policy_stands_still_while_the_critic_warms_up(run: Watched) -> None:
    assert len(run.looks) == 5
    moved = {
        role: [not equal(a[role], b[role]) for a, b in zip(run.looks, run.looks[1:], strict=False)]
        for role in ("policy", "value")
    }
    assert moved == {"policy": [False, True, True, True], "value": [True] * 4}


def test_the_kl_coefficient_follows_the_kl(run: Watched) -> None:
    kls = [step["kl/mean"] for step in run.steps]
    assert kls[:2] == [0.0, 0.0]
    assert kls[2] > 0.02  # more than a fifth above the target
    # After the warm-up too low, then too high: by a fifth of 4 responses of 20 each time.
    expected = [0.3, 0.3, 0.3 * 0.96, 0.3 * 0.96 * 1.04]
    assert [step["kl/coef"] for step in run.steps] == pytest.approx(expected)


def test_the_saved_policy_is_the_average_and_the_saved_critic_the_last(run: Watched) -> None:
    average = run.looks[0]["policy"]
    for look in run.looks[1:]:
        average = {n: 0.75 * a + 0.25 * look["policy"][n] for n, a in average.items()}
    saved = run.saved("policy")
    assert saved.keys() == average.keys()
    for name, tensor in saved.items():
        assert_close(tensor, average[name], rtol=0, atol=1e-6)
    assert not equal(saved, run.looks[-1]["policy"])
    assert equal(run.saved("value"), run.looks[-1]["value"])


# T23: the critic's first values are the reward model's scores of the prompts.
def test_t23_the_critic_of_a_run_starts_from_its_reward_model(home: Path, run: Watched) -> None:
    first = run.rollouts[0]
    assert len(first.values) == 4
    for row, values in enumerate(first.values):
        part = first.sequences.rows([row])
        prompt = part.input_ids[: -len(part.response_tokens)].tolist()
        expected = plain(home / "runs/x/reward", home / "base/model", prompt)
        assert float(values[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reward", ["rewards.py:same", "other"])
def test_t23_a_critic_without_a_reward_model_of_its_own_starts_from_sft(
    home: Path, tmp_path: Path, reward: str
) -> None:
    other = [{"model": str(home / "runs/other/reward")}]
    job = job_of(home, tmp_path, **SHORT, reward=other if reward == "other" else reward)
    assert job.recipe.ppo is not None
    roles = ppo._load(job, job.recipe.ppo).roles
    assert equal(weights(roles, "value"), load_file(home / "runs/x/sft/model" / WEIGHTS))
    assert not roles.values(join([[5, 6, 7]], [[8, 9]])).any()


def test_a_run_whose_policy_is_not_the_reference_ends_before_the_first_update(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, updated = ppo.load_roles, []

    def other_reference(*arguments: Any, **settings: Any) -> LoadedRoles:
        loaded = load(*arguments, **settings)
        for parameter in loaded.roles.role_parameters("reference"):
            parameter.data.mul_(1.2)
        return loaded

    monkeypatch.setattr(ppo, "load_roles", other_reference)
    monkeypatch.setattr(Updater, "update", lambda *_, **__: updated.append(1))
    with pytest.raises(TrainingError, match=r"step 0: .* policy and reference differ"):
        ppo.run(job_of(home, tmp_path, **SHORT))
    assert not updated


@pytest.mark.parametrize("part", [".lora_B.reference.", "down_proj.base_layer.weight"])
def test_an_update_that_changes_what_is_frozen_ends_the_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    update = Updater.update

    def careless(updater: Updater, *given: Any, **more: Any) -> Any:
        metrics = update(updater, *given, **more)
        for name, parameter in updater._roles.named_parameters():
            if part in name:
                parameter.data.add_(0.01)
        return metrics

    monkeypatch.setattr(Updater, "update", careless)
    with pytest.raises(TrainingError, match=r"step 1: the base, .* is not what it was: .*tensors"):
        ppo.run(job_of(home, tmp_path, **SHORT))


def test_the_look_before_the_first_step_counts_for_stopping(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out reward is 9, then 1 for good: only against step 0 has it fallen."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    section = {"reward": "rewards.py:same", "heldout_reward": "rewards.py:falling"}
    job = job_of(home, tmp_path, **SHORT, **section, stop={"divergence": 5.0})
    assert ppo.run(job) is not None
    steps = steps_of(job)
    assert [step["probe/heldout_reward"] for step in steps] == [9.0, 1.0]
    assert "stopped at step 1: probe/heldout_reward=1.000 is 8.000" in job.console.file.getvalue()
