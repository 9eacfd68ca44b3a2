"""Runs with finished reward stages on two bases, and what their models give to some answers.

Expected scores come from transformers and peft alone: see ``tests.finished.plain``. The text that a
model on another base has to be shown is written out by hand.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from align.recipe import Recipe, TokenizerSection
from align.roles import Roles
from align.sequences import join
from align.stages import read_parents, read_reward_models
from data.load import LoadedData
from data.records import Message, Prompt
from data.render import Renderer
from data.tokenizer import end_ids, prepare_tokenizer
from pipelines.load_roles import LoadedRoles
from pipelines.rollout import as_chat
from pipelines.scoring import RewardScorer, ppo_scorer, reward_roles
from pipelines.stage import StageJob
from reward.head import load_score_head
from tests import tiny
from tests.finished import finish, foreign_tokenizer, origin, plain, pretrain_stage, reward_stage

PROMPTS = [
    Prompt((Message("user", "Tom?"),)),
    Prompt((Message("user", "Say hello to Mira."),)),
    Prompt((Message("user", "Hello!"), Message("assistant", "Hi."), Message("user", "Paris?"))),
]
RESPONSES = ["Tom has a red kite and two blue boats.", "", "Paris."]

# PROMPTS as the template of the foreign tokenizer writes them, and the answers up to their end.
FOREIGN_PROMPTS = [
    "<s>[user]\nTom?\n[assistant]\n",
    "<s>[user]\nSay hello to Mira.\n[assistant]\n",
    "<s>[user]\nHello!\n[assistant]\nHi.</s>\n[user]\nParis?\n[assistant]\n",
]
FOREIGN = [
    prompt + response + "</s>" for prompt, response in zip(FOREIGN_PROMPTS, RESPONSES, strict=True)
]

MakeModel = Callable[..., PreTrainedModel]
# The base of our run, and that of the others.
BASES = {"llama": (tiny.llama, tiny.gpt2), "gpt2": (tiny.gpt2, tiny.llama)}


@dataclass(frozen=True)
class World:
    """A run ``x``, a run ``other`` on its base, and ``far`` and ``farther`` on another base.

    The other base comes with a tokenizer and a template of its own. SFT is a manifest only.
    """

    root: Path
    own: MakeModel
    far: MakeModel


def build(root: Path, own: MakeModel, far: MakeModel) -> World:
    """Write the runs' finished stages below ``root``; about a second."""
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    base = pretrain_stage(root / "runs/x/pretrain", own(), tokenizer)
    sft = root / "runs/x/sft"
    (sft / "model").mkdir(parents=True)
    finish(sft, "sft", **origin(base, tokenizer))
    for seed, name in enumerate(("x", "other"), 1):
        reward_stage(root / "runs" / name / "reward", base, own(), tokenizer, seed)
    theirs = foreign_tokenizer()
    there = pretrain_stage(root / "runs/far/pretrain", far(290, seed=7), theirs)
    for seed, name in enumerate(("far", "farther"), 3):
        reward_stage(root / "runs" / name / "reward", there, far(290, seed=7), theirs, seed)
    return World(root, own, far)


def copied(built: World, to: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return a copy to change, which is the working directory: run trees can be moved."""
    shutil.copytree(built.root / "runs", to / "runs")
    monkeypatch.chdir(to)
    return World(to, built.own, built.far)


def recipe(reward: object, heldout: str | None = None, **data: object) -> Recipe:
    source = {"train": [{"world": "prompts"}]}
    return Recipe.model_validate(
        {
            "name": "x",
            "base": {"id": "runs/x/pretrain/model"},
            "data": {"sft": source, "reward": source, "prompts": source}
            | {"max_prompt_tokens": 128}
            | data,
            "sft": {"lr": 0.1, "batch_size": 2},
            "reward": {"lr": 0.1, "batch_size": 2, "center_on": "none"},
            "ppo": {"lr": 0.1, "batch_size": 4, "minibatch_size": 2, "steps": 1}
            | {"max_new_tokens": 32, "reward": reward, "heldout_reward": heldout},
        }
    )


def start(
    world: World, reward: object, heldout: str | None = None, **data: object
) -> tuple[StageJob, LoadedRoles]:
    """Return a PPO job and its roles, loaded as the reward roles say."""
    whole = recipe(reward, heldout, **data)
    assert whole.ppo is not None
    prompts = {"prompts": LoadedData(tuple(PROMPTS), (), ())}
    parents = read_parents(whole, "ppo")
    others = read_reward_models(whole, "ppo")
    job = StageJob(whole, "ppo", world.root / "runs/x/ppo", parents, prompts, Console(), others)
    folders = reward_roles(job)
    tokenizer = AutoTokenizer.from_pretrained("runs/x/pretrain/model")
    roles = Roles(world.own(), folders, heads={r: load_score_head(f) for r, f in folders.items()})
    loaded = LoadedRoles(
        roles=roles,
        facts=parents["sft"].base,
        tokenizer=tokenizer,
        renderer=Renderer(tokenizer, 128, 128),
        end_ids=end_ids(tokenizer),
        pad_id=tokenizer.pad_token_id,
    )
    return job, loaded


def scorer_of(world: World, reward: object, **data: object) -> tuple[RewardScorer, LoadedRoles]:
    job, loaded = start(world, reward, **data)
    assert job.recipe.ppo is not None
    return ppo_scorer(job, job.recipe.ppo, loaded), loaded


def ask(scorer: RewardScorer, loaded: LoadedRoles, rows: Sequence[int] = (0, 1, 2)) -> list[float]:
    prompts, responses = [PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows]
    sequences = join(*policy_ids(loaded, prompts, responses))
    return scorer([as_chat(prompt) for prompt in prompts], responses, sequences).tolist()


def policy_ids(
    loaded: LoadedRoles, prompts: Sequence[Prompt], responses: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Sampled ids: every response spelled byte by byte, as a policy may, and ended."""
    tokenizer = loaded.tokenizer
    spelled = [
        [i for c in text for i in tokenizer(c, add_special_tokens=False)["input_ids"]] + [1]
        for text in responses
    ]
    return [loaded.renderer.prompt(prompt.messages) for prompt in prompts], spelled


def plain_own(name: str, loaded: LoadedRoles) -> list[float]:
    """Scores of a model on the run's base: of the ids that were sampled."""
    rows = zip(*policy_ids(loaded, PROMPTS, RESPONSES), strict=True)
    base = Path("runs/x/pretrain/model")
    return [plain(Path("runs", name, "reward"), base, prompt + ids) for prompt, ids in rows]


def plain_far(name: str, texts: Sequence[str] = FOREIGN) -> list[float]:
    """Scores of a model on the other base: of the text, written by its own template."""
    tokenizer, base = foreign_tokenizer(), Path("runs/far/pretrain/model")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [plain(Path("runs", name, "reward"), base, ids) for ids in rows]


def close(expected: list[float]) -> object:
    assert max(expected) - min(expected) > 0.1  # else equality says little
    return pytest.approx(expected, abs=1e-5)
