"""Everything around a stage: checks before it, records of it, and a clean end whatever happens.

    python -m pipelines.stage STAGE RECIPE [key=value ...] [--force] [--debug]

What can be checked without a model is checked before torch is imported, so that a user's mistake
shows within seconds. A stage's module has ``run(job) -> StageResult``; its earlier result is
removed when it first uses ``StageJob.log``, and its manifest is written when all is done. Where
several processes train together (``pipelines.several``) all run this; the first writes and speaks,
and the others end with None for a result when training has ended.
"""

import argparse
import contextlib
import importlib
import json
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from align import group, places, stages
from align import manifest as manifests
from align.checkpoints import Checkpoint, continue_folder, remove_checkpoints
from align.errors import DataError, InputError, ParentError, stopped_by
from align.inputs import named_sha256
from align.lock import locked
from align.manifest import BaseFacts, ClassifierFacts, Manifest
from align.metrics import MetricsLog, format_values, show
from align.recipe import Recipe, StageName
from align.recipe_io import dump_recipe, load_recipe
from align.tracking import RunTracker, start_tracker
from data.load import LoadedData, load_records
from data.lost import LostRows
from pipelines.checkpointing import Checkpoints, find_for_all
from pipelines.last_words import tell
from pipelines.process import (
    Signals,
    Stopped,
    quiet_libraries,
    seed_generators,
    share_processors,
    signals_as_exceptions,
)
from pipelines.record import now, write_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODULES: dict[StageName, str] = {
    "pretrain": "pipelines.pretrain",
    "sft": "pipelines.sft",
    "reward": "pipelines.reward_model",
    "ppo": "pipelines.ppo",
    "evaluate": "pipelines.evaluate",
}


@dataclass
class StageResult:
    """What a stage hands back.

    Attributes:
        metrics: the final metrics, flat.
        outputs: names of the folders and files it made, relative to its folder.
        tokenizer: the one it worked with, chat template included.
        base: the language model under it.
        classifier: of the reward stage, if that is what it made.
    """

    metrics: dict[str, float]
    outputs: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase"
    base: BaseFacts
    classifier: ClassifierFacts | None = None


