"""Results in words and columns, for people; with --json the command prints them as they are."""

import json
import math
from typing import Any

from align.errors import printable

MODELS = ("base", "sft", "reward", "ppo")


def by_model(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """Group ``{"ppo/kl/mean": 1.0}`` into ``{"ppo": {"kl/mean": 1.0}}``."""
    result: dict[str, dict[str, float]] = {model: {} for model in MODELS}
    for key, value in metrics.items():
        model, _, name = key.partition("/")
        result.setdefault(model, {})[name] = value
    return {model: values for model, values in result.items() if values}


def print_table(metrics: dict[str, dict[str, float]]) -> None:
    """Print a column per model."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    shown = [printable(name) for name in names]  # the data names categories
    width = max(map(len, shown), default=0)
    print(" " * width + "".join(f"{model:>12}" for model in metrics))
    for name, label in zip(names, shown, strict=True):
        cells = (f"{v[name]:12.4g}" if name in v else " " * 12 for v in metrics.values())
        print(f"{label:{width}}{''.join(cells)}".rstrip())


def readable(value: Any) -> str:
    """Return a value as a line of text."""
    if isinstance(value, list):
        return "; ".join(", ".join(map(str, part.values())) for part in value) or "none"
    return "none" if value is None else str(value)


def print_json(value: Any) -> None:
    """Print a result as one JSON object."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """Put null for NaN and infinities, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
