"""Training by a transformers Trainer that goes on where it was interrupted, by our checkpoints.

The trainer finds its place in the data again; what it writes and reads is replaced. Its own
checkpoints, and DeepSpeed's, hold frozen weights too, are pickled in part, may be half-written, and
lack the sums since the last line of the log. Ours hold what is trained: all else is made anew, and
the same. Of a group the first process keeps what all have, and each what is its own: generators,
sums, and its share of an optimiser that ZeRO has shared out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from align import group
from align.loss_scale import LossScale
from align.state import (
    State,
    copy_into,
    generators_state,
    load_state,
    own_state_name,
    save_state,
    set_generators_state,
)
from pipelines.best_copy import HeldoutLooks
from pipelines.checkpointing import Checkpoints
from pipelines.shared_training import (
    is_shared_out,
    load_optimizer_share,
    optimizer_share,
    scale_losses,
    trained_parameters,
    whole_parameters,
)
from pipelines.stage import StageJob
from pipelines.trainer_log import connect

# What a trainer adds up between two lines of its log. One of ours may have SUMS of its own.
_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")


def train_to_end(
    trainer: Trainer, job: StageJob, looks: HeldoutLooks | None = None
) -> dict[str, float]:
    """Train, from the stage's checkpoint if it has one; log, look and secure on the way.

    Returns:
        The last line of the log, and nothing that holds the trainer or its model.
    """
    scale = scale_losses(trainer)
    log = connect(trainer, job.log, scale)
    if looks is not None:
        trainer.add_callback(looks)
    trainer.add_callback(_Secured(trainer, job.checkpoints, looks, scale))
    found = job.checkpoints.found
    with job.signals.held():
        trainer.train(resume_from_checkpoint=str(found.path) if found is not None else None)
    if looks is not None:
        looks.settle()
    return log.last


class _Secured(TrainerCallback):
    """Has a trainer save at the boundaries that ``Checkpoints`` chooses, and go on from there."""

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        looks: HeldoutLooks | None,
        scale: LossScale | None,
    ) -> None:
        self._trainer, self._checkpoints = trainer, checkpoints
        self._looks, self._scale = looks, scale
        self._own: State = {}
        if checkpoints.found is not None:
            # Before the trainer takes the model in hand, which may share its parameters out.
            assert trainer.model is not None
            saved = load_state(checkpoints.found.path)
            copy_into(trained_parameters(trainer.model), saved.pop("parameters"))
            if looks is not None:
                looks.load(saved.pop("looks"))
            if scale is not None:
                scale.load(saved.pop("loss_scale"))
            self._common, self._own = saved, load_state(checkpoints.found.path, own_state_name())
        self._prepare: Callable[..., Any] = trainer._prepare_for_training
        replaced: dict[str, Callable[..., Any]] = {
            "_prepare_for_training": self._prepare_and_load,
            "_save_checkpoint": self._save,
            "_load_from_checkpoint": _nothing,
            "_load_rng_state": self._load_generators,
        }
        for name, function in replaced.items():
            assert hasattr(trainer, name), name
            setattr(trainer, name, function)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Have the trainer save after this step's line of the log; the last step just ends."""
        if state.global_step < state.max_steps:
            control.should_save = self._checkpoints.due(state.global_step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Go on with the sums, which the trainer has set to 0; log as often as the recipe says."""
        state.compute_steps(args, state.max_steps)
        for name, value in self._own.get("sums", {}).items():
            on_device = value.to(args.device) if isinstance(value, Tensor) else value
            setattr(self._trainer, name, on_device)

    def _save(self, *ignored: Any) -> None:
        # At the end of an epoch the trainer asks a second time, and is given nothing more.
        self._checkpoints.write(self._trainer.state.global_step, self._fill)

    def _fill(self, folder: Path) -> None:
        trainer = self._trainer
        assert trainer.model is not None
        assert trainer.optimizer is not None
        assert trainer.lr_scheduler is not None
        shared_out = is_shared_out(trainer)
        names = (*_SUMS, *getattr(trainer, "SUMS", ()))
        own = {
            "sums": {name: getattr(trainer, name) for name in names},
            "generators": generators_state(),
            "optimizer": optimizer_share(trainer) if shared_out else None,
        }
        save_state(folder, own, own_state_name())
        common = {
            "parameters": whole_parameters(trainer),
            "optimizer": None if shared_out else trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "looks": self._looks.state() if self._looks is not None else None,
            "loss_scale": self._scale.state() if self._scale is not None else None,
        }
        if group.is_first():
            save_state(folder, common)
            trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _prepare_and_load(self, max_steps: int, batches: Any, found: str | None) -> Any:
        """Have the trainer prepare as for a start from nothing; then load optimiser and schedule.

        DeepSpeed would look for a checkpoint of its own.
        """
        prepared = self._prepare(max_steps, batches, None)
        trainer = self._trainer
        if found is not None:
            assert trainer.optimizer is not None
            assert trainer.lr_scheduler is not None
            # The trainer's own word of the epoch does not reach the order through two wrappers, of
            # a group's parts and of skipped batches.
            batches.set_epoch(int(trainer.state.epoch or 0))
            if is_shared_out(trainer):
                load_optimizer_share(trainer, self._own.pop("optimizer"))
            else:
                trainer.optimizer.load_state_dict(self._common.pop("optimizer"))
            trainer.lr_scheduler.load_state_dict(self._common.pop("scheduler"))
        return prepared

    def _load_generators(self, *ignored: Any) -> None:
        set_generators_state(self._own.pop("generators"))


def _nothing(*ignored: Any) -> None:
    """Stand in for what is done already."""
