"""Everything of a PPO run that changes from step to step: one thing to save and to go on from."""

from dataclasses import dataclass, field
from pathlib import Path

from align import group
from align.engine import Engine
from align.state import (
    copy_into,
    generators_state,
    load_state,
    own_state_name,
    save_state,
    set_generators_state,
)
from pipelines.policy_copies import KeptPolicy
from pipelines.shaping import ScoreScaler
from pipelines.stopping import Stopping
from pipelines.update import Updater


@dataclass
class PpoState:
    """Where training stands between two rollouts.

    Prompts and samples need no place: they are drawn by seed and step. Reference and reward models
    are frozen, and the probe always asks the same.
    """

    engine: Engine
    updater: Updater
    scaler: ScoreScaler
    stopping: Stopping
    kept: KeptPolicy
    kl_coef: float
    step: int = 0  # the last that is done
    metrics: dict[str, float] = field(default_factory=dict)  # its own

    def save(self, folder: Path) -> None:
        """Write all of it, and the random generators: a reward function may draw from them.

        The processes of a group differ in their generators, and in what is shared out.
        """
        own = {"generators": generators_state(), "engine": self.engine.share()}
        save_state(folder, own, own_state_name())
        if not group.is_first():
            return
        trained = enumerate(self.engine.parameters)
        save_state(
            folder,
            {
                "step": self.step,
                "metrics": self.metrics,
                "kl_coef": self.kl_coef,
                "parameters": {str(number): parameter for number, parameter in trained},
                "engine": self.engine.state(),
                "ptx_steps": self.updater.ptx_steps,
                "scaler": self.scaler.state(),
                "stopping": self.stopping.state(),
                "kept": self.kept.state(),
            },
        )

    def load(self, folder: Path) -> None:
        """Go on from what was saved."""
        state, own = load_state(folder), load_state(folder, own_state_name())
        self.step, self.metrics = state["step"], state["metrics"]
        self.kl_coef = state["kl_coef"]
        trained = enumerate(self.engine.parameters)
        copy_into({str(number): p for number, p in trained}, state["parameters"])
        self.engine.load(state["engine"], own["engine"])
        self.updater.ptx_steps = state["ptx_steps"]
        self.scaler.load(state["scaler"])
        self.stopping.load(state["stopping"])
        self.kept.load(state["kept"])
        set_generators_state(own["generators"])
