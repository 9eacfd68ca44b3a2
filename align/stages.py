"""The stages of a recipe: which there are, what each depends on, and when one is already done.

No torch here: the launcher asks these questions before it starts anything.
"""

from collections.abc import Collection
from pathlib import Path

import align
from align.errors import ParentError
from align.inputs import (
    SECTIONS,
    digest,
    named_sha256,
    own_base,
    reward_sources,
    source_fingerprint,
    stage_data,
)
from align.manifest import (
    Manifest,
    check_same_origin,
    find_manifest,
    read_manifest,
)
from align.places import member_runs, stage_directory
from align.recipe import Recipe, StageName
from align.recipe_ppo import Ppo
from align.recipe_types import Section

STAGES: tuple[StageName, ...] = ("pretrain", "sft", "reward", "ppo", "evaluate")

# Keys in them that do not: of memory and of the log. Models that differ by them differ by rounding,
# and by the random masks of adapter.dropout. And how many others there are of an ensemble.
_WITHOUT_EFFECT = {
    "gradient_checkpointing",
    "log_every",
    "max_tokens_per_microbatch",
    "members",
    "micro_batch_size",
}
_LIMITS = ("bad_rows", "max_dropped", "max_prompt_tokens", "max_response_tokens")


def planned_stages(recipe: Recipe) -> tuple[StageName, ...]:
    """Return the stages that ``align run`` makes, in order: those the recipe has a section for."""
    return tuple(
        stage
        for stage in STAGES
        if getattr(recipe, stage) is not None and not getattr(recipe.run.parents, stage, None)
    )


def group_size(recipe: Recipe, stage: StageName) -> int | None:
    """Return how many processes make a stage together; None: one that is alone."""
    alone = stage == "evaluate" or not recipe.distributed.together
    return None if alone else recipe.distributed.processes


def parent_stages(recipe: Recipe, stage: StageName) -> tuple[StageName, ...]:
    """Return the stages that ``stage`` reads from, in order."""
    available = [
        s for s in STAGES if getattr(recipe, s, None) or getattr(recipe.run.parents, s, None)
    ]
    if stage == "evaluate":
        return tuple(s for s in available if s != "evaluate")
    wanted: tuple[StageName, ...] = ()
    if stage != "pretrain" and (own_base(recipe, stage) or recipe.base).id == "pretrain":
        wanted += ("pretrain",)
    if stage == "ppo" or (stage == "reward" and own_base(recipe, stage) is None):
        wanted += ("sft",)
    if any("reward" in source.models for source in reward_sources(recipe, stage).values()):
        wanted += ("reward",)
    return wanted


def read_reward_models(
    recipe: Recipe, stage: StageName, *, but: Collection[str] = ()
) -> dict[str, Manifest]:
    """Read the manifests of the reward models that the recipe names by their stage's folder.

    Those of the members of its own ensemble are among them, the first member's is not.

    Args:
        but: folders that are left out.

    Returns:
        The manifest by the folder, as the recipe spells it.

    Raises:
        ParentError: one is no finished reward stage; the message names its key and folder.
    """
    manifests: dict[str, Manifest] = {}
    members = {str(run / "reward") for run in member_runs(recipe)}
    for key, source in reward_sources(recipe, stage).items():
        for name in source.models:
            if name != "reward" and name not in (*manifests, *but):
                is_member = name in members
                manifests[name] = _read_reward_model(key, Path(name), is_member=is_member)
    return manifests


def _read_reward_model(key: str, folder: Path, *, is_member: bool) -> Manifest:
    try:
        manifest = read_manifest(folder, "reward")
    except ParentError as error:
        if is_member:
            raise ParentError(f"{key}: {error}; `align reward` makes all members") from None
        near = (folder / "reward", folder.parent, folder.parent / "reward")
        found = [path for path in near if _is_reward_stage(path)]
        allowed = "`reward`, this recipe's own, or a folder that holds a reward stage's stage.json"
        hint = f"did you mean {found[0]}?" if found else f"allowed: {allowed}"
        raise ParentError(f"{key}: {error}; {hint}") from None
    missing = [name for name in manifest.outputs if not (folder / name).is_file()]
    if missing:
        raise ParentError(f"{key}: {folder}: its output {missing[0]} is missing; run it again")
    return manifest


def _is_reward_stage(folder: Path) -> bool:
    manifest = find_manifest(folder)
    return manifest is not None and manifest.stage == "reward"


def recipe_sha256(recipe: Recipe, stage: StageName) -> str:
    """Hash the part of the recipe that decides this stage's result."""
    part: dict[str, object] = {"seed": recipe.seed}
    own = own_base(recipe, stage)
    without = () if own is None else ("base", "tokenizer", *(("adapter",) if own.adapter else ()))
    for name in SECTIONS[stage]:
        if name not in without:
            part[name] = _decisive(getattr(recipe, name))
    if stage == "ppo" and recipe.evaluate is not None and recipe.evaluate.gold is not None:
        part["gold"] = recipe.evaluate.gold  # decides what the probes log
    if stage == "evaluate":
        part["reward"] = _scored_with(recipe)
        if recipe.ppo is not None:
            part["selected_on"] = recipe.ppo.selected_on  # decides which prompts are answered
    part["limits"] = {key: getattr(recipe.data, key) for key in _LIMITS}
    part["data"] = {name: data.model_dump() for name, data in stage_data(recipe, stage).items()}
    return digest(part)


