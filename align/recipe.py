"""What a recipe may say: one frozen model per YAML section.

A recipe describes one experiment, all stages in it. Values are refused, never repaired: an unknown
key, a wrong type or an impossible combination is an error that names the key (``align.recipe_io``
adds file and line). Batch sizes are global: they count over all processes and accumulation steps.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe_adapter import Adapter
from align.recipe_distributed import Distributed
from align.recipe_ppo import Ppo, RewardSource
from align.recipe_pretrain import Pretrain
from align.recipe_reward import Label, Reward
from align.recipe_run import Run
from align.recipe_types import (
    Dtype,
    Fraction,
    FunctionName,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    RunName,
    Section,
    Watched,
    check_exactly_one,
    refuse,
    refuse_all,
)

StageName = Literal["pretrain", "sft", "reward", "ppo", "evaluate"]


class Base(Section):
    """The language model that everything starts from."""

    # "pretrain": the model that this recipe's pretrain stage makes; else a hub id or a folder.
    id: str
    revision: str | None = None
    dtype: Dtype = "float32"  # of frozen weights; what is trained is float32
    # How the linear layers of the body are stored while adapters are trained on them.
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quantization: bool = False  # 4-bit: the scales of the blocks are quantised, too
    # What 4-bit layers compute in. auto: bfloat16 where the processor has it, else float16 on a GPU
    # and float32 on a CPU; the manifest says which.
    compute_dtype: Literal["auto"] | Dtype = "auto"
    # sft, reward and ppo compute layers again in the backward pass: slower, with far less memory.
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Base":
        for key, default in (("double_quantization", False), ("compute_dtype", "auto")):
            if self.quantization not in ("nf4", "fp4") and getattr(self, key) != default:
                refuse(
                    key,
                    f"has no effect with base.quantization={self.quantization}; allowed with nf4"
                    " and fp4 only",
                )
        return self


class TokenizerSection(Section):
    """The tokenizer of all stages; ``vocab_size`` only where the pretrain stage trains one."""

    id: str | None = None  # null: the base's own
    vocab_size: Positive | None = None
    chat_template: str | None = None  # a jinja file; null: the tokenizer's own, else Align's
    pad_token: str | None = None  # an existing token; null: chosen by rule, never the end of turn


class Source(Section):
    """One place that records come from: exactly one of ``path``, ``hub`` and ``world``."""

    path: str | None = None  # a file, relative to data.root
    hub: str | None = None  # org/name, or org/name@revision: only the latter cannot change
    world: Literal["text", "demonstrations", "pairs", "rankings", "prompts"] | None = None
    split: str = "train"
    shape: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "transcript_pairs",
        "pairs",
        "labelled_pairs",
        "labelled",
        "ranking",
        "prompts",
        "text",
    ] = "auto"
    # Our field -> their column; a dotted path reaches into a row: "instances.0.output".
    columns: dict[str, str] = Field(default_factory=dict)
    # For labelled_pairs: the label as it stands in the file -> which response is better, and where
    # the label says so, how much.
    labels: dict[str, Label] = Field(default_factory=dict)
    rows: Positive | None = None  # the first so many rows only

    @model_validator(mode="after")
    def _check(self) -> "Source":
        check_exactly_one(self, ("path", "hub", "world"))
        for key, given, source, what in (
            ("shape", self.shape != "auto", self.world, "the built-in world"),
            ("columns", bool(self.columns), self.world, "the built-in world"),
            ("labels", bool(self.labels), self.world, "the built-in world"),
            ("split", self.split != "train", self.path, "a file"),
        ):
            if given and source is not None:
                refuse(key, f"has no effect on {what}; leave it out")
        return self


Sources = Annotated[tuple[Source, ...], Field(strict=False)]


class StageData(Section):
    """The records of one stage."""

    train: Annotated[Sources, Field(min_length=1)]
    heldout: Sources = ()


# Raised by whoever changes what the world holds or how it is judged: a test keeps the hashes.
WORLD_VERSION = 1


class World(Section):
    """The built-in miniature world: how much of it is generated, and from which seed."""

    seed: NotNegative = 0
    text_rows: Positive = 20_000
    demonstration_rows: Positive = 4_000
    ranked_prompts: Positive = 4_000
    prompt_rows: Positive = 4_000
    heldout_rows: Positive = 400
    responses_per_ranking: Annotated[int, Field(ge=2, le=9)] = 4
    good_demonstrations: Fraction = 0.5
    annotator_agreement: Annotated[float, Field(ge=0.5, le=1)] = 0.75


class Data(Section):
    """Where the records of every stage come from, and what becomes of unusable rows."""

    root: str = "."
    bad_rows: Literal["refuse", "drop"] = "refuse"
    max_dropped: Fraction = 0.01
    max_prompt_tokens: Positive = 512  # longer prompts lose their beginning
    max_response_tokens: Positive = 512  # rows with a longer response are dropped, and counted
    world: World = World()
    pretrain: StageData | None = None
    sft: StageData | None = None
    reward: StageData | None = None
    prompts: StageData | None = None
    # Subset -> rankings that the evaluation tests the reward model on; rows may name their own.
    benchmark: dict[str, Source] = Field(default_factory=dict)


class Sft(Watched):
    """Supervised instruction tuning; the loss is taken on the assistant's turns only."""

    epochs: PositiveFloat = 1.0
    packing: bool = False
    samples: NotNegative = 64  # answers sampled at the end, for the EOS rate


