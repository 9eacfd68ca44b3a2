"""What a recipe may say about several processes and ZeRO, and what goes with them so far."""

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from align.recipe_types import Optimisation, Positive, Section, refuse

if TYPE_CHECKING:
    from align.recipe import Recipe

Zero = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "all"]


class Distributed(Section):
    """How many processes of this machine train one model, and how DeepSpeed shares it out."""

    processes: Positive = 1  # one per GPU; batch sizes count over all of them
    # What the processes share out instead of each holding all of it (Rajbhandari et al. 2020): 0
    # nothing, 1 the optimiser's states, 2 the gradients as well, 3 also the weights.
    zero: Zero = 0
    # What lies in main memory: the optimiser's states, or the weights as well (with zero=3).
    offload: Offload = "none"

    @model_validator(mode="after")
    def _check(self) -> "Distributed":
        if self.offload != "none" and self.zero == 0:
            refuse("offload", "is a part of ZeRO, which zero=0 turns off; allowed with it: none")
        if self.offload == "all" and self.zero != 3:
            refuse("offload", f"weights are whole with zero={self.zero}; allowed: none, optimizer")
        return self

    @property
    def together(self) -> bool:
        """Whether the training stages run in a group of processes, be it of one."""
        return self.processes > 1 or self.zero > 0

    def problems(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """Return what in the recipe does not go with this section: key, reason."""
        if not self.together:
            return []
        return self._method_problems(recipe) + self._stage_problems(recipe)

    def _method_problems(self, recipe: "Recipe") -> list[tuple[str, str]]:
        problems = []
        beside = f"with distributed.processes={self.processes}, zero={self.zero}"
        adapter, base = recipe.adapter, recipe.base
        if adapter.method not in ("lora", "full"):
            problems.append(("adapter.method", f"not built {beside}; allowed: lora or full"))
        if adapter.dora:
            problems.append(("adapter.dora", f"not built {beside}; allowed: false"))
        if base.quantization != "none":
            problems.append(("base.quantization", f"not built {beside}; allowed: none"))
        if recipe.run.keep_checkpoints:
            needed = f"checkpoints are not built {beside}: an interrupted stage begins anew"
            problems.append(("run.keep_checkpoints", f"{needed}; allowed: 0"))
        return problems

    def _stage_problems(self, recipe: "Recipe") -> list[tuple[str, str]]:
        problems = []
        for stage in ("pretrain", "sft", "reward"):
            section: Optimisation | None = getattr(recipe, stage)
            if section is None:
                continue
            problem = self._batch_problem(section)
            if problem is not None:
                problems.append((f"{stage}.{problem[0]}", problem[1]))
            if self.zero and section.optimizer != "adamw":
                needed = f"not built with distributed.zero={self.zero}; allowed: adamw"
                problems.append((f"{stage}.optimizer", needed))
        if recipe.reward is not None and recipe.reward.aux_lm_coef:
            needed = "reads the output embeddings of a model that several processes train"
            problems.append(("reward.aux_lm_coef", f"not built: it {needed}; allowed: 0"))
        if recipe.ppo is not None:
            needed = (
                f"PPO is not built with distributed.processes={self.processes}, zero={self.zero}:"
                " leave ppo out here, and make it from these sft and reward stages in one process,"
                " by a recipe that names them in run.parents"
            )
            problems.append(("ppo", needed))
        return problems

    def _batch_problem(self, section: Optimisation) -> tuple[str, str] | None:
        micro = section.micro_batch_size or 1
        if section.batch_size % (micro * self.processes) == 0:
            return None
        product = f"{self.processes} processes x {micro}"
        if section.micro_batch_size:
            product += " rows of micro_batch_size"
        return (
            "batch_size",
            f"counts over all processes, and {product} do not divide it; allowed: multiples of"
            f" {micro * self.processes}",
        )


def rows_and_passes(section: Optimisation, distributed: Distributed) -> tuple[int, int]:
    """Return the rows of a forward pass, and the passes of each process per optimiser step."""
    rows = section.micro_batch_size or section.batch_size // distributed.processes
    return rows, section.batch_size // (rows * distributed.processes)
