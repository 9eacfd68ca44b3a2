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

    In PPO, where several roles stand on the weights that ZeRO 3 shares out, they are no business of
    the optimiser's; see ``layer_settings``.
    """
    batch, (rows, passes) = section.batch_size, rows_and_passes(section, distributed)
    stage = min(distributed.zero, 2) if isinstance(section, Ppo) else distributed.zero
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    place = {"device": "cpu"}
    if distributed.nvme_path is not None:
        place = {"device": "nvme", "nvme_path": distributed.nvme_path}
    if distributed.offload != "none":
        zero["offload_optimizer"] = place
    if stage == 3:
        if distributed.offload == "all":
            zero["offload_param"] = place
        # Small tensors are shared out, too: those kept whole would need to be of one precision.
        zero["stage3_param_persistence_threshold"] = 0
    if isinstance(section, Ppo):
        # How a minibatch is divided into passes each process decides for itself: by their tokens.
        batch, passes = section.minibatch_size, 1
        rows = batch // distributed.processes
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": section.max_grad_norm,
        "zero_optimization": zero,
        # The optimiser is PyTorch's AdamW, also offloaded: DeepSpeed's own has to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }


def layer_settings(distributed: Distributed, section: Ppo) -> dict[str, Any]:
    """Return the settings under which PPO shares out the layers of its base with ZeRO 3."""
    settings = deepspeed_settings(distributed, section)
    # It would put a linear map of its own in the place of torch's, for all models.
    zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}
    if distributed.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return settings | {"zero_optimization": zero}


def shown_settings(distributed: Distributed, section: Optimisation) -> dict[str, Any]:
    """Return all that DeepSpeed gets for a stage, as people see it.

    That is ``deepspeed_settings``, and for PPO with ZeRO 3 under ``layers`` how those of its base
    are shared out.
    """
    settings = deepspeed_settings(distributed, section)
    if isinstance(section, Ppo) and distributed.zero == 3:
        settings["layers"] = layer_settings(distributed, section)["zero_optimization"]
    return settings
