"""Which metrics of a stage the report draws, and what a reader should look for in each."""

from dataclasses import dataclass

from align.recipe import StageName


@dataclass(frozen=True, slots=True)
class Curve:
    """A chart of one stage: the metrics in it, and what a reader should look for."""

    title: str
    keys: tuple[tuple[str, str], ...]  # metric key -> its label, where there are several
    look_for: str
    share: bool = False
    only_if_it_varies: bool = False


_LOSS = Curve(
    "Loss",
    (("loss", ""),),
    "It should fall quickly, then slowly; a lasting rise means that the learning rate is too high.",
)
_GRADIENT = Curve(
    "Gradient norm",
    (("grad_norm", ""),),
    "Single spikes are clipped and harmless; steady growth comes before divergence.",
)
_SPEED = Curve(
    "Tokens per second",
    (("tokens_per_second", ""),),
    "A drop during training points at the machine, not at the model.",
)
CURVES: dict[StageName, tuple[Curve, ...]] = {
    "pretrain": (_LOSS, _GRADIENT, _SPEED),
    "sft": (_LOSS, _GRADIENT, _SPEED),
    "reward": (
        Curve(
            "Ranking loss",
            (("loss", ""),),
            "0.69 (ln 2) is guessing; near 0 within the first epoch it learns by heart.",
        ),
        Curve(
            "Accuracy on training pairs",
            (("accuracy", ""),),
            "Far above the held-out accuracy means that the model has learned pairs by heart.",
            share=True,
        ),
        _GRADIENT,
    ),
    "ppo": (
        Curve(
            "Reward score",
            (("score/mean", "rollouts"), ("probe/score", "held-out prompts")),
            "It should rise; on its own it does not say that answers get better.",
        ),
        Curve(
            "KL to SFT, nats per response",
            (("kl/mean", ""),),
            "It starts at 0; growth without a gain in gold calls for a higher KL coefficient.",
        ),
        Curve(
            "KL coefficient",
            (("kl/coef", ""),),
            "It rises while the KL is above its target and falls while it is below.",
            only_if_it_varies=True,
        ),
        Curve(
            "Entropy, nats per token",
            (("entropy", ""),),
            "A slow fall is normal; a fall to 0 means that all answers become the same.",
        ),
        Curve(
            "Answer length, tokens",
            (("length/mean", ""),),
            "Growth together with the score suggests that the reward model likes length.",
        ),
        Curve(
            "Answers that end by themselves",
            (("eos_rate", ""),),
            "A fall means that answers run into the length limit.",
            share=True,
        ),
        Curve(
            "Clip fraction",
            (("ppo/clip_fraction", ""),),
            "Usually a few per cent; above 30 % the steps are too large.",
            share=True,
        ),
        Curve(
            "Explained variance of the critic",
            (("ppo/explained_variance", ""),),
            "It should rise towards 1; at or below 0 the critic knows no more than the mean.",
        ),
        Curve(
            "Policy loss", (("ppo/policy_loss", ""),), "Small and noisy around 0; it need not fall."
        ),
        Curve(
            "Value loss",
            (("ppo/value_loss", ""),),
            "It should fall in the first rollouts and then stay low.",
        ),
        _GRADIENT,
        Curve(
            "Seconds per rollout",
            (("time/rollout", "sample"), ("time/score", "score"), ("time/update", "update")),
            "The largest part is where a faster setting pays.",
        ),
    ),
}
