"""DeepSpeed's settings for a stage, as its JSON. Pure: what ``align plan`` shows is what runs."""

from typing import Any

from align.recipe_distributed import Distributed, rows_and_passes
from align.recipe_types import Optimisation

# In ppo each process holds everything; evaluate is made by one.
WITHOUT_ZERO = ("ppo", "evaluate")


def deepspeed_settings(distributed: Distributed, section: Optimisation) -> dict[str, Any]:
    """Return the settings under which a stage is trained; they are complete, nothing is "auto".

    Optimiser and schedule are the stage's own. Numbers are float32 where the model's are: ZeRO's
    own copies for training in 16 bits are not used.
    """
    rows, passes = rows_and_passes(section, distributed)
    zero: dict[str, Any] = {"stage": distributed.zero}
    if distributed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if distributed.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    if distributed.zero == 3:
        # Small tensors are shared out, too: those kept whole would need to be of one precision.
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_batch_size": section.batch_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": section.max_grad_norm,
        "zero_optimization": zero,
        # The optimiser is PyTorch's AdamW, also offloaded: DeepSpeed's own has to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
