"""Stage 2: a reward model learns from ranked responses which of two an annotator would prefer.

It starts from the SFT model (its adapter) or from an encoder, with a random score head, is trained
by the ranking loss of InstructGPT, and is then shifted so that the demonstrations score 0 on
average. With ``reward.loss: classes`` it is a classifier, trained on labelled rows, with a head for
its classes.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from align.adapter_methods import check_trained, say_share, trained_share
from align.attention import packed_attention
from align.errors import InputError, TrainingError
from align.manifest import ClassifierFacts
from align.models import compute_device, recompute_activations
from align.recipe import Recipe
from align.recipe_reward import Reward
from align.seeds import derive_seed
from data.order import SortedBatches
from data.records import Demonstration, Ranking, Record, as_demonstration
from data.render import Renderer, render_all
from pipelines.best_copy import HeldoutLooks, check_heldout
from pipelines.memory_check import check_memory
from pipelines.ranked_tokens import Batch, RankedTokens
from pipelines.reward_start import AnyReward, Start, reward_start
from pipelines.reward_task import Task, reward_task
from pipelines.shared_training import alone_again, share_batches
from pipelines.stage import StageJob, StageResult
from pipelines.trainer_checkpoints import train_to_end
from pipelines.trainer_log import num_steps, training_arguments
from reward.analysis import warnings
from reward.calibrate import center_on
from reward.encoder import EncoderReward
from reward.scorer import Row, score_rows

CENTERING_ROWS = 512  # demonstrations that fix the zero of the scores
PROBE_ROWS = 16  # demonstrations or responses on which the saved model is compared with the live
RELOAD_TOLERANCE = 1e-5

Collator = Callable[[Sequence[Any]], Batch]


@dataclass(frozen=True)
class Tokenized:
    """What the stage trains on, measures on and centres on, as token ids."""

    train: list[Any]  # see pipelines.reward_task
    heldout: list[Any]
    demonstrations: list[Row]
    pad_id: int


def run(job: StageJob) -> StageResult | None:
    """Train, measure, centre, save and check a reward model; see the module's docstring."""
    recipe, section = job.recipe, job.recipe.reward
    assert section is not None
    start, task = reward_start(job), reward_task(section)
    tokens = _tokenize(job, task, start.renderer)

    base_parameters, model, lm_head = _new_model(recipe, start)
    share = trained_share(model.classifier, base_parameters)
    job.log.note(f"reward  {say_share(start.adapter.method, share)}")
    looks = _looks(job, task, model, tokens)
    with _sharing_prompts(model) as shared:
        collator = partial(task.collate, pad_id=tokens.pad_id, share_prompts=shared)
        trainer = _trainer(job, model, tokens, collator, lm_head)
        if not recipe.distributed.zero:
            _try_longest(recipe, task, model, tokens, collator, lm_head)
        train_to_end(trainer, job, looks)
    if recipe.distributed.together:
        whole = alone_again(trainer, model, lambda: _new_model(recipe, start)[1])
        if whole is None:
            return None
        model = whole
        del whole
    steps = trainer.state.global_step
    model.eval()
    # First of all: what follows may run out of memory.
    folder = job.directory / "model"
    model.save(folder, start.location, start.facts.revision)
    start.tokenizer.save_pretrained(folder)

    batch_size = _scoring_batch(section)
    score = _scorer(model, batch_size, tokens.pad_id)
    if tokens.demonstrations:
        unit_spread = section.scale_on == "demonstrations"
        model.calibrate(*center_on(score(tokens.demonstrations), unit_spread=unit_spread))
        model.write_calibration(folder)
    longest = recipe.data.max_response_tokens
    metrics = share | task.measure(score, tokens.train, tokens.heldout, longest, job.log.note)
    job.log.log(steps, metrics)
    metrics |= looks.kept
    for warning in warnings(metrics):
        job.log.note(f"reward  warning: PPO could exploit this: {warning}")

    probe = (tokens.demonstrations or _rows(tokens.train[:PROBE_ROWS]))[:PROBE_ROWS]
    expected = score(probe)
    # The live model goes first: two of them need not fit into memory.
    del model, score, trainer, lm_head, looks
    gc.collect()
    check_reload(start.load, folder, probe, expected, tokens.pad_id, batch_size=batch_size)
    classifier = None
    if section.classes is not None:
        reads = tokens.train[0].record.reads
        classifier = ClassifierFacts(labels=section.labels, reads=reads)
    return StageResult(metrics, ("model",), start.tokenizer, start.facts, classifier)


