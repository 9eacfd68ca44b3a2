"""What a recipe may say about PPO: the reward, the KL penalty, the critic, and when to stop."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from align.recipe_reward import Reads
from align.recipe_types import (
    FiniteFloat,
    Fraction,
    FunctionName,
    NotNegative,
    NotNegativeFloat,
    Optimisation,
    Positive,
    PositiveFloat,
    Section,
    Strings,
    check_divides,
    check_exactly_one,
    refuse,
)

RewardModelPath = Annotated[
    str,
    Field(
        min_length=1,
        description="`reward`: this recipe's reward stage; else the folder of a finished one",
    ),
]


# Told apart by their form, so that a mistake inside a list is reported as that, and once.
Members = Annotated[
    Annotated[Literal["reward"], Tag("name")] | Annotated[Strings, Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "name"),
]


class RewardSource(Section):
    """One part of the reward: exactly one of ``model``, ``ensemble`` and ``function``.

    ``ensemble: reward`` are all members that this recipe's reward stage makes (``reward.members``).
    """

    model: RewardModelPath | None = None
    label: str | None = None  # of a classifier: the class whose probability is the score
    ensemble: Members | None = None  # several reward models
    # The mean of their scores, less penalties on what they dispute; or the lowest of them.
    combine: Literal["mean", "minimum"] = "mean"
    std_penalty: NotNegativeFloat = 0.0
    variance_penalty: NotNegativeFloat = 0.0
    function: FunctionName | None = None
    weight: FiniteFloat = 1.0

    @model_validator(mode="after")
    def _check(self) -> "RewardSource":
        check_exactly_one(self, ("model", "ensemble", "function"))
        if isinstance(self.ensemble, tuple) and len(self.ensemble) < 2:
            refuse("ensemble", "names one model; allowed: two or more, or `model` for one")
        if self.label is not None and self.model is None:
            refuse("label", "is a class of one model; allowed: with model")
        for key, off in (("combine", "mean"), ("std_penalty", 0), ("variance_penalty", 0)):
            if getattr(self, key) != off and self.ensemble is None:
                refuse(key, f"needs an ensemble; allowed without one: {off}")
        penalties = [k for k in ("std_penalty", "variance_penalty") if getattr(self, k)]
        if penalties and self.combine == "minimum":
            refuse(penalties[0], "is of the mean; allowed with combine=minimum: 0")
        if len(penalties) > 1:
            refuse("variance_penalty", "std_penalty is given as well; allowed: one of the two")
        return self

    def label_problem(self, labels: Sequence[str], reads: Reads | None) -> str | None:
        """Say why a model of this part cannot score as the part says; None if it can.

        Args:
            labels: the model's classes; of a reward model none.
            reads: what a classifier reads, where that is known.
        """
        if not labels:
            return f"label={self.label}: the model is no classifier" if self.label else None
        if self.ensemble is not None:
            return "a classifier has no place in an ensemble; allowed: reward models"
        if self.label not in labels:
            found = f"found {self.label!r}" if self.label else "the model is a classifier"
            source = f"{{model: {self.model}, label: {' or '.join(labels)}}}"
            return f"{found}; allowed: a reward model, or as a part of ppo.reward {source}"
        if reads == "pair":
            return "the classifier reads pairs of texts; allowed: one of responses, or of texts"
        return None

    @property
    def models(self) -> tuple[str, ...]:
        """The reward models this part scores with; see ``align.inputs`` for an own ensemble's."""
        name = self.model or self.ensemble
        return (name,) if isinstance(name, str) else name or ()


RewardSources = Annotated[tuple[RewardSource, ...], Field(strict=False, min_length=1)]
# Told apart by their form, so that a mistake inside a list is reported as that, and once.
Reward = Annotated[
    Annotated[Literal["model"] | FunctionName, Tag("name")] | Annotated[RewardSources, Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "name"),
]


class Rollout(Section):
    """How responses are sampled and run through the models."""

    # "native": a key-value cache filled in place, batches without padding, log-probabilities in
    # chunks. "hf": generate of transformers, padded batches and whole logits: slow, for comparison.
    engine: Literal["native", "hf"] = "native"
    batch_size: Positive | None = None  # prompts sampled at a time; null: all of a rollout


class Kl(Section):
    """The penalty that ties the policy to the SFT model; KL in nats per response."""

    coef: NotNegativeFloat = 0.05  # weight in the reward
    loss_coef: NotNegativeFloat = 0.0  # weight in the loss instead; never both
    # log p/q, half its square, or q/p - 1 - log q/p (Schulman 2020).
    estimator: Literal["k1", "k2", "k3"] = "k1"
    target: PositiveFloat | None = None  # given: the coefficient adapts to it (Ziegler et al.)
    horizon: Positive = 10_000  # responses over which the coefficient moves by at most 20 %
    stop: PositiveFloat | None = None  # end training when a rollout's mean KL exceeds this

    @model_validator(mode="after")
    def _check(self) -> "Kl":
        if self.coef > 0 and self.loss_coef > 0:
            refuse(
                "loss_coef",
                f"the KL would count twice, in the reward (coef={self.coef}) and in the loss;"
                " allowed: one of coef and loss_coef above 0",
            )
        if self.loss_coef > 0 and self.estimator == "k1":
            refuse(
                "estimator",
                "k1 in the loss has a gradient of mean 0, no pull to the reference; allowed with"
                " loss_coef: k2, k3",
            )
        if self.target is not None and self.coef == 0 and self.loss_coef == 0:
            refuse("target", "adapts a coefficient that is 0; allowed: coef or loss_coef above 0")
        return self


class MissingEos(Section):
    """What becomes of the score of a response that did not end within max_new_tokens."""

    mode: Literal["subtract", "replace"]
    value: FiniteFloat


