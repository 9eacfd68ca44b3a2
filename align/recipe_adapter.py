"""What a recipe may say about what is trained: the method, its sizes, and what it goes with."""

from typing import Literal

from pydantic import model_validator

from align.recipe_types import Fraction, Positive, PositiveFloat, Section, Strings, refuse

Method = Literal["lora", "full", "head_only", "top_layers", "bitfit", "bottleneck", "prefix"]

# Those that change weights which the base has, instead of adding some.
_OF_THE_BASE = ("full", "head_only", "top_layers", "bitfit")
_NOT_IN_PPO: dict[Method, str] = {
    "head_only": "trains nothing in the body, through which policy and critic have to learn",
    "top_layers": "replaces layers that all roles of PPO share",
    "bitfit": "changes biases that all roles of PPO share",
    "bottleneck": "puts modules between layers that all roles of PPO share",
    "prefix": "puts keys and values before every text, for which PPO's packed texts have no place",
}


class Adapter(Section):
    """What is trained in the stages sft, reward and ppo; a reward model's score head always is.

    Sizes of several methods may stand side by side: ``method`` alone says which are read.
    """

    # lora: low-rank additions (Hu et al. 2021). full: all weights. head_only: the output embeddings
    # in sft, the score head in reward. top_layers: the uppermost layers and the norm above them.
    # bitfit: the biases (Ben Zaken et al. 2022). bottleneck: small layers after the sublayers
    # (Houlsby et al. 2019, Pfeiffer et al. 2021). prefix: keys and values (Li and Liang 2021).
    method: Method = "lora"

    # lora
    r: Positive = 16
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | Strings = "all-linear"
    # Which layers carry adapters. Below the lowest, PPO computes the base once per rollout.
    layers: Literal["all", "top-half", "top-quarter"] = "all"
    rslora: bool = False  # scaled by alpha / sqrt(r), not alpha / r (Kalajdzievski 2023)
    dora: bool = False  # also trains the length of each output's weights (Liu et al. 2024); slower
    # How A begins; B begins at 0. What changes the base as well (PiSSA, OLoRA) is not offered: the
    # roles of PPO share the base.
    init: Literal["kaiming", "gaussian"] = "kaiming"

    # The other methods
    top_layers: Positive | None = None
    bottleneck_size: Positive = 64
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"  # after both sublayers, after the second
    prefix_tokens: Positive = 20

    @model_validator(mode="after")
    def _check(self) -> "Adapter":
        if self.method == "top_layers" and self.top_layers is None:
            refuse("top_layers", "how many layers are trained? method=top_layers needs a number")
        return self

    def problems_with_base(
        self, dtype: str, quantization: str, checkpointing: bool
    ) -> list[tuple[str, str]]:
        """Return what speaks against this method on a base that is loaded so: key, reason."""
        problems = []
        method = f"adapter.method={self.method}"
        if self.method in _OF_THE_BASE and dtype != "float32":
            needed = f"{method} trains weights of the base, and AdamW's small updates vanish in"
            mixed = f"float32 weights computed in {dtype} are built for ppo.layout=separate only"
            problem = f"{needed} {dtype} ({mixed}); allowed with it: float32"
            problems.append(("base.dtype", problem))
        if self.method in ("full", "top_layers", "bitfit") and quantization != "none":
            needed = (
                f"trains layers of the base, which are frozen with base.quantization={quantization}"
            )
            allowed = "lora, head_only, bottleneck or prefix"
            problems.append(("adapter.method", f"{needed}; allowed: {allowed}"))
        if self.method == "prefix" and checkpointing:
            needed = f"{method} lives in a cache, which a repeated pass would fill twice"
            problems.append(("base.gradient_checkpointing", f"{needed}; allowed with it: false"))
        return problems

    def problems_in_ppo(self, layout: str, value_layout: str | None) -> list[tuple[str, str]]:
        """Return what speaks against PPO from models that were trained by this method."""
        if self.method in _NOT_IN_PPO:
            needed = f"{_NOT_IN_PPO[self.method]}; allowed with a ppo section: lora or full"
            return [("adapter.method", needed)]
        if self.method == "full" and "shared" in (layout, value_layout):
            key = "ppo.layout" if layout == "shared" else "ppo.value.layout"
            needed = "has adapters on one base, and adapter.method=full makes none"
            return [(key, f"{needed}; allowed with it: separate")]
        return []
