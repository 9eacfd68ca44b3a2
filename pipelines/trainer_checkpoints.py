"""Training by a transformers Trainer that goes on where it was interrupted, by our checkpoints.

The trainer finds its place in the data again; what it writes and reads is replaced. Its own
checkpoints hold frozen weights too, are pickled in part, may be half-written, and lack the sums
since the last line of the log. Ours hold what is trained: all else is made anew, and the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from align.state import (
    State,
    copy_into,
    generators_state,
    load_state,
    save_state,
    set_generators_state,
)
from pipelines.checkpointing import Checkpoints
from pipelines.stage import StageJob
from pipelines.trainer_log import TrainerLog, connect

# What a trainer adds up between two lines of its log. One of ours may have SUMS of its own.
_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")


def train_to_end(trainer: Trainer, job: StageJob) -> TrainerLog:
    """Train, from the stage's checkpoint if it has one; log and secure on the way."""
    log = connect(trainer, job.log)
    trainer.add_callback(_Secured(trainer, job.checkpoints))
    found = job.checkpoints.found
    with job.signals.held():
        trainer.train(resume_from_checkpoint=str(found.path) if found is not None else None)
    return log


class _Secured(TrainerCallback):
    """Has a trainer save at the boundaries that ``Checkpoints`` chooses, and go on from there."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints) -> None:
        self._trainer, self._checkpoints = trainer, checkpoints
        found = checkpoints.found
        self._state: State = load_state(found.path) if found is not None else {}
        replaced: dict[str, Callable[..., None]] = {
            "_save_checkpoint": self._save,
            "_load_from_checkpoint": self._load_parameters,
            "_load_optimizer_and_scheduler": self._load_optimizer,
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
        for name, value in self._state.pop("sums", {}).items():
            on_device = value.to(args.device) if isinstance(value, Tensor) else value
            setattr(self._trainer, name, on_device)

    def _save(self, *ignored: Any) -> None:
        # At the end of an epoch the trainer asks a second time, and is given nothing more.
        self._checkpoints.write(self._trainer.state.global_step, self._fill)

    def _fill(self, folder: Path) -> None:
        trainer = self._trainer
        assert trainer.optimizer is not None
        assert trainer.lr_scheduler is not None
        names = (*_SUMS, *getattr(trainer, "SUMS", ()))
        save_state(
            folder,
            {
                "parameters": self._trained(),
                "optimizer": trainer.optimizer.state_dict(),
                "scheduler": trainer.lr_scheduler.state_dict(),
                "sums": {name: getattr(trainer, name) for name in names},
                "generators": generators_state(),
            },
        )
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_parameters(self, *ignored: Any) -> None:
        copy_into(self._trained(), self._state.pop("parameters"))

    def _load_optimizer(self, *ignored: Any) -> None:
        trainer = self._trainer
        if self._state:
            assert trainer.optimizer is not None
            assert trainer.lr_scheduler is not None
            trainer.optimizer.load_state_dict(self._state.pop("optimizer"))
            trainer.lr_scheduler.load_state_dict(self._state.pop("scheduler"))

    def _load_generators(self, *ignored: Any) -> None:
        set_generators_state(self._state.pop("generators"))

    def _trained(self) -> dict[str, Tensor]:
        model = self._trainer.model
        assert model is not None
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
