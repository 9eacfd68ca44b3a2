"""One step at the longest lengths before training, which shows at once if memory is short."""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor, nn

from align.errors import TrainingError
from align.plan_memory import adam_bytes
from align.recipe import Recipe, StageName
from align.recipe_distributed import Distributed
from align.recipe_types import Optimisation

# Where each stage's memory comes from, besides what all stages share.
_KEYS: dict[StageName, tuple[str, ...]] = {
    "sft": ("micro_batch_size",),
    "reward": ("micro_batch_size",),
    "ppo": ("micro_batch_size or max_tokens_per_microbatch", "rollout.batch_size"),
}


def check_memory(
    recipe: Recipe,
    stage: StageName,
    parameters: Sequence[nn.Parameter],
    step: Callable[[], Tensor | None],
    what: str,
) -> None:
    """Run one step, backward pass included, beside as much memory as the optimiser will hold.

    Gradients are dropped and the random state is put back: what training gives is the same bit for
    bit as without this.

    Args:
        parameters: of the model; those that require gradients are trained.
        step: goes through the longest micro-batch; returns its loss, or None if it has gone
            backward itself. It must change nothing but gradients.
        what: the micro-batch, for the message.

    Raises:
        TrainingError: there is not enough memory; names the recipe's keys to lower.
    """
    section: Optimisation = getattr(recipe, stage)
    trained = [p for p in parameters if p.requires_grad]
    device = trained[0].device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            states = _optimizer_states(trained, section, recipe.distributed)
            loss = step()
            if loss is not None:
                loss.backward()
            del loss, states
    except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        if not _is_shortage(error):
            raise
        raise TrainingError(_message(recipe, stage, what, error)) from None
    finally:
        for parameter in trained:
            parameter.grad = None
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _optimizer_states(
    trained: Sequence[nn.Parameter], section: Optimisation, distributed: Distributed
) -> Tensor:
    """Return a block as large as this process's part of the optimiser's states will be.

    Paged ones can leave a full GPU, offloaded ones are not there. On a CPU it is address space that
    nothing is written to.
    """
    elsewhere = section.optimizer.startswith("paged") or distributed.offload != "none"
    sizes = [] if elsewhere else [p.numel() for p in trained]
    count = adam_bytes(sizes, section.optimizer)
    if distributed.zero:
        count = ceil(count / distributed.processes)
    return torch.empty(count, dtype=torch.uint8, device=trained[0].device)


def _is_shortage(error: Exception) -> bool:
    """Return whether memory was refused: to Python, by a GPU, or by torch's allocator on a CPU."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "DefaultCPUAllocator" in str(error)


def _message(recipe: Recipe, stage: StageName, what: str, error: Exception) -> str:
    keys = [f"{stage}.{key}" for key in _KEYS[stage]]
    last = "ppo.max_new_tokens" if stage == "ppo" else "data.max_response_tokens"
    keys += ["data.max_prompt_tokens", last]
    found = (str(error).strip().splitlines() or [type(error).__name__])[0]
    help_too = [
        text
        for text, already in (
            ("base.gradient_checkpointing=true", recipe.base.gradient_checkpointing),
            ("base.quantization=nf4", recipe.base.quantization != "none"),
        )
        if not already
    ]
    return (
        f"no step was made: memory is too short for one over {what} ({found}). Lower"
        f" {', '.join(keys[:-1])} or {keys[-1]}"
        + (f", or set {' or '.join(help_too)}" if help_too else "")
        + "; `align plan RECIPE --memory SIZE` says what makes it fit"
    )