class RewardScaling(Section):
    """Scores brought to mean 0 and spread 1 before anything else is done with them."""

    # "sft": by the first rollout, which the SFT model sampled, frozen. "running": by all so far.
    mode: Literal["none", "sft", "running"] = "none"
    clip: PositiveFloat | None = None  # scores are cut to [-clip, clip], after scaling


Layout = Literal["shared", "separate"]


class Value(Section):
    """The critic."""

    # "own": its own adapter (or model), which starts from this recipe's reward model where PPO
    # maximises that, else from SFT. "policy": a head on the policy's hidden states, from 0; one
    # pass over the base serves both.
    trunk: Literal["own", "policy"] = "own"
    warmup_steps: NotNegative = 0  # first rollouts that train the critic only
    layout: Layout | None = None  # null: that of ppo.layout


class Ptx(Section):
    """Language modelling mixed into the policy's loss (Ouyang et al. 2022, equation 2)."""

    coef: PositiveFloat
    source: Literal["sft", "pretrain"] = "sft"
    batch_size: Positive = 8  # rows per optimiser step


class Stop(Section):
    """When training ends early, besides ``kl.stop``; rates are shares of a rollout's responses."""

    repetitive_rate: Fraction | None = None
    empty_rate: Fraction | None = None
    # How far the held-out reward may fall below its best while the trained reward still rises.
    divergence: PositiveFloat | None = None


class Ppo(Optimisation):
    """PPO against the reward. ``batch_size`` counts responses per rollout."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # "model": the reward stage's; a Python function, "module:function" or "file.py:function"; or a
    # list of weighted sources.
    reward: Reward = "model"
    heldout_reward: FunctionName | RewardModelPath | None = None  # looked at, never trained on
    reward_scaling: RewardScaling = RewardScaling()
    steps: Positive  # rollouts
    minibatch_size: Positive  # responses per optimiser step
    # Tokens per forward pass of the update; the gradients do not depend on it. Memory does.
    max_tokens_per_microbatch: Positive | None = None
    epochs: Positive = 4
    value_lr: PositiveFloat | None = None  # null: lr
    max_new_tokens: Positive
    temperature: PositiveFloat = 1.0
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    clip: PositiveFloat = 0.2
    # Where the advantage is negative, the ratio counts at most so often (Ye et al. 2020).
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    value_clip: PositiveFloat | None = 0.2  # null: no clipping
    value_coef: NotNegativeFloat = 0.1
    entropy_coef: NotNegativeFloat = 0.0
    kl: Kl = Kl()
    missing_eos: MissingEos | None = None
    # The value after a response that ran into the limit stands for what would have followed.
    bootstrap_truncated: bool = False
    ptx: Ptx | None = None
    # Weight of the past in the moving average of the policy, which is saved in its place.
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    value: Value = Value()
    rollout: Rollout = Rollout()
    probe_every: Positive = 10  # rollouts between two looks at the held-out probe prompts
    probe_prompts: Positive = 64
    keep: Literal["best", "last"] = "last"  # best: by reward less KL penalty on the probe prompts
    stop: Stop = Stop()
    # "shared": adapters on one base are trained. "separate": all weights of models of their own.
    layout: Layout = "shared"

    @model_validator(mode="after")
    def _check(self) -> "Ppo":
        check_divides("minibatch_size", self.minibatch_size, "batch_size", self.batch_size)
        if self.micro_batch_size is not None:
            check_divides(
                "micro_batch_size", self.micro_batch_size, "minibatch_size", self.minibatch_size
            )
            if self.max_tokens_per_microbatch is not None:
                refuse(
                    "max_tokens_per_microbatch",
                    f"micro_batch_size={self.micro_batch_size} says how batches are cut already;"
                    " allowed: one of the two",
                )
        if self.bootstrap_truncated and self.missing_eos is not None:
            refuse(
                "bootstrap_truncated",
                "missing_eos treats a response at the limit as finished and bad, this as"
                " unfinished; allowed: one of the two",
            )
        if self.ema is not None and self.keep == "best":
            refuse("keep", "ema saves the average of all policies; allowed with it: last")
        if self.stop.divergence is not None and self.heldout_reward is None:
            refuse("stop.divergence", "needs ppo.heldout_reward to compare with")
        trained = {name for s in self.reward_sources for name in (*s.models, s.function)}
        if self.heldout_reward is not None and self.heldout_reward in trained:
            refuse("heldout_reward", "is trained on as well (ppo.reward); name one that is not")
        if self.value.layout is not None and self.value.trunk == "policy":
            refuse(
                "value.layout",
                "value.trunk=policy is a head on the policy's states; allowed with it: null",
            )
        if self.value.warmup_steps >= self.steps:
            refuse("value.warmup_steps", f"leaves no step of steps={self.steps} for the policy")
        return self

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        """``reward`` written as a list of sources."""
        if isinstance(self.reward, tuple):
            return self.reward
        if self.reward == "model":
            return (RewardSource(model="reward"),)
        return (RewardSource(function=self.reward),)

    @property
    def own_models(self) -> tuple[str, ...]:
        """The trained roles that have a model of their own."""
        critic = self.value.layout or self.layout if self.value.trunk == "own" else "shared"
        layouts = {"policy": self.layout, "value": critic}
        return tuple(role for role, layout in layouts.items() if layout == "separate")

    @property
    def selected_on(self) -> int:
        """How many of the first held-out prompts decide about the policy that is kept."""
        decides = self.keep == "best" or self.stop.divergence is not None
        return self.probe_prompts if decides else 0

    @property
    def needs_reward_stage(self) -> bool:
        """Whether a part of the reward is this recipe's own reward model."""
        return any("reward" in source.models for source in self.reward_sources)
