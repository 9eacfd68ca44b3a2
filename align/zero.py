"""DeepSpeed's settings for a stage, as its JSON. Pure: what ``align plan`` shows is what runs."""

from typing import Any

from align.recipe_distributed import Distributed, rows_and_passes
from align.recipe_ppo import Ppo
from align.recipe_types import Optimisation

WITHOUT_ZERO = ("evaluate",)  # made by one process
# Gradients on their way to the process that keeps them: numbers for which ZeRO 2 and 3 take memory
# at once. 20 MB in float32, about what DDP sends at a time; DeepSpeed's own default is a hundred
# times that.
BUCKET = 5_000_000


def deepspeed_settings(distributed: Distributed, section: Optimisation) -> dict[str, Any]:
    """Return the settings under which a stage is trained; they are complete, nothing is "auto".

    Optimiser and schedule are the stage's own. Numbers are float32 where the model's are; ZeRO
    makes a copy of what is trained all the same, shared out like the optimiser's states.

    In PPO DeepSpeed shares the weights of ZeRO 3 out, but when they are whole, and their optimiser,
    is our own business; see ``align.zero_layers`` and ``align.zero_shards``.
    """
    batch, (rows, passes) = section.batch_size, rows_and_passes(section, distributed)
    if isinstance(section, Ppo):
        # How a minibatch is divided into passes each process decides for itself: by their tokens.
        batch, passes = section.minibatch_size, 1
        rows = batch // distributed.processes
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": section.max_grad_norm,
        "zero_optimization": _zero(distributed, ppo=isinstance(section, Ppo)),
        # The optimiser is PyTorch's AdamW, also offloaded: DeepSpeed's own has to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }


def _zero(distributed: Distributed, *, ppo: bool) -> dict[str, Any]:
    """Return what is shared out, and what of it lies elsewhere."""
    place = {"device": "cpu"}
    if distributed.nvme_path is not None:
        place = {"device": "nvme", "nvme_path": distributed.nvme_path}
    zero: dict[str, Any] = {"stage": distributed.zero}
    if distributed.offload == "all":
        zero["offload_param"] = place
    if ppo and distributed.zero == 3:
        # It would put a linear map of its own in the place of torch's, for all models.
        return zero | {"memory_efficient_linear": False}
    if distributed.offload != "none":
        zero["offload_optimizer"] = place
    if distributed.zero == 3:
        # Small tensors are shared out, too: those kept whole would need to be of one precision.
        zero["stage3_param_persistence_threshold"] = 0
    return zero | {"reduce_bucket_size": BUCKET}
