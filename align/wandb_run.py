"""A Weights & Biases run of a stage: online with a key, else offline; it never asks."""

import json
import netrc
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from align.manifest import METRICS, SAMPLES
from align.recipe import Recipe, StageName

# A recipe has no place for secrets; this keeps one out that came in as a free name.
_SECRET_WORDS = {"key", "apikey", "token", "secret", "password"}
Mode = Literal["online", "offline", "disabled"]

_CURVE = ("step", "kl/mean", "score/mean")  # of PPO's steps; the last two are the chart's axes

_INIT_TIMEOUT = 20.0  # seconds until a run without a network goes on offline
_FINISH_TIMEOUT = 60.0  # seconds for the last upload; what is missing then is still on disk


class WandbRun:
    """A started ``wandb.Run``, as ``align.tracking`` uses it."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._first: int = run.starting_step  # W&B has those before from an earlier process
        self.id: str = run.id
        # Online a kill takes with it what has not been sent. Offline every part has its own steps.
        self.behind: bool = run.resumed

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values of one step, unless the run that is gone on with has it."""
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def record(self, manifest: dict[str, Any], folder: Path) -> None:
        """Add what a finished stage leaves: its manifest, and tables of what its files hold.

        The manifest goes beside the recipe in the run's configuration. The tables are of all the
        samples and, after PPO, of the reward at every KL to the reference, which makes a chart.
        """
        import wandb

        self._run.config.update({"manifest": without_secrets(manifest)})
        tables: dict[str, Any] = {}
        if samples := [_cells(row) for row in _rows(folder / SAMPLES)]:
            columns = list(dict.fromkeys(key for row in samples for key in row))
            data = [[row.get(column) for column in columns] for row in samples]
            tables["samples"] = wandb.Table([*columns], data, allow_mixed_types=True)
        if steps := [row for row in _rows(folder / METRICS) if set(_CURVE) <= set(row)]:
            curve = wandb.Table(list(_CURVE), [[row[key] for key in _CURVE] for row in steps])
            title = "reward over KL to the reference"
            tables["reward_kl"] = wandb.plot.scatter(curve, *_CURVE[1:], title=title)
        if tables:
            self._run.log(tables)  # of the last step that was logged

    def finish(self, exit_code: int) -> None:
        """End the run; 0 marks it as finished, anything else as failed."""
        self._run.finish(exit_code=exit_code)


def start_wandb(
    recipe: Recipe, stage: StageName, directory: Path, run_id: str | None
) -> WandbRun | None:
    """Start a run for one stage; runs of one recipe share a group.

    Args:
        directory: the run directory; files go to ``directory/wandb``.
        run_id: of the run to continue, None for a new one. Offline each part has a folder of its
            own; they become one run where they are synchronised.

    Returns:
        None where WANDB_MODE turns it off.

    Raises:
        ImportError: wandb is not installed.
        Exception: whatever wandb raises where no run can be started, offline either.
    """
    mode = _mode(recipe)
    if mode == "disabled":
        return None
    # Telemetry of the client's own: a server that does not answer holds the process up at its end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Tables wait there for their upload; else below the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))
    import wandb

    def start(mode: Mode) -> WandbRun:
        run = wandb.init(
            project=recipe.tracking.project,
            entity=recipe.tracking.entity,
            group=recipe.tracking.group or recipe.name,
            name=f"{recipe.name}/{stage}",
            job_type=stage,
            dir=str(directory),
            config=without_secrets(recipe.model_dump(mode="json")),
            mode=mode,
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
        return WandbRun(run)

    if mode == "online":
        try:
            return start("online")
        except Exception as error:  # no network, a key that is refused, ...
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            _warn(f"tracking: W&B did not start online ({reason}); going on offline")
    return start("offline")


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


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines; none if it is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return a sample as cells of a table: conversations as text, what is nested under its path."""
    cells: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{key}/{inner}": cell for inner, cell in _cells(value).items()}
        elif isinstance(value, list):
            cells[key] = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
        else:
            cells[key] = value
    return cells


def _mode(recipe: Recipe) -> Mode:
    """Return the mode to start in. WANDB_MODE wins; online without a key becomes offline."""
    mode = os.environ.get("WANDB_MODE") or recipe.tracking.mode
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