def _rows(items: Sequence[Any]) -> list[Row]:
    return [row for item in items for row in item.rows()]


def _new_model(recipe: Recipe, start: Start) -> tuple[int, AnyReward, nn.Module | None]:
    """Return what ``Start.new`` does, once it is checked and prepared for training."""
    base_parameters, model, lm_head = start.new()
    check_trained(model.classifier, start.adapter.method)
    if recipe.base.gradient_checkpointing:
        recompute_activations(model.backbone)
    return base_parameters, model, lm_head


@contextmanager
def _sharing_prompts(model: AnyReward) -> Iterator[bool]:
    """Have the responses of a prompt share its computation while the model is trained.

    Yields:
        Whether they do: where each token sees those before it and nothing else.
    """
    if isinstance(model, EncoderReward) or model.has_prefix:
        yield False
        return
    with packed_attention(model.backbone) as possible:
        yield possible


class RewardTrainer(Trainer):
    """A trainer whose batches are rankings, or labelled rows.

    Loss and gradient of an optimiser step are means over these, whatever the micro batches are, and
    also where the last batch of an epoch is smaller.
    """

    loss_is_scaled_for_ga = True
    SUMS = ("_right", "_pairs")  # what a checkpoint has to keep besides the trainer's own

    def __init__(
        self, *, section: Reward, order: SortedBatches, lm_head: nn.Module | None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._task, self._order, self._lm_head = reward_task(section), order, lm_head
        self._right, self._pairs = 0.0, 0  # since the last log line

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._order

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        counts = [self._task.count(batch) for batch in batch_samples]
        return self._over_all(torch.stack(counts).sum().to(device)).clamp(min=1)

    def _over_all(self, count: Tensor) -> Tensor:
        """Return the sum over the processes."""
        total: Tensor = self.accelerator.reduce(count, "sum")
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro batch's share of the optimiser step's loss."""
        loss, scores = self._task.loss(model, inputs, self._lm_head, num_items_in_batch)
        outcomes = self._task.outcomes(scores.detach(), inputs)
        self._right += outcomes.sum().item()
        self._pairs += outcomes.numel()
        loss = loss * self.accelerator.num_processes  # their gradients are averaged
        return (loss, {"scores": scores}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the accuracy on the pairs or rows since the last line."""
        if "loss" in logs:
            sums = torch.tensor([self._right, self._pairs], device=self.args.device)
            right, pairs = self._over_all(sums).tolist()
            if pairs:
                logs["accuracy"] = right / pairs
            self._right, self._pairs = 0.0, 0
        super().log(logs, start_time)


def check_reload(
    load: Callable[[Path], AnyReward],
    folder: Path,
    probe: Sequence[Row],
    expected: Tensor,
    pad_id: int,
    *,
    batch_size: int,
) -> None:
    """Load a saved reward model anew and compare its scores with the live model's.

    Args:
        load: reads a reward model from its folder.
        batch_size: as ``expected`` was computed with: in bfloat16 other shapes round differently.

    Raises:
        TrainingError: they differ.
    """
    model = load(folder).to(compute_device())
    found = _scorer(model, batch_size, pad_id)(probe)
    difference = (found - expected).abs().max().item()
    if not difference <= RELOAD_TOLERANCE:
        raise TrainingError(
            f"{folder}: the saved reward model scores differently from the trained one, by up to"
            f" {difference:.2g} ({RELOAD_TOLERANCE:g} is allowed); it cannot be used"
        )


def _tokenize(job: StageJob, task: Task, renderer: Renderer) -> Tokenized:
    pad_id, render = renderer.tokenizer.pad_token_id, partial(task.tokens, renderer)
    train, dropped = render_all(job.data["reward"].train, render)
    heldout, heldout_dropped = render_all(job.data["reward"].heldout, render)
    job.check_dropped("reward", len(train) + len(heldout), dropped + heldout_dropped)
    if not train:
        raise InputError("data.reward: no training row is left once tokenised")
    assert job.recipe.reward is not None
    check_heldout("reward", job.recipe.reward, heldout)
    task.check(train, lambda text: job.log.note(text))  # the log begins the stage's folder
    assert isinstance(pad_id, int)
    return Tokenized(train, heldout, _demonstrations(job, renderer), pad_id)


def _demonstrations(job: StageJob, renderer: Renderer) -> list[Row]:
    """Return the demonstrations to centre on; what is unusable was counted by the SFT stage."""
    assert job.recipe.reward is not None
    if job.recipe.reward.center_on == "none":
        return []

    def render(record: Record) -> Row:
        assert isinstance(record, Demonstration | Ranking)
        tokens = renderer.demonstration(as_demonstration(record).messages)
        return tokens.input_ids, []

    records = job.data["sft"].train[:CENTERING_ROWS] if "sft" in job.data else ()
    rows, _ = render_all(records, render)
    if not rows:
        raise InputError(
            "reward.center_on=demonstrations: data.sft has none; give data.sft or center_on=none"
        )
    return rows


def _trainer(
    job: StageJob,
    model: AnyReward,
    tokens: Tokenized,
    collator: Collator,
    lm_head: nn.Module | None,
) -> RewardTrainer:
    recipe, section = job.recipe, job.recipe.reward
    assert section is not None
    together, seed = recipe.distributed.together, derive_seed(recipe.seed, "reward", "training")
    order = SortedBatches([row.width for row in tokens.train], section.batch_size, seed)
    trainer = RewardTrainer(
        section=section,
        lm_head=lm_head,
        order=order,
        model=model,
        args=training_arguments(
            TrainingArguments,
            section,
            job.directory,
            steps=num_steps(len(tokens.train), section, section.epochs),
            seed=seed,
            distributed=recipe.distributed,
            remove_unused_columns=False,
        ),
        train_dataset=tokens.train + ([_blank(tokens.train[0])] if together else []),
        data_collator=collator,
    )
    if together:
        share_batches(trainer, section, len(tokens.train), blank=True, order=order)
    return trainer


def _blank(row: RankedTokens) -> RankedTokens:
    """Return a row from which nothing is learned: one response is no ranking."""
    token = row.prompt[:1]
    only = replace(row.ranking, responses=row.ranking.responses[:1], scores=row.targets[:1])
    return RankedTokens(token, (token,), only)


def _try_longest(
    recipe: Recipe,
    task: Task,
    model: AnyReward,
    tokens: Tokenized,
    collator: Collator,
    lm_head: nn.Module | None,
) -> None:
    """Go once through the longest micro-batch there is; see ``pipelines.memory_check``."""
    section = recipe.reward
    assert section is not None
    count = section.micro_batch_size or section.batch_size
    longest = sorted(tokens.train, key=lambda row: row.num_tokens)[-count:]

    def step() -> Tensor:
        batch = collator(longest)
        model.train()
        batch = {name: values.to(compute_device()) for name, values in batch.items()}
        loss, _ = task.loss(model, batch, lm_head, None)
        return loss

    rows = len(_rows(longest))
    what = f"{rows} rows of up to {max(row.width for row in longest)} tokens"
    check_memory(recipe, "reward", list(model.parameters()), step, what)


def _looks(job: StageJob, task: Task, model: AnyReward, tokens: Tokenized) -> HeldoutLooks:
    """Return the looks at the loss and the accuracy on held-out rows."""
    section = job.recipe.reward
    assert section is not None
    score = _scorer(model, _scoring_batch(section), tokens.pad_id)

    def measure() -> dict[str, float]:
        model.eval()
        return task.look(score, tokens.heldout)

    parameters = [p for p in model.parameters() if p.requires_grad]
    return HeldoutLooks(section, job.log, parameters, "accuracy", measure)


def _scoring_batch(section: Reward) -> int:
    """Return how many responses are scored at a time."""
    return 2 * (section.micro_batch_size or section.batch_size)


def _scorer(model: AnyReward, batch_size: int, pad_id: int) -> Callable[[Sequence[Row]], Tensor]:
    def score(rows: Sequence[Row]) -> Tensor:
        return score_rows(
            model, rows, batch_size=batch_size, pad_id=pad_id, device=compute_device()
        )

    return score