@dataclass
class StageJob:
    """What a stage works with: the recipe, its checked parents and data, and where it writes.

    ``parents`` are the recipe's own stages, ``reward_models`` those of other runs, by the folder
    as the recipe spells it: both as they were when the stage began. ``inputs_sha256`` is of all
    that decides the result; see ``align.stages``.
    """

    recipe: Recipe
    stage: StageName
    directory: Path
    parents: dict[StageName, Manifest]
    data: dict[str, LoadedData]
    console: Console
    reward_models: dict[str, Manifest] = field(default_factory=dict)
    inputs_sha256: str = ""
    files: dict[str, str] = field(default_factory=dict)  # hashes of other inputs, by key
    force: bool = False  # start from nothing, whatever checkpoints there are
    signals: Signals = field(default_factory=Signals)
    tracker: RunTracker | None = None
    # Per data section: how many rows could be tokenised, and which others were dropped, and why.
    tokenised: dict[str, tuple[int, LostRows]] = field(default_factory=dict)
    _log: MetricsLog | None = None
    _checkpoints: Checkpoints | None = None

    @property
    def log(self) -> MetricsLog:
        """The metrics log. Its first use removes the stage's earlier result and saves the recipe.

        What a checkpoint covers that the stage can go on from stays. So a stage uses it after its
        last check, and before it writes anything else.
        """
        if self._log is None:
            self._log = self._begin()
        return self._log

    @property
    def checkpoints(self) -> Checkpoints:
        """The stage's checkpoints, and what it goes on from; to be used as ``log`` is."""
        _ = self.log
        assert self._checkpoints is not None
        return self._checkpoints

    @property
    def reached(self) -> int | None:
        """The last step that this process has made in training; None: it has not begun."""
        return self._checkpoints.reached if self._checkpoints is not None else None

    def _begin(self) -> MetricsLog:
        group.wait()  # until all have checked what is about to be removed
        found = self._find_checkpoint()
        if not group.is_first():
            self._checkpoints = self._checkpoints_from(found, None)
            return MetricsLog(None, None, self.console)
        if found is None:
            manifests.begin_folder(self.directory)
        else:
            continue_folder(self.directory, found)
        run = places.run_directory(self.recipe)
        for folder in (self.directory, run):
            (folder / "recipe.yaml").write_text(dump_recipe(self.recipe), encoding="utf-8")
        wandb_id = found.facts.wandb_id if found is not None else None
        self.tracker = start_tracker(self.recipe, self.stage, run, wandb_id)
        self._checkpoints = self._checkpoints_from(found, self.tracker.id or wandb_id)
        return MetricsLog(self.directory, self.tracker, self.console, self.stage)

    def _checkpoints_from(self, found: Checkpoint | None, wandb_id: str | None) -> Checkpoints:
        return Checkpoints(
            self.directory,
            self.recipe.run,
            found,
            inputs_sha256=self.inputs_sha256,
            wandb_id=wandb_id,
            signals=self.signals,
            zero=self.recipe.distributed.zero,
        )

    def _find_checkpoint(self) -> Checkpoint | None:
        def say(text: str) -> None:
            show(self.console, f"{self.stage}  {text}")

        if self.force:
            return None
        zero = self.recipe.distributed.zero
        found = find_for_all(self.directory, self.inputs_sha256, say, zero=zero)
        if found is not None:
            say(f"goes on after step {found.facts.step}, from {found.path}")
        return found

    def parent_folder(self, stage: StageName) -> Path:
        """Return the folder of a parent stage: the one that holds its ``stage.json``."""
        if stage not in self.parents:
            raise KeyError(f"{stage} is not a parent of {self.stage} in this recipe")
        return places.stage_directory(self.recipe, stage)

    def check_origin(self, tokenizer: "PreTrainedTokenizerBase", base: BaseFacts) -> None:
        """Refuse to build on parents made with another base, tokenizer or chat template.

        A base that they loaded in another precision is another base; see ``BaseFacts``. Encoders
        and decoders are not built on each other.

        Raises:
            ParentError: names the parent, and what differs.
        """
        from data.tokenizer import template_sha256, tokenizer_sha256

        ours = {
            "tokenizer": tokenizer_sha256(tokenizer),
            "chat template": template_sha256(tokenizer),
            "base": base.sha256,
            "base quantization": base.precision,
        }
        alike = {n: p for n, p in self.parents.items() if p.base.architecture == base.architecture}
        for name, parent in alike.items():
            for what, other in parent.origin.items():
                mine = ours[what]
                if mine != other:
                    raise ParentError(
                        f"{self.stage}: the recipe's {what} ({mine[:12]}) is not the one that"
                        f" {self.parent_folder(name)} was made with ({other[:12]}); redo the"
                        f" {name} stage or give the recipe the same {what}"
                    )

    def check_dropped(self, section: str, kept: int, dropped: LostRows) -> None:
        """Take note of rows that were tokenised, and refuse to go on when too many were lost.

        What is noted of one section adds up: the limit holds for all of it together.

        Args:
            section: of ``data``; its rows that the stage has no use for do not count.
            kept: how many rows could be tokenised.
            dropped: those that could not be.

        Raises:
            DataError: none of these rows is left, or more than ``data.max_dropped`` of the
                section's were dropped; names them by reason.
        """
        if dropped and not kept:
            raise DataError(
                f"data.{section}: all {dropped.total()} rows are unusable as tokens:"
                f" {dropped.named()}; fix them, or raise the limit that they exceed"
            )
        kept_before, dropped_before = self.tokenised.get(section, (0, LostRows()))
        kept, dropped = kept + kept_before, dropped + dropped_before
        self.tokenised[section] = kept, dropped
        rows = kept + dropped.total()
        limit = self.recipe.data.max_dropped
        if dropped.total() > limit * rows:
            raise DataError(
                f"data.{section}: {dropped.total()} of {rows} rows are unusable as tokens:"
                f" {dropped.named()}; data.max_dropped={limit} allows"
                f" {int(limit * rows)}; fix the rows, or raise the limit that they exceed"
            )

    def sample(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to ``samples.jsonl``."""
        _ = self.log
        with (self.directory / manifests.SAMPLES).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self, exit_code: int) -> None:
        """End the progress display and the tracker."""
        if self._log is not None:
            self._log.close()
        if self.tracker is not None:
            self.tracker.finish(exit_code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage and return the exit code: 0 done, 1 failed, 2 bad input, 128 + n signal n."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(stderr=True, quiet=not group.is_first())
    job: StageJob | None = None
    code = 1
    with signals_as_exceptions() as signals:
        try:
            job = _prepare(options, console, signals)
            if job is not None:
                with _alone(job.recipe):
                    _run(job)
            code = 0
        except Stopped as stopped:
            show(console, f"{options.stage}: {stopped_by(stopped.signum)}")
            code = 128 + stopped.signum
        except Exception as error:
            if options.debug:
                traceback.print_exc()
            code = tell(options.stage, error, job.reached if job is not None else None)
        finally:
            if job is not None:
                job.close(code)
    return code


def _alone(recipe: Recipe) -> contextlib.AbstractContextManager[Any]:
    """Hold the run directory; of a group, the first process does."""
    first = group.is_first()
    return locked(places.run_directory(recipe)) if first else contextlib.nullcontext()


def _prepare(options: argparse.Namespace, console: Console, signals: Signals) -> StageJob | None:
    """Check everything that can be checked without torch; None if there is nothing to do."""
    stage: StageName = options.stage
    recipe = load_recipe(options.recipe, options.overrides)
    if getattr(recipe, stage) is None:
        planned = ", ".join(stages.planned_stages(recipe)) or "none"
        raise InputError(f"{options.recipe}: has no {stage} section; its stages: {planned}")
    if getattr(recipe.run.parents, stage, None):
        raise InputError(
            f"{options.recipe}: run.parents.{stage} names a finished {stage} stage; drop it to"
            " make one here"
        )
    if (wanted := stages.group_size(recipe, stage) or 1) != group.size():
        raise InputError(
            f"distributed.processes={wanted}, but {group.size()} run here: start it by the align"
            " command"
        )
    directory = places.stage_directory(recipe, stage)
    if not options.force and stages.why_not_done(recipe, stage) is None:
        remove_checkpoints(directory)  # of a process that was killed at its very end
        show(console, f"{stage}: finished and up to date in {directory}; --force redoes it")
        return None
    manifests.check_replaceable(directory)
    parents = stages.read_parents(recipe, stage)
    reward_models = stages.read_reward_models(recipe, stage)
    data = load_records(recipe, stage)
    for name, loaded in data.items():
        show(console, _summary(stage, name, loaded))
    return StageJob(
        recipe,
        stage,
        directory,
        parents,
        data,
        console,
        reward_models,
        # Now, before the parents can change under a long run.
        inputs_sha256=stages.inputs_sha256(recipe, stage, parents, reward_models),
        files=named_sha256(recipe, stage),
        force=options.force,
        signals=signals,
    )


def _run(job: StageJob) -> None:
    """Run the stage's module and record what it made."""
    started = now()
    share_processors()
    quiet_libraries()
    seed_generators(job.recipe)
    chosen = job.recipe.distributed
    timeout, nvme = 60 * chosen.timeout_minutes, chosen.nvme_path is not None
    group.join(deepspeed=chosen.zero > 0, timeout=timeout, nvme=nvme)
    module = importlib.import_module(_MODULES[job.stage])
    result: StageResult | None = module.run(job)
    if result is None:
        return
    show(job.console, f"{job.stage}  done  {_final(result.metrics)}")
    for name, (_, dropped) in job.tokenised.items():
        if dropped:
            show(job.console, f"{job.stage}  {name}  dropped as tokens: {dropped.named()}")
    write_record(job, result, started)
    remove_checkpoints(job.directory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.stage", description="Run one stage of a recipe."
    )
    parser.add_argument("stage", choices=stages.STAGES)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--force", action="store_true", help="make the stage from nothing")
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    return parser


def _summary(stage: str, name: str, loaded: LoadedData) -> str:
    rows = sum(fact.rows for fact in loaded.facts)
    kept = sum(fact.kept for fact in loaded.facts)
    dropped: Counter[str] = Counter()
    for fact in loaded.facts:
        dropped.update(fact.dropped)
    text = f"{stage}  data.{name}  rows {rows}  kept {kept}  dropped {dropped.total()}"
    if dropped:
        text += f" ({', '.join(f'{reason} {n}' for reason, n in sorted(dropped.items()))})"
    return f"{text}  train {len(loaded.train)}  heldout {len(loaded.heldout)}"


def _final(metrics: dict[str, float]) -> str:
    return format_values(metrics) or f"{len(metrics)} metrics in {manifests.FILE}"


if __name__ == "__main__":
    # Under its own name, so that a stage's module that imports this one gets the same classes.
    group.end(importlib.import_module("pipelines.stage").main())