class Evaluate(Section):
    """What ``align eval`` measures on held-out prompts."""

    prompts: Positive = 200
    pairs: Positive = 1_000
    temperature: NotNegativeFloat = 1.0  # 0: greedy
    max_new_tokens: Positive = 64
    batch_size: Positive = 64
    bootstrap: Positive = 2_000
    # Judges of the result, never of the training: functions of (prompts, responses).
    gold: FunctionName | None = None
    category: FunctionName | None = None


_OF_TENSORBOARD: dict[str, tuple[str | None, ...]] = {
    "mode": ("auto", "disabled"),
    "project": ("align",),
    "entity": (None,),
    "group": (None,),
}


class Tracking(Section):
    """Weights & Biases, or TensorBoard. ``auto``: online with a W&B key, else into the run."""

    backend: Literal["wandb", "tensorboard"] = "wandb"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "align"
    entity: str | None = None
    group: str | None = None  # of runs in W&B; null: the run's name

    @model_validator(mode="after")
    def _tensorboard_is_local(self) -> "Tracking":
        if self.backend == "tensorboard":
            for key, allowed in _OF_TENSORBOARD.items():
                if getattr(self, key) not in allowed:
                    names = " or ".join("null" if value is None else value for value in allowed)
                    refuse(key, f"means nothing to TensorBoard; allowed with it: {names}")
        return self


