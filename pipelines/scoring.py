"""What PPO maximises: reward models and Python functions, weighted; and what it only looks at."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from align.errors import TrainingError
from align.functions import Chat, call_score_function, load_function
from align.inputs import HELDOUT, reward_sources
from align.manifest import ClassifierFacts, Manifest
from align.recipe_ppo import Ppo, RewardSource
from align.sequences import Sequences, join, micro_batches
from data.records import Labelled, Prompt
from data.render import Unusable, render_all
from pipelines.foreign_reward import load_foreign_rewards
from pipelines.load_roles import LoadedRoles
from pipelines.rollout import Scorer, passes
from pipelines.stage import StageJob
from reward.combine import ensemble_score, source_metrics, weighted_sum

# Metrics of all scores together; a source of that name gets a number.
_RESERVED = ("mean", "std", "low", "high")


@dataclass(frozen=True, slots=True)
class Source:
    """One part of the reward: a model, a function, or the members of an ensemble."""

    members: tuple[Scorer, ...]
    combine: Callable[[Tensor], Tensor]  # the members' scores [M, B] to one of each response [B]
    weight: float


@dataclass
class RewardScorer:
    """A scorer that adds up several sources and can say what each of them gave."""

    sources: dict[str, Source]  # by the name that its metrics carry
    heldout: Scorer | None = None  # ppo.heldout_reward: no part of the sum
    _seen: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    @torch.no_grad()
    def __call__(self, prompts: list[Chat], responses: list[str], sequences: Sequences) -> Tensor:
        """Score responses, ``[B]`` float32, without gradients."""
        scores = []
        for name, source in self.sources.items():
            members = torch.stack([m(prompts, responses, sequences) for m in source.members])
            scores.append(source.combine(members))
            self._seen[name].append(members)
        weights = [source.weight for source in self.sources.values()]
        return weighted_sum(torch.stack(scores), weights)

    def take_metrics(self) -> dict[str, float]:
        """Return each source's means over what was scored since the last call of this.

        Empty where a single model or function is the whole reward: then ``score/mean`` says it.
        """
        seen = {name: torch.cat(parts, dim=1) for name, parts in self._seen.items()}
        self._seen.clear()
        is_single = sum(len(source.members) for source in self.sources.values()) == 1
        return {} if is_single else source_metrics(seen)


def reward_roles(job: StageJob) -> dict[str, Path]:
    """Return the reward models that are adapters on this run's base: role -> model folder.

    ``reward`` is this recipe's own; those of other runs on the same base, with the same tokenizer
    and template, are ``reward1``, ``reward2``, ...
    """
    roles = _roles(job)
    folders = {"reward": job.parent_folder("reward")} if "reward" in roles else {}
    return {role: folders.get(name, Path(name)) / "model" for name, role in roles.items()}


def ppo_scorer(job: StageJob, section: Ppo, loaded: LoadedRoles) -> RewardScorer:
    """Return the scorer that ``ppo.reward`` describes; in PPO with ``ppo.heldout_reward``.

    Both at once: models of other runs that have one base share it.

    Args:
        loaded: with a role for each of ``reward_roles``.

    Raises:
        RecipeError: there is no such function.
        InputError: a reward model with a base of its own cannot be loaded, or cannot be shown the
            prompts; see ``load_foreign_rewards``.
    """
    sources = reward_sources(job.recipe, job.stage)
    members = dict(
        zip(sources, _members(job, section, loaded, list(sources.values())), strict=True)
    )
    sources.pop(HELDOUT, None)
    names = _names(list(sources.values()), job.reward_models)
    return RewardScorer(
        {
            name: Source(members[key], _combination(source), source.weight)
            for name, (key, source) in zip(names, sources.items(), strict=True)
        },
        heldout=members[HELDOUT][0] if HELDOUT in members else None,
    )


def _combination(source: RewardSource) -> Callable[[Tensor], Tensor]:
    return partial(
        ensemble_score,
        combine=source.combine,
        std_penalty=source.std_penalty,
        variance_penalty=source.variance_penalty,
    )


def own_scorer(job: StageJob, loaded: LoadedRoles, batch_size: int) -> Scorer:
    """Return the scorer of the recipe's own reward model, whatever PPO maximises.

    Args:
        loaded: with the role ``reward``, unless the model reads text.
        batch_size: responses per forward pass.
    """
    if not reads_text(job):
        return _role_scorer(
            loaded, "reward", lambda lengths: micro_batches(lengths, rows=batch_size)
        )
    return _foreign_scorers(job, loaded, ["reward"], batch_size)["reward"]


def reads_text(job: StageJob) -> bool:
    """Return whether the recipe's own reward model is none of the roles on the base."""
    return job.parents["reward"].base.architecture == "encoder"


def _roles(job: StageJob) -> dict[str, str]:
    """Return the roles of the reward models that share the base, by their name in the recipe."""
    manifests = job.reward_models
    ours = _origin(job.parents["sft"])
    shared = [name for name, manifest in manifests.items() if _origin(manifest) == ours]
    roles = {name: f"reward{number}" for number, name in enumerate(shared, 1)}
    sources = reward_sources(job.recipe, job.stage).values()
    if any("reward" in source.models for source in sources) and not reads_text(job):
        roles["reward"] = "reward"
    return roles


def _origin(manifest: Manifest) -> tuple[str, ...]:
    """Return what two models have to have in common to share a base and read the same tokens."""
    return tuple(manifest.origin.values())


