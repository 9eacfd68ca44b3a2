"""What a stage is given from outside its run: data, reward functions, models and their tokenizers.

No torch here: the launcher asks these questions before it starts anything.
"""

import hashlib
import json
from pathlib import Path

from align.errors import DataError
from align.fingerprints import folder_sha256, module_file
from align.manifest import sha256_file
from align.places import member_runs
from align.recipe import WORLD_VERSION, Recipe, Source, StageData, StageName, World
from align.recipe_ppo import Ppo, RewardSource
from align.recipe_reward import RewardBase

# The recipe sections whose values decide a stage's result; a change in any other redoes nothing.
# run.threads and distributed move results, too, by the order of sums: that is a matter of the
# machine, like the processor, and redoes nothing either.
SECTIONS: dict[StageName, tuple[str, ...]] = {
    "pretrain": ("tokenizer", "pretrain"),
    "sft": ("base", "tokenizer", "adapter", "sft"),
    "reward": ("base", "tokenizer", "adapter", "reward"),
    "ppo": ("base", "tokenizer", "adapter", "ppo"),
    "evaluate": ("base", "evaluate"),
}


HELDOUT = "ppo.heldout_reward"


def own_base(recipe: Recipe, stage: StageName) -> RewardBase | None:
    """Return the base that is a stage's alone: the encoder that a reward model starts from."""
    return recipe.reward.base if stage == "reward" and recipe.reward is not None else None


def _heldout_source(section: Ppo) -> RewardSource | None:
    """Return ``ppo.heldout_reward`` as a source: what looks like a function is one."""
    name = section.heldout_reward
    if name is None:
        return None
    is_function = ":" in name and name.rpartition(":")[2].isidentifier()
    return RewardSource(function=name) if is_function else RewardSource(model=name)


def reward_sources(recipe: Recipe, stage: StageName) -> dict[str, RewardSource]:
    """Return what a stage scores responses with, by its key in the recipe.

    PPO also looks at the held-out reward; the evaluation scores with what PPO maximises. Of the
    recipe's own ensemble the members are named.
    """
    section = recipe.ppo
    if section is None or stage not in ("ppo", "evaluate"):
        return {}
    sources = {
        f"ppo.reward.{i}": _with_members(recipe, source)
        for i, source in enumerate(section.reward_sources)
    }
    heldout = _heldout_source(section)
    if stage == "ppo" and heldout is not None:
        sources[HELDOUT] = heldout
    return sources


def _with_members(recipe: Recipe, source: RewardSource) -> RewardSource:
    if source.ensemble != "reward":
        return source
    others = (str(run / "reward") for run in member_runs(recipe))
    return source.model_copy(update={"ensemble": ("reward", *others)})


def stage_data(recipe: Recipe, stage: StageName) -> dict[str, StageData]:
    """Return the data sections that the stage reads, by name."""
    names = {
        "pretrain": ("pretrain",),
        "sft": ("sft",),
        "reward": ("reward", "sft"),  # sft: the demonstrations that scores are centred on
        "ppo": ("prompts",),
        "evaluate": ("prompts", "reward", "sft"),
    }[stage]
    if stage == "evaluate" and recipe.reward is not None and recipe.reward.classes is not None:
        names = ("prompts", "sft")  # a classifier is measured by its own stage
    if stage == "ppo" and recipe.ppo is not None and recipe.ppo.ptx is not None:
        names += (recipe.ppo.ptx.source,)
    sections = {name: getattr(recipe.data, name) for name in names}
    if stage == "evaluate":
        benchmark = recipe.data.benchmark.items()
        sections |= {f"benchmark.{name}": StageData(train=(s,)) for name, s in benchmark}
    return {name: data for name, data in sections.items() if data is not None}


def world_rows(world: World, kind: str, split: str) -> int:
    """Return how many records of a kind the built-in world has in a split."""
    if split == "heldout":
        return world.heldout_rows
    return {
        "text": world.text_rows,
        "demonstrations": world.demonstration_rows,
        "pairs": world.ranked_prompts,
        "rankings": world.ranked_prompts,
        "prompts": world.prompt_rows,
    }[kind]


def source_path(recipe: Recipe, source: Source) -> Path:
    """Return where a ``path`` source lies."""
    assert source.path is not None
    return Path(recipe.data.root) / source.path


def source_fingerprint(recipe: Recipe, source: Source) -> dict[str, str]:
    """Return ``{"id", "sha256"}``: what the source is and the hash of what it holds.

    Raises:
        DataError: the file is missing, a directory, or empty.
    """
    if source.world is not None:
        facts = {"world": source.world, "split": source.split, "version": WORLD_VERSION}
        return {
            "id": f"world:{source.world}/{source.split}",
            "sha256": digest(facts | recipe.data.world.model_dump()),
        }
    if source.hub is not None:
        return {"id": f"hub:{source.hub}/{source.split}", "sha256": ""}
    path = source_path(recipe, source)
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name the files in it, one source each")
    if not path.is_file():
        root = recipe.data.root
        raise DataError(f"{path}: no such file; relative paths start at data.root={root}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return {"id": str(source.path), "sha256": sha256_file(path)}


def named_files(recipe: Recipe, stage: StageName) -> dict[str, Path]:
    """Return the files besides the data that decide the stage's result, by their key.

    Raises:
        DataError: one is missing, or the base is a folder that is; the message names the key.
    """
    own = own_base(recipe, stage)
    for key, base in (("base.id", recipe.base.id), ("reward.base.id", own.id if own else "")):
        if base.startswith((".", "/", "~")) and not Path(base).is_dir():
            raise DataError(f"{key}={base}: no such folder; a hub id has no . or / in front")
    names = {"tokenizer.chat_template": recipe.tokenizer.chat_template}
    sources = reward_sources(recipe, stage)
    functions = {key: source.function for key, source in sources.items()}
    if stage in ("ppo", "evaluate") and recipe.evaluate is not None:
        functions["evaluate.gold"] = recipe.evaluate.gold
    if stage == "evaluate" and recipe.evaluate is not None:
        functions["evaluate.category"] = recipe.evaluate.category
    for key, function in functions.items():
        place = (function or "").rpartition(":")[0]
        names[key] = place if place.endswith(".py") else _module_path(place)
    files = {key: Path(name) for key, name in names.items() if name}
    for key, file in files.items():
        if not file.is_file():
            raise DataError(f"{key}={file}: no such file")
    return files


def _module_path(module: str) -> str | None:
    file = module_file(module) if module else None
    return str(file) if file is not None else None


def named_folders(recipe: Recipe, stage: StageName) -> dict[str, Path]:
    """Return the folders with a model or a tokenizer that the stage loads from outside the run, by
    their key.
    """
    own = own_base(recipe, stage)
    used: dict[str, str | None] = {"reward.base": own.id} if own is not None else {}
    if own is None:
        names = {"base": recipe.base.id, "tokenizer": recipe.tokenizer.id}
        used = {section: name for section, name in names.items() if section in SECTIONS[stage]}
    folders = {key: Path(name) for key, name in used.items() if name and name != "pretrain"}
    return {f"{key}.id": path for key, path in folders.items() if path.is_dir()}


def named_sha256(recipe: Recipe, stage: StageName) -> dict[str, str]:
    """Hash what the stage is given from outside the run besides its data, by the recipe's key.

    Raises:
        DataError: see ``named_files``.
    """
    files = {key: sha256_file(path) for key, path in named_files(recipe, stage).items()}
    folders = {key: folder_sha256(path) for key, path in named_folders(recipe, stage).items()}
    return files | folders


def digest(value: object) -> str:
    """Hash a value that JSON can say."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