class Recipe(Section):
    """One experiment, all stages in it."""

    name: RunName
    seed: NotNegative = 0
    base: Base
    tokenizer: TokenizerSection = TokenizerSection()
    adapter: Adapter = Adapter()
    data: Data
    pretrain: Pretrain | None = None
    sft: Sft | None = None
    reward: Reward | None = None
    ppo: Ppo | None = None
    evaluate: Evaluate | None = None
    distributed: Distributed = Distributed()
    tracking: Tracking = Tracking()
    run: Run = Run()

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> "Recipe":
        problems = self._base_problems() + self._stage_problems() + self._adapter_problems()
        problems += self.distributed.problems(self)
        if problems:
            refuse_all(problems)
        return self

    def _base_problems(self) -> list[tuple[str, str]]:
        problems, made = [], self.pretrain.objective if self.pretrain else None
        if self.base.id == "pretrain" and not (self.pretrain or self.run.parents.pretrain):
            problems.append(("base.id", "needs a pretrain section or run.parents.pretrain"))
        encoder = self.reward.base if self.reward else None
        used = "pretrain" in (self.base.id, encoder.id if encoder else None)
        if self.pretrain and not used:
            problems.append(("pretrain", f"has no effect while base.id={self.base.id}"))
        if encoder and encoder.id == "pretrain" and not (made or self.run.parents.pretrain):
            problems.append(("reward.base.id", "needs a pretrain section or run.parents.pretrain"))
        if made == "causal" and encoder and encoder.id == "pretrain":
            needed = "causal makes a decoder; allowed with reward.base.id=pretrain: masked"
            problems.append(("pretrain.objective", needed))
        if made == "masked" and self.base.id == "pretrain" and (self.sft or self.ppo):
            needed = "pretrain.objective=masked makes an encoder, which cannot write"
            problems.append(("base.id", f"{needed}; allowed for sft and ppo: another base"))
        if self.pretrain and self.tokenizer.vocab_size is None and self.tokenizer.id is None:
            needed = "needs tokenizer.vocab_size, to train a tokenizer, or tokenizer.id"
            problems.append(("pretrain", needed))
        if self.tokenizer.vocab_size is not None:
            why = "is of the tokenizer that the pretrain stage trains; has no effect"
            if self.tokenizer.id is not None:
                problem = f"{why} beside tokenizer.id; give one of the two"
                problems.append(("tokenizer.vocab_size", problem))
            elif not self.pretrain:
                problem = f"{why} without a pretrain section; leave it out"
                problems.append(("tokenizer.vocab_size", problem))
        return problems

    def _stage_problems(self) -> list[tuple[str, str]]:
        problems = []
        for stage, data in (
            ("pretrain", "pretrain"),
            ("sft", "sft"),
            ("reward", "reward"),
            ("ppo", "prompts"),
        ):
            if getattr(self, stage) and getattr(self.data, data) is None:
                problems.append((stage, f"needs a section data.{data}"))
        for stage, section, rows in (
            ("sft", self.sft, self.data.sft),
            ("reward", self.reward, self.data.reward),
        ):
            if section and section.heldout_every and rows and not rows.heldout:
                problems.append((f"{stage}.heldout_every", f"needs data.{stage}.heldout"))
        sft = self.sft or self.run.parents.sft
        from_sft = {"reward": self.reward and not self.reward.base, "ppo": self.ppo}
        for stage, given in from_sft.items():
            if given and not sft:
                problems.append((stage, "starts from sft: needs an sft section or run.parents.sft"))
        if self.reward and self.reward.center_on == "demonstrations" and self.data.sft is None:
            needed = "needs the demonstrations of data.sft; allowed without them: none"
            problems.append(("reward.center_on", needed))
        problems += self._evaluation_problems()
        has_model = self.reward or self.run.parents.reward
        if self.ppo and self.ppo.needs_reward_stage and not has_model:
            needed = "needs a reward section, run.parents.reward, or a function as ppo.reward"
            problems.append(("ppo.reward", needed))
        return problems + (self._ppo_problems(self.ppo) if self.ppo else [])

    def _evaluation_problems(self) -> list[tuple[str, str]]:
        """Return why the evaluation could not run, or would never read its benchmark."""
        problems = []
        if self.evaluate and not (self.sft or self.run.parents.sft):
            needed = "compares with sft: needs an sft section or run.parents.sft"
            problems.append(("evaluate", needed))
        if self.data.benchmark and not self.evaluate:
            needed = "is read by the evaluate stage alone: needs an evaluate section"
            problems.append(("data.benchmark", f"{needed}; allowed without one: {{}}"))
        has_model = self.reward or self.run.parents.reward
        scores = has_model and not (self.reward and self.reward.labels)
        if self.data.benchmark and not scores:
            needed = (
                "tests a reward model: needs a reward section, with a loss of pairs or listwise"
            )
            problems.append(("data.benchmark", f"{needed}, or run.parents.reward"))
        return problems

    def _adapter_problems(self) -> list[tuple[str, str]]:
        adapter, base = self.adapter, self.base
        made = self.pretrain if base.id == "pretrain" else None
        problems = adapter.problems_with_base(
            base.dtype, base.quantization, base.gradient_checkpointing
        )
        if self.reward:
            problems += self.reward.problems_with_adapter(adapter.method)
        if self.ppo:
            problems += adapter.problems_in_ppo(self.ppo.layout, self.ppo.value.layout)
        if adapter.method == "prefix" and self.sft and self.sft.packing:
            needed = (
                "puts several rows behind one prefix; allowed with adapter.method=prefix: false"
            )
            problems.append(("sft.packing", needed))
        if adapter.method == "prefix" and self.evaluate:
            needed = "has no pass with the prefixes of adapter.method=prefix; drop the section"
            problems.append(("evaluate", needed))
        if adapter.method == "bitfit" and made and made.objective == "causal":
            needed = "trains biases, and the Llama of the pretrain stage has none"
            problems.append(("adapter.method", f"{needed}; allowed for it: another method"))
        count = (adapter.top_layers or 0) if adapter.method == "top_layers" else 0
        if made and count > made.model.num_layers:
            needed = f"the base has {made.model.num_layers} layers; allowed: at most so many"
            problems.append(("adapter.top_layers", needed))
        return problems

    def _ppo_problems(self, ppo: Ppo) -> list[tuple[str, str]]:
        problems = []
        if ppo.own_models and self.base.quantization != "none":
            key = "ppo.layout" if ppo.layout == "separate" else "ppo.value.layout"
            quantization = f"base.quantization={self.base.quantization}"
            needed = f"trains all weights, and those of {quantization} have no gradient"
            problems.append((key, f"{needed}; allowed with it: shared"))
        if ppo.ptx and getattr(self.data, ppo.ptx.source) is None:
            problems.append(("ppo.ptx.source", f"needs a section data.{ppo.ptx.source}"))
        problems += self._scoring_problems(ppo)
        if self.data.prompts and not self.data.prompts.heldout:
            needed = "is decided by held-out prompts: needs data.prompts.heldout"
            if ppo.keep == "best":
                problems.append(("ppo.keep", needed))
            if ppo.stop.divergence is not None:
                problems.append(("ppo.stop.divergence", needed))
        made = self.pretrain if self.base.id == "pretrain" else None
        positions = made.model.max_positions if made else None
        tokens = self.data.max_prompt_tokens + ppo.max_new_tokens
        if positions is not None and tokens > positions:
            budget = f"with data.max_prompt_tokens={self.data.max_prompt_tokens} exceeds the base's"
            allowed = f"positions; allowed: both together at most {positions}"
            problems.append(("ppo.max_new_tokens", f"{budget} {positions} {allowed}"))
        return problems

    def _scoring_problems(self, ppo: Ppo) -> list[tuple[str, str]]:
        """Return what is wrong with the reward models that PPO names."""
        problems = []
        if self.reward:
            sources = [("ppo.reward", source) for source in ppo.reward_sources]
            if ppo.heldout_reward == "reward":
                sources.append(("ppo.heldout_reward", RewardSource(model="reward")))
            own = [(key, source) for key, source in sources if "reward" in source.models]
            found = [(key, source.label_problem(self.reward.labels, None)) for key, source in own]
            problems += [(key, problem) for key, problem in found if problem]
        members = self.reward.members if self.reward else 1
        if members == 1 and any(source.ensemble == "reward" for source in ppo.reward_sources):
            needed = "ensemble: reward needs reward.members of 2 or more; allowed without: model"
            problems.append(("ppo.reward", needed))
        if ppo.heldout_reward == "reward" and not (self.reward or self.run.parents.reward):
            needed = "needs a reward section or run.parents.reward"
            problems.append(("ppo.heldout_reward", needed))
        return problems