def _decisive(section: Section | None) -> dict[str, object] | None:
    """Return a section's values without those that no result depends on."""
    if section is None:
        return None
    values = section.model_dump(exclude=_WITHOUT_EFFECT)
    if isinstance(section, Ppo) and section.rollout.engine == "native":
        # With plain transformers a response depends on those sampled beside it.
        del values["rollout"]["batch_size"]
    return values


def _scored_with(recipe: Recipe) -> list[dict[str, object]]:
    """Return what an evaluation scores with. Models of other runs are numbered: they may move."""
    sources = reward_sources(recipe, "evaluate").values()
    others = dict.fromkeys(name for s in sources for name in s.models if name != "reward")
    numbers: dict[str, object] = {name: number for number, name in enumerate(others)}
    return [
        {"models": [numbers.get(name, name) for name in source.models]}
        | source.model_dump(exclude={"model", "ensemble"})
        for source in sources
    ]


def inputs_sha256(
    recipe: Recipe,
    stage: StageName,
    parents: dict[StageName, Manifest],
    reward_models: dict[str, Manifest] | None = None,
) -> str:
    """Hash everything that decides the stage's result: recipe part, data, parents, code version.

    Args:
        reward_models: what ``read_reward_models`` has returned; None: it is called.

    Raises:
        ParentError: a reward model outside this recipe cannot be read.
        DataError: a file that the recipe names is missing.
    """
    if reward_models is None:
        reward_models = read_reward_models(recipe, stage)
    return digest(
        {
            "recipe": recipe_sha256(recipe, stage),
            "data": [
                source_fingerprint(recipe, source)
                for data in stage_data(recipe, stage).values()
                for source in (*data.train, *data.heldout)
            ],
            "files": list(named_sha256(recipe, stage).values())
            + [model.outputs_sha256() for model in reward_models.values()],
            "parents": {name: manifest.outputs_sha256() for name, manifest in parents.items()},
            "code": align.__version__,
        }
    )


def read_parents(recipe: Recipe, stage: StageName) -> dict[StageName, Manifest]:
    """Read the parents' manifests and check that they fit together.

    Reward models outside this recipe are checked too, but they need not fit: what was made on
    another base or with another tokenizer scores the text instead of the tokens.

    Raises:
        ParentError: a parent is missing, unfinished, of another kind, or two of them differ in
            base, tokenizer or chat template; the message names both sides. Or PPO's reward names no
            class of a classifier.
    """
    parents = {
        name: read_manifest(stage_directory(recipe, name), name)
        for name in parent_stages(recipe, stage)
    }
    check_same_origin({str(stage_directory(recipe, n)): m for n, m in parents.items()})
    models = read_reward_models(recipe, stage)
    if "reward" in parents:
        models["reward"] = parents["reward"]
    for key, source in reward_sources(recipe, stage).items():
        for name in source.models:
            facts = models[name].classifier
            labels, reads = (facts.labels, facts.reads) if facts else ((), None)
            problem = source.label_problem(labels, reads)
            if problem is not None:
                raise ParentError(f"{key}: {name}: {problem}")
    own = models.get("reward")
    if stage == "evaluate" and recipe.data.benchmark and own and own.classifier:
        place = stage_directory(recipe, "reward")
        raise ParentError(f"data.benchmark: tests a reward model; {place} holds a classifier")
    return parents


def why_not_done(recipe: Recipe, stage: StageName) -> str | None:
    """Return why the stage has to run, or None if its finished result is up to date."""
    manifest = find_manifest(stage_directory(recipe, stage))
    if manifest is None or manifest.stage != stage:
        return "no finished result yet"
    directory = stage_directory(recipe, stage)
    missing = [name for name in manifest.outputs if not (directory / name).is_file()]
    if missing:
        return f"its output {missing[0]} is missing"
    parents: dict[StageName, Manifest] = {}
    for name in parent_stages(recipe, stage):
        parent = find_manifest(stage_directory(recipe, name))
        if parent is None:
            return f"its parent stage {name} has to run first"
        parents[name] = parent
    try:
        reward_models = read_reward_models(recipe, stage)
    except ParentError as error:
        return str(error)
    if manifest.inputs_sha256 == inputs_sha256(recipe, stage, parents, reward_models):
        return None
    return _what_changed(recipe, stage, manifest, parents)


def _what_changed(
    recipe: Recipe, stage: StageName, manifest: Manifest, parents: dict[StageName, Manifest]
) -> str:
    if manifest.code_version != align.__version__:
        return f"made by Align {manifest.code_version}, this is {align.__version__}"
    if manifest.recipe_sha256 != recipe_sha256(recipe, stage):
        return "its settings in the recipe have changed"
    before = {(parent.stage, parent.sha256) for parent in manifest.parents}
    now = {(name, parent.outputs_sha256()) for name, parent in parents.items()}
    now |= {("reward", m.outputs_sha256()) for m in read_reward_models(recipe, stage).values()}
    changed = [name for name in STAGES if any(name == stage for stage, _ in before ^ now)]
    if changed:
        return f"its parent {' and '.join(changed)} has changed"
    return "its data or other input files have changed"
