"""Weights & Biases, as a guest: it never asks, never blocks, and never ends a training run."""

import netrc
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from align.recipe import Recipe, StageName

# A recipe has no place for secrets; this keeps one out that came in as a free name.
_SECRET_WORDS = {"key", "apikey", "token", "secret", "password"}
Mode = Literal["online", "offline", "disabled"]

_INIT_TIMEOUT = 20.0  # seconds until a run without a network goes on offline
_FINISH_TIMEOUT = 60.0  # seconds for the last upload; what is missing then is still on disk


class WandbTracker:
    """One W&B run. After the first failure it is silent; ``metrics.jsonl`` has everything."""

    def __init__(self, run: Any) -> None:
        """Wrap a started ``wandb.Run``, or None for no tracking."""
        self._run = run
        self.id: str | None = run.id if run is not None else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values of one step."""
        self._try(lambda run: run.log(dict(values), step=step))

    def finish(self, exit_code: int) -> None:
        """End the run; 0 marks it as finished, anything else as failed."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # a guest's failure must not end the training it watches
            self._run = None
            _warn(f"tracking stopped: {type(error).__name__}: {error}")


def start_tracker(
    recipe: Recipe, stage: StageName, directory: Path, run_id: str | None = None
) -> WandbTracker:
    """Start a W&B run for one stage; runs of one recipe share a group.

    Args:
        directory: the run directory; files go to ``directory/wandb``.
        run_id: of the run to continue, None for a new one. Offline each part has a folder of its
            own; they become one run where they are synchronised.

    Returns:
        A tracker; one that does nothing if tracking is off or cannot be started.
    """
    mode = _mode(recipe)
    if mode == "disabled":
        return WandbTracker(None)
    try:
        import wandb
    except ImportError as error:
        _warn(f"tracking is off: wandb cannot be imported ({error}); pip install wandb")
        return WandbTracker(None)
    directory.mkdir(parents=True, exist_ok=True)
    attempts: tuple[Mode, ...] = (mode,) if mode == "offline" else (mode, "offline")
    for attempt in attempts:
        try:
            run = wandb.init(
                project=recipe.tracking.project,
                entity=recipe.tracking.entity,
                group=recipe.name,
                name=f"{recipe.name}/{stage}",
                job_type=stage,
                dir=str(directory),
                config=without_secrets(recipe.model_dump(mode="json")),
                mode=attempt,
                id=run_id,
                resume="allow" if run_id is not None else None,
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    save_code=False,
                    init_timeout=_INIT_TIMEOUT,
                    finish_timeout=_FINISH_TIMEOUT,
                ),
            )
            return WandbTracker(run)
        except Exception as error:  # as above: any failure only costs the tracking
            _warn(f"tracking: {attempt} did not start: {type(error).__name__}: {error}")
    return WandbTracker(None)


def without_secrets(value: Any) -> Any:
    """Return a copy without the entries whose name has a word such as key, token or password."""
    if isinstance(value, dict):
        return {
            key: without_secrets(item)
            for key, item in value.items()
            if not _SECRET_WORDS & set(re.split(r"[^a-z]+", str(key).lower()))
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value


def _mode(recipe: Recipe) -> Mode:
    """Return the mode to start in. WANDB_MODE wins; online without a key becomes offline."""
    mode = os.environ.get("WANDB_MODE") or recipe.tracking.mode
    if recipe.tracking.mode == "disabled":
        return "disabled"
    if mode in ("auto", "online", "shared"):
        if _has_key():
            return "online"
        if mode != "auto":  # wandb would ask for one on a terminal
            _warn("tracking: no W&B key (WANDB_API_KEY or `wandb login`); going on offline")
        return "offline"
    return "disabled" if mode == "disabled" else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _warn(text: str) -> None:
    print(text, file=sys.stderr)
