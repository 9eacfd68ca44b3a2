"""What a recipe may say about the run itself: where results go, and how often they are secured."""

from pydantic import model_validator

from align.recipe_types import NotNegative, Positive, PositiveFloat, Section, refuse


class Parents(Section):
    """Finished stages of other runs to build on: the folder that holds ``stage.json``."""

    pretrain: str | None = None
    sft: str | None = None
    reward: str | None = None


class Run(Section):
    """Where results go, on how many threads they are computed, and how often they are secured."""

    root: str = "runs"
    parents: Parents = Parents()
    threads: Positive | None = None  # torch threads; null: torch decides. Results depend on it.
    # Of a stage in training; they are removed when it ends. 0: none are written.
    keep_checkpoints: NotNegative = 2
    # How often; both null: every minute, or less often, so that it takes at most 2 % of the time.
    checkpoint_steps: Positive | None = None
    checkpoint_minutes: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> "Run":
        keys = ("checkpoint_steps", "checkpoint_minutes")
        given = [key for key in keys if getattr(self, key) is not None]
        if len(given) == 2:
            refuse(
                "checkpoint_minutes",
                f"checkpoint_steps={self.checkpoint_steps} says how often already; allowed: one of"
                " the two",
            )
        if given and not self.keep_checkpoints:
            refuse(given[0], "keep_checkpoints=0 writes none; allowed with it: null")
        return self