def _members(
    job: StageJob, section: Ppo, loaded: LoadedRoles, sources: Sequence[RewardSource]
) -> list[tuple[Scorer, ...]]:
    """Return the scorers of each source: one, or those of an ensemble's models."""
    roles = _roles(job)
    names = dict.fromkeys(name for source in sources for name in source.models)
    models = {
        name: _role_scorer(
            loaded, roles[name], lambda lengths: passes(lengths, section), _classifier(job, name)
        )
        for name in names
        if name in roles
    }
    batch_size = section.micro_batch_size or section.minibatch_size
    models |= _foreign_scorers(job, loaded, [n for n in names if n not in roles], batch_size)
    return [
        (_function_scorer(source.function, loaded.roles.device),)
        if source.function is not None
        else tuple(
            _probability(models[name], _classifier(job, name), source.label)
            for name in source.models
        )
        for source in sources
    ]


def _classifier(job: StageJob, name: str) -> ClassifierFacts | None:
    """Return what is known of a model that is a classifier."""
    made = job.parents["reward"] if name == "reward" else job.reward_models[name]
    return made.classifier


def _probability(scorer: Scorer, facts: ClassifierFacts | None, label: str | None) -> Scorer:
    """Return a scorer of the probability of a class; a reward model's is left as it is."""
    if facts is None:
        return scorer
    assert label is not None
    number = facts.labels.index(label)

    def score(prompts: list[Chat], responses: list[str], sequences: Sequences) -> Tensor:
        return scorer(prompts, responses, sequences).softmax(-1)[:, number]

    return score


def _role_scorer(
    loaded: LoadedRoles,
    role: str,
    passes_of: Callable[[tuple[int, ...]], list[list[int]]],
    facts: ClassifierFacts | None = None,
) -> Scorer:
    """Return a scorer by a model on our base; a classifier of texts is given the response alone."""

    def score(prompts: list[Chat], responses: list[str], sequences: Sequences) -> Tensor:
        if facts is not None and facts.reads == "text":
            sequences = _texts(loaded, responses)
        parts = [sequences.rows(rows) for rows in passes_of(sequences.lengths)]
        return torch.cat([loaded.roles.scores(part, role=role) for part in parts])

    return score


def _texts(loaded: LoadedRoles, responses: Sequence[str]) -> Sequences:
    """Return responses as a classifier of texts on our base reads them.

    Raises:
        TrainingError: our tokenizer cannot write one.
    """
    try:
        rows = [loaded.renderer.labelled(Labelled((text,), "")) for text in responses]
    except Unusable as error:
        raise TrainingError(f"ppo.reward: a response cannot be classified: {error}") from None
    return join(*zip(*rows, strict=True)).to(loaded.roles.device)


def _foreign_scorers(
    job: StageJob, loaded: LoadedRoles, names: Sequence[str], batch_size: int
) -> dict[str, Scorer]:
    """Return scorers of the models that do not share our base; decoders that share one share it."""
    manifests, folders = job.reward_models, {name: Path(name) for name in names}
    if "reward" in names:
        manifests = manifests | {"reward": job.parents["reward"]}
        folders["reward"] = job.parent_folder("reward")
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        manifest = manifests[name]
        alone = manifest.base.architecture == "encoder"
        reads = manifest.classifier.reads if manifest.classifier is not None else ""
        groups[(name,) if alone else (*_origin(manifest), reads)].append(name)
    scorers: dict[str, Scorer] = {}
    for members in groups.values():
        foreign = load_foreign_rewards(
            job.recipe,
            [folders[name] for name in members],
            manifests[members[0]],
            batch_size=batch_size,
            note=lambda text: job.log.note(text),  # the log begins the stage's folder
        )
        foreign.check_prompts(_readable_prompts(job, loaded))
        for number, name in enumerate(members):
            scorers[name] = _text_scorer(partial(foreign.scores, number))
    return scorers


def _readable_prompts(job: StageJob, loaded: LoadedRoles) -> list[Prompt]:
    """Return the prompts that the policy can be given; the others are dropped and counted."""
    data = job.data["prompts"]
    rows = [row for row in (*data.train, *data.heldout) if isinstance(row, Prompt)]
    kept, _ = render_all(rows, lambda row: (row, loaded.renderer.prompt(row.messages)))
    return [row for row, _ in kept]


def _function_scorer(name: str, device: torch.device) -> Scorer:
    function = load_function(name)

    def score(prompts: list[Chat], responses: list[str]) -> Tensor:
        scores = call_score_function(function, name, prompts, responses)
        return torch.tensor(scores, dtype=torch.float32, device=device)

    return _text_scorer(score)


def _text_scorer(score: Callable[[list[Chat], list[str]], Tensor]) -> Scorer:
    """Return a scorer that judges text, whatever its tokens are."""
    return lambda prompts, responses, sequences: score(prompts, responses)


def _names(sources: Sequence[RewardSource], manifests: dict[str, Manifest]) -> list[str]:
    """Return a name for each source: the function's, or that of the run whose model it is."""
    names: list[str] = []
    for source in sources:
        name = source.model or "ensemble"
        if source.function is not None:
            name = source.function.rpartition(":")[2]
        elif name in manifests:
            name = manifests[name].name
        number, free = 1, name
        while free in (*names, *_RESERVED):
            number += 1
            free = f"{name}-{number}"
        names.append(free)
    return names
