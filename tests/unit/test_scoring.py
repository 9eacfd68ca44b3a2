"""What PPO maximises: each source's scores against plain transformers and peft, then their sum."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.errors import RecipeError
from align.functions import Chat
from align.sequences import join
from data.load import LoadedData
from data.records import Prompt
from pipelines import probe, scoring
from pipelines.load_roles import LoadedRoles
from pipelines.probe import Probe
from pipelines.rollout import as_chat
from pipelines.scoring import RewardScorer, ppo_scorer, reward_roles
from tests.finished import edit_manifest
from tests.reward_world import (
    PROMPTS,
    RESPONSES,
    World,
    ask,
    close,
    plain_far,
    plain_own,
    policy_ids,
    scorer_of,
    start,
)


def test_models_on_our_base_are_roles_and_others_are_not(world: World) -> None:
    ensemble = ["runs/far/reward", "runs/other/reward", "reward"]
    job, _ = start(world, [{"ensemble": ensemble}])
    assert job.recipe.ppo is not None
    own = world.root / "runs/x/reward/model"
    roles = reward_roles(job)
    assert {role: path.resolve() for role, path in roles.items()} == {
        "reward": own,
        "reward1": world.root / "runs/other/reward/model",
    }


@pytest.mark.parametrize("what", ["base", "tokenizer_sha256", "template_sha256"])
def test_a_model_that_differs_in_one_thing_does_not_share_the_base(world: World, what: str) -> None:
    different = {"id": "b", "revision": None, "sha256": "0"} if what == "base" else "0"
    edit_manifest(world.root / "runs/other/reward", **{what: different})
    job, _ = start(world, [{"model": "runs/other/reward"}])
    assert job.recipe.ppo is not None
    assert reward_roles(job) == {}


def test_own_reward_model_scores_the_sampled_tokens(world: World) -> None:
    for reward in ("model", [{"model": "reward"}]):
        scorer, loaded = scorer_of(world, reward)
        assert ask(scorer, loaded) == close(plain_own("x", loaded))
        assert scorer.take_metrics() == {}  # score/mean says it


def test_another_model_on_our_base_scores_the_sampled_tokens(world: World) -> None:
    scorer, loaded = scorer_of(world, [{"model": "runs/other/reward"}])
    assert ask(scorer, loaded) == close(plain_own("other", loaded))


def test_a_weighted_sum_of_everything(world: World) -> None:
    Path("rewards.py").write_text(
        "def short(prompts, responses):\n"
        "    assert [p[-1]['content'] for p in prompts][0] == 'Tom?'\n"
        "    return [-len(text) for text in responses]\n"
    )
    scorer, loaded = scorer_of(
        world,
        [
            {"model": "reward", "weight": 2.0},
            {"ensemble": ["reward", "runs/other/reward", "runs/far/reward"], "std_penalty": 0.5},
            {"function": "rewards.py:short", "weight": -0.25},
        ],
    )
    own, other, far = plain_own("x", loaded), plain_own("other", loaded), plain_far("far")
    members = list(zip(own, other, far, strict=True))
    spread = [statistics.pstdev(row) for row in members]
    expected = [
        2.0 * own[i] + statistics.mean(members[i]) - 0.5 * spread[i] + 0.25 * len(RESPONSES[i])
        for i in range(3)
    ]
    scales = [statistics.pstdev(scores) for scores in (own, other, far)]
    assert min(spread) > 0.05
    assert ask(scorer, loaded) == close(expected)
    metrics = scorer.take_metrics()
    assert metrics == pytest.approx(
        {
            "score/reward": statistics.mean(own),
            "score/ensemble": statistics.mean(map(statistics.mean, members)),
            "score/ensemble/std": statistics.mean(spread),
            "score/ensemble/scales": max(scales) / min(scales),
            "score/short": -statistics.mean(map(len, RESPONSES)),
        },
        abs=1e-5,
    )


def test_metrics_are_means_over_all_micro_batches_since_they_were_taken(world: World) -> None:
    Path("rewards.py").write_text("def size(prompts, responses): return map(len, responses)\n")
    twice = [{"function": "rewards.py:size"}, {"function": "rewards.py:size", "weight": 0.0}]
    scorer, loaded = scorer_of(world, twice)
    ask(scorer, loaded, [0, 1])
    ask(scorer, loaded, [2])
    mean = statistics.mean(map(len, RESPONSES))
    assert scorer.take_metrics() == pytest.approx({"score/size": mean, "score/size-2": mean})
    ask(scorer, loaded, [2])
    assert scorer.take_metrics()["score/size"] == len(RESPONSES[2])


def test_sources_are_named_by_function_or_run_and_never_hide_a_metric(world: World) -> None:
    Path("rewards.py").write_text("def std(prompts, responses): return [0.0] * len(responses)\n")
    sources: list[dict[str, object]] = [
        {"function": "rewards.py:std"},
        {"model": "runs/other/reward"},
        {"model": "runs/far/reward"},
        {"model": "reward"},
    ]
    scorer, _ = scorer_of(world, sources)
    assert list(scorer.sources) == ["std-2", "other", "far", "reward"]


@pytest.mark.parametrize("heldout", ["runs/far/reward", "runs/other/reward", "rewards.py:size"])
def test_the_held_out_reward_is_no_part_of_the_score(world: World, heldout: str) -> None:
    Path("rewards.py").write_text("def size(prompts, responses): return map(len, responses)\n")
    job, loaded = start(world, "model", heldout)
    assert job.recipe.ppo is not None
    scorer = ppo_scorer(job, job.recipe.ppo, loaded)
    assert ask(scorer, loaded) == close(plain_own("x", loaded))
    with torch.no_grad():
        found = ask(scorer.heldout, loaded)  # type: ignore[arg-type]
    expected = {
        "runs/far/reward": lambda: plain_far("far"),
        "runs/other/reward": lambda: plain_own("other", loaded),
        "rewards.py:size": lambda: [float(len(text)) for text in RESPONSES],
    }[heldout]()
    assert found == close(expected)


def test_the_probe_shows_the_held_out_reward_and_what_each_source_gave(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("rewards.py").write_text("def size(prompts, responses): return map(len, responses)\n")
    reward = [{"model": "reward"}, {"function": "rewards.py:size"}]
    job, loaded = start(world, reward, "runs/far/reward")
    assert job.recipe.ppo is not None
    job.data["prompts"] = LoadedData((), tuple(PROMPTS), ())
    samples: list[dict[str, Any]] = []
    monkeypatch.setattr(job, "sample", samples.extend)
    look = Probe(job, loaded, ppo_scorer(job, job.recipe.ppo, loaded))
    monkeypatch.setattr(probe, "collect", answer)
    metrics, _ = look.look(step=3)

    expected = plain_far("far")
    assert metrics["probe/heldout_reward"] == pytest.approx(statistics.mean(expected), abs=1e-5)
    assert [row["heldout_reward"] for row in samples] == close(expected)
    own, sizes = plain_own("x", loaded), [float(len(text)) for text in RESPONSES]
    total = [a + b for a, b in zip(own, sizes, strict=True)]
    assert [row["score"] for row in samples] == close(total)
    assert metrics["probe/score/reward"] == pytest.approx(statistics.mean(own), abs=1e-5)
    assert metrics["probe/score/size"] == pytest.approx(statistics.mean(sizes))


def answer(
    loaded: LoadedRoles,
    prompts: Sequence[Prompt],
    score: RewardScorer,
    *_: object,
    seed: int,
    alone: bool,
) -> SimpleNamespace:
    """A rollout with the answers above, scored in two parts as a rollout is."""
    chats, sequences = [as_chat(p) for p in prompts], join(*policy_ids(loaded, prompts, RESPONSES))
    parts = [
        score([chats[i] for i in rows], [RESPONSES[i] for i in rows], sequences.rows(rows))
        for rows in ([0, 1], [2])
    ]
    names = ("score/mean", "kl/mean", "length/mean", "eos_rate")
    return SimpleNamespace(
        sequences=sequences,
        prompts=chats,
        responses=RESPONSES,
        scores=torch.cat(parts),
        ended=torch.ones(3, dtype=torch.bool),
        mask=torch.ones(3, 1, dtype=torch.bool),
        kl=torch.zeros(3, 1),
        last_values=None,
        metrics=lambda: dict.fromkeys(names, 0.0),
    )


def test_without_a_held_out_reward_there_is_none(world: World) -> None:
    job, loaded = start(world, "model")
    assert job.recipe.ppo is not None
    assert ppo_scorer(job, job.recipe.ppo, loaded).heldout is None


def test_a_held_out_model_shares_the_base_of_one_that_is_trained_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Sequence[Path]] = []
    load = scoring.load_foreign_rewards

    def counted(recipe: Any, folders: Sequence[Path], *rest: Any, **more: Any) -> Any:
        loads.append(folders)
        return load(recipe, folders, *rest, **more)

    monkeypatch.setattr(scoring, "load_foreign_rewards", counted)
    job, loaded = start(world, [{"model": "runs/far/reward"}], "runs/farther/reward")
    assert job.recipe.ppo is not None
    scorer = ppo_scorer(job, job.recipe.ppo, loaded)
    assert loads == [[Path("runs/far/reward"), Path("runs/farther/reward")]]
    assert ask(scorer, loaded) == close(plain_far("far"))
    with torch.no_grad():
        found = ask(scorer.heldout, loaded)  # type: ignore[arg-type]
    assert found == close(plain_far("farther"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[float('nan')] * len(responses)", "score 0 is nan; it has to be a finite number"),
        ("[0.0]", "returned 1 scores for 3 responses"),
        ("None", "fails with TypeError"),
    ],
)
def test_a_function_that_returns_no_scores_is_refused(
    world: World, body: str, message: str
) -> None:
    Path("rewards.py").write_text(f"def f(prompts, responses): return {body}\n")
    scorer, loaded = scorer_of(world, [{"function": "rewards.py:f"}])
    with pytest.raises(RecipeError, match=message):
        ask(scorer, loaded)


def test_scores_carry_no_gradient(world: World) -> None:
    scorer, loaded = scorer_of(world, [{"model": "reward"}, {"model": "runs/far/reward"}])
    loaded.roles.requires_grad_(True)
    prompts, responses = policy_ids(loaded, PROMPTS, RESPONSES)
    chats: list[Chat] = [as_chat(prompt) for prompt in PROMPTS]
    assert not scorer(chats, RESPONSES, join(prompts, responses)).requires_grad
