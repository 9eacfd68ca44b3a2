"""Training by a transformers Trainer in several processes, and what is left for one of them after.

Every process takes its part of each batch: together they see what one alone would see, in that
order. Accelerate makes the parts, and averages gradients; losses are divided by the tokens or
rankings of the whole batch, and multiplied by the number of processes, which undoes the average.
"""

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align import group
from align.loss_scale import LossScale, needs_scaling
from align.recipe_types import Optimisation
from align.seeds import derive_seed
from align.state import State, copy_into
from align.zero_optimizer import load_states_share, states_share
from data.order import Order, WholeBatches

Model = TypeVar("Model", bound=nn.Module)


def share_batches(
    trainer: Trainer, section: Optimisation, rows: int, *, blank: bool, order: Order | None = None
) -> None:
    """Have every process of the group take its part of each batch.

    Args:
        rows: of the data to learn from.
        blank: whether the trainer's data holds one row more, from which nothing is learned, to fill
            an epoch's last batch with. Else a last batch that is not whole is left out.
        order: of the rows; None: the one that the trainer takes in one process.
    """
    seed = trainer.args.seed
    rows_in_order = order or SeedableRandomSampler(range(rows), data_seed=seed)
    batches = WholeBatches(rows_in_order, section.batch_size, rows if blank else None)
    setattr(trainer, "_get_train_sampler", lambda dataset=None: batches)  # noqa: B010
    # Dropout differs between the processes, as it does between the rows of a batch.
    torch.manual_seed(derive_seed(seed, "rank", group.rank()))


def alone_again(trainer: Trainer, model: Model, rebuild: Callable[[], Model]) -> Model | None:
    """Return the trained model, whole, in the group's first process; None in the others.

    The group has ended then.

    Args:
        model: that ``trainer`` has trained.
        rebuild: makes it as it was before training; used where it was shared out.
    """
    shared = _shares_parameters(trainer)
    trained = whole_parameters(trainer) if shared else {}
    unset_hf_deepspeed_config()
    group.leave()
    if not group.is_first():
        return None
    if not shared:
        return model
    del model
    gc.collect()
    whole = rebuild()
    copy_into(trained_parameters(whole), trained)
    return whole


def scale_losses(trainer: Trainer) -> LossScale | None:
    """Scale the losses of a trainer whose model needs it; see ``align.loss_scale``.

    Not by the trainer's own ``fp16``, which is for GPUs and would round adapters to 16 bits, nor by
    DeepSpeed's, which would round all of the model.
    """
    model: Any = trainer.model
    if not needs_scaling(model):
        return None
    scale = LossScale(trained_parameters(model).values())
    compute_loss = trainer.compute_loss

    def compute_scaled(*args: Any, **kwargs: Any) -> Any:
        found = compute_loss(*args, **kwargs)
        scale.scaled(found[0] if isinstance(found, tuple) else found)
        return found

    setattr(trainer, "compute_loss", compute_scaled)  # noqa: B010
    return scale


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole_parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Return the trained parameters whole, in the first process at least.

    Every process has to come here. Where the parameters are shared out, the others get nothing.
    """
    assert trainer.model is not None
    trained = trained_parameters(trainer.model)
    if not _shares_parameters(trainer):
        return trained
    import deepspeed

    found = {}
    for name, parameter in trained.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            if group.is_first():
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def is_shared_out(trainer: Trainer) -> bool:
    """Whether each process holds a share of the optimiser's state only."""
    return _zero_stage(trainer) > 0


def optimizer_share(trainer: Trainer) -> State:
    """Return this process's share of the optimiser's states; see ``align.zero_optimizer``."""
    return states_share(_optimizer(trainer))


def load_optimizer_share(trainer: Trainer, saved: State) -> None:
    """Go on from what ``optimizer_share`` has returned in this process of as large a group."""
    load_states_share(_optimizer(trainer), saved)


def gradient_norm(trainer: Trainer) -> float:
    """Return the norm of the gradient that a step begins with, which is that of all processes.

    DeepSpeed has made the step by the time that callbacks are asked; if the norm is not finite it
    has changed nothing.
    """
    if trainer.is_deepspeed_enabled:
        engine: Any = trainer.model_wrapped
        return float(engine.get_global_grad_norm())
    assert trainer.model is not None
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _optimizer(trainer: Trainer) -> Any:
    """Return DeepSpeed's optimiser."""
    engine: Any = trainer.model_wrapped
    return engine.optimizer


def _shares_parameters(trainer: Trainer) -> bool:
    return _zero_stage(trainer) == 3


def _zero_stage(trainer: Trainer) -> int:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return plugin.zero_stage if plugin is not None else 0
