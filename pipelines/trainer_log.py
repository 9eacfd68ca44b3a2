"""What the stages that run on a transformers ``Trainer`` share: its settings and its log.

The trainer's own console output, progress bar and reporters are off; its numbers go to the stage's
``MetricsLog`` under our keys.
"""

import math
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from align.errors import TrainingError
from align.loss_scale import LossScale
from align.metrics import MetricsLog
from align.quantization import bitsandbytes
from align.recipe_distributed import Distributed, rows_and_passes
from align.recipe_types import Optimisation, OptimizerName
from align.zero import deepspeed_settings
from pipelines.shared_training import gradient_norm

# By their names in transformers.
_OPTIMIZERS: dict[OptimizerName, str] = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_ALONE = Distributed()
_OTHER_KEYS = ("accuracy", "perplexity")  # passed on as they are

Arguments = TypeVar("Arguments", bound=TrainingArguments)


class TrainerLog(TrainerCallback):
    """Forwards a trainer's log lines, and stops it at a step with a non-finite gradient.

    The trainer has to count tokens: ``include_num_input_tokens_seen="non_padding"``.

    Args:
        scale: of the losses, where they have to be scaled: a step that was scaled too far is left
            out.
    """

    def __init__(self, trainer: Trainer, log: MetricsLog, scale: LossScale | None) -> None:
        self._trainer, self._log, self._scale = trainer, log, scale
        self._since = (0.0, 0)  # time and tokens at the last line
        self.last: dict[str, float] = {}  # the values of the last line

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Start the clock and the progress bar."""
        self._log.start(state.max_steps)
        self._since = (perf_counter(), state.num_input_tokens_seen)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Check the gradient, which a non-finite loss makes non-finite too.

        Raises:
            TrainingError: it holds a NaN or an infinity; the weights are still good.
        """
        norm = gradient_norm(self._trainer)
        is_finite = math.isfinite(norm)
        if self._scale is not None:
            self._scale.update(is_finite=is_finite)
            if not is_finite:
                for parameter in rest["model"].parameters():
                    parameter.grad = None  # the optimiser passes over it
        elif not is_finite:
            raise TrainingError(
                f"step {state.global_step + 1}: the gradient's norm is {norm}; nothing was updated."
                " Lower lr, or look at the rows of this step"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Move the progress bar; have the last step logged, whatever ``log_every`` says."""
        self._log.advance(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Take the progress bar away."""
        self._log.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **rest: Any,
    ) -> None:
        """Forward a line with a training loss; the trainer's summary at the end is left out."""
        if logs is None or "loss" not in logs:
            return
        now, tokens = perf_counter(), state.num_input_tokens_seen
        started, before = self._since
        self._since = (now, tokens)
        values = {"loss": logs["loss"], "lr": logs["learning_rate"]}
        norm = float(logs["grad_norm"])  # before clipping
        if math.isfinite(norm):
            values["grad_norm"] = norm
        if self._scale is not None:
            values["loss_scale"] = self._scale.value
        values |= {key: logs[key] for key in _OTHER_KEYS if key in logs}
        values["tokens_per_second"] = (tokens - before) / (now - started)
        self.last = values
        self._log.log(state.global_step, values)


def connect(trainer: Trainer, log: MetricsLog, scale: LossScale | None) -> TrainerLog:
    """Send the trainer's numbers to ``log`` and nowhere else."""
    trainer.remove_callback(PrinterCallback)
    callback = TrainerLog(trainer, log, scale)
    trainer.add_callback(callback)
    return callback


def num_steps(rows: int, section: Optimisation, epochs: float) -> int:
    """Return the number of optimiser steps that so many epochs over the rows take, at least 1."""
    return max(1, math.ceil(epochs * math.ceil(rows / section.batch_size)))


def training_arguments(
    kind: type[Arguments],
    section: Optimisation,
    directory: Path,
    *,
    steps: int,
    seed: int,
    distributed: Distributed = _ALONE,
    **more: Any,
) -> Arguments:
    """Return a trainer's arguments, every one that matters explicit.

    Precision is that of the loaded model: no autocast. Each process has one device. Gradient
    checkpointing is a matter of the model (``align.models.recompute_activations``), not of the
    trainer.

    Args:
        kind: ``TrainingArguments`` or a subclass.
        directory: where the trainer may write; nothing is written with these settings.
        steps: optimiser steps in all.
        seed: of the order of rows and of dropout.
        distributed: how many processes train, and by ZeRO or not.
        more: further arguments; they go before these.

    Raises:
        InputError: the optimiser needs bitsandbytes, which is missing.
    """
    if section.optimizer != "adamw":
        bitsandbytes(f"optimizer={section.optimizer}")
    rows, passes = rows_and_passes(section, distributed)
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": passes,
        "learning_rate": section.lr,
        # transformers' "constant" has no warm-up.
        "lr_scheduler_type": "constant_with_warmup"
        if section.schedule == "constant"
        else section.schedule,
        "warmup_steps": math.ceil(section.warmup_ratio * steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": _OPTIMIZERS[section.optimizer],
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "seed": seed % 2**32,  # numpy takes no larger one
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # all that is trained takes part in every pass
        "dataloader_pin_memory": torch.cuda.is_available(),
        "include_num_input_tokens_seen": "non_padding",
        "logging_strategy": "steps",
        "logging_steps": section.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if distributed.together and not torch.cuda.is_available():
        settings["ddp_backend"] = "gloo"
    if distributed.zero:
        settings["deepspeed"] = deepspeed_settings(distributed, section)
    arguments = kind(**(settings | more))
    # Before there is a trainer: where it sees several GPUs it multiplies the batch by their number
    # and splits it over them (nn.DataParallel), and says nothing.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
