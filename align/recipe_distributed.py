"""What a recipe may say about several processes and ZeRO, and what goes with them so far."""

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from align.recipe_types import Optimisation, Positive, PositiveFloat, Section, refuse

if TYPE_CHECKING:
    from align.recipe import Recipe
    from align.recipe_ppo import Ppo
    from align.recipe_reward import Reward

Zero = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "all"]


class Distributed(Section):
    """How many processes train one model, and how DeepSpeed shares it out to them."""

    processes: Positive = 1  # one per GPU, of all nodes; batch sizes count over all of them
    # What the processes share out instead of each holding all of it (Rajbhandari et al. 2020): 0
    # nothing, 1 the optimiser's states, 2 the gradients as well, 3 also the weights. In ppo a
    # process holds the gradients of its own passes whole with 2, too, and 3 are the models' layers.
    zero: Zero = 0
    # What lies in main memory: the optimiser's states, or the weights as well (with zero=3).
    offload: Offload = "none"
    # A folder on a fast disk for what is offloaded, in the place of main memory (with zero=3; not
    # in ppo, and without checkpoints). DeepSpeed needs libaio for it.
    nvme_path: str | None = None
    # How long a process waits for the others before it takes one of them for hanging. The first
    # scores, measures and saves for all: it has to be longer than that takes.
    timeout_minutes: PositiveFloat = 30.0

    @model_validator(mode="after")
    def _check(self) -> "Distributed":
        if self.offload != "none" and self.zero == 0:
            refuse("offload", "is a part of ZeRO, which zero=0 turns off; allowed with it: none")
        if self.offload == "all" and self.zero != 3:
            refuse("offload", f"weights are whole with zero={self.zero}; allowed: none, optimizer")
        if self.nvme_path is not None and (self.zero != 3 or self.offload == "none"):
            found = f"zero={self.zero}, offload={self.offload}"
            refuse("nvme_path", f"nothing is offloaded there with {found}; allowed with it: null")
        return self

    @property
    def together(self) -> bool:
        """Whether the training stages run in a group of processes, be it of one."""
        return self.processes > 1 or self.zero > 0

    def problems(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """Return what in the recipe does not go with this section: key, reason."""
        if not self.together:
            return []
        problems = self._method_problems(recipe) + self._stage_problems(recipe)
        if self.nvme_path is not None and recipe.run.keep_checkpoints:
            needed = "not built with distributed.nvme_path, where the states lie; allowed: 0"
            problems.append(("run.keep_checkpoints", needed))
        return problems + (self._ppo_problems(recipe.ppo) if recipe.ppo else [])

    def _method_problems(self, recipe: "Recipe") -> list[tuple[str, str]]:
        problems = []
        beside = f"with distributed.processes={self.processes}, zero={self.zero}"
        adapter, base = recipe.adapter, recipe.base
        if adapter.method not in ("lora", "full"):
            problems.append(("adapter.method", f"not built {beside}; allowed: lora or full"))
        if adapter.dora:
            problems.append(("adapter.dora", f"not built {beside}; allowed: false"))
        if base.quantization == "int8":
            problems.append(("base.quantization", f"not built {beside}; allowed: none, nf4, fp4"))
        return problems

    def _stage_problems(self, recipe: "Recipe") -> list[tuple[str, str]]:
        problems = []
        for stage in ("pretrain", "sft", "reward", "ppo"):
            section: Optimisation | None = getattr(recipe, stage)
            if section is None:
                continue
            problem = self._batch_problem(section) if stage != "ppo" else None
            if problem is not None:
                problems.append((f"{stage}.{problem[0]}", problem[1]))
            if self.zero and section.optimizer != "adamw":
                needed = f"not built with distributed.zero={self.zero}; allowed: adamw"
                problems.append((f"{stage}.optimizer", needed))
        for stage, watched in (("sft", recipe.sft), ("reward", recipe.reward)):
            if watched is not None and watched.heldout_every is not None:
                needed = "not built in several processes: looks at held-out rows while training"
                problems.append((f"{stage}.heldout_every", f"{needed}; allowed: null"))
        if recipe.pretrain is not None and recipe.pretrain.objective == "masked":
            needed = "an encoder is made by one process alone so far"
            problems.append(("pretrain.objective", f"not built: {needed}; allowed: causal"))
        return problems + (self._reward_problems(recipe.reward) if recipe.reward else [])

    def _reward_problems(self, reward: "Reward") -> list[tuple[str, str]]:
        problems = []
        if reward.base is not None:
            needed = "an encoder is trained by one process alone so far"
            problems.append(("reward.base", f"not built: {needed}; make it by another recipe"))
        if reward.classes is not None:
            needed = "a classifier is trained by one process alone so far"
            problems.append(("reward.loss", f"not built: {needed}; make it by another recipe"))
        if reward.aux_lm_coef:
            needed = "reads the output embeddings of a model that several processes train"
            problems.append(("reward.aux_lm_coef", f"not built: it {needed}; allowed: 0"))
        return problems

    def _ppo_problems(self, ppo: "Ppo") -> list[tuple[str, str]]:
        problems = []
        beside = f"in a group (distributed.processes={self.processes}, zero={self.zero})"
        if self.nvme_path is not None:
            problems.append(("distributed.nvme_path", "not built for ppo; allowed with it: null"))
        if ppo.ptx is not None and ppo.ptx.batch_size % self.processes:
            needed = f"the {self.processes} processes cannot share it equally"
            allowed = f"allowed: multiples of {self.processes}"
            problems.append(("ppo.ptx.batch_size", f"{needed}; {allowed}"))
        if ppo.rollout.engine == "hf":
            problems.append(("ppo.rollout.engine", f"not built {beside}; allowed: native"))
        parts = self.processes * (ppo.micro_batch_size or 1)
        if ppo.minibatch_size % parts:
            needed = f"the {self.processes} processes cannot share it equally"
            problems.append(("ppo.minibatch_size", f"{needed}; allowed: multiples of {parts}"))
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
