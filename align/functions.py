"""Python functions that a recipe names: ``module:function`` or ``file.py:function``."""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.errors import RecipeError

Chat = list[dict[str, str]]
# (prompts, responses) -> one number per response. A prompt is its messages as role/content dicts.
ScoreFunction = Callable[[Sequence[Chat], Sequence[str]], Sequence[float]]


def load_function(name: str) -> Callable[..., Any]:
    """Import the function that a recipe names.

    Args:
        name: ``"module:function"``, with modules also looked for in the working directory, or
            ``"path/to/file.py:function"``.

    Raises:
        RecipeError: there is no such module, file or function, or importing it fails.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            module = _load_file(Path(place))
        else:
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # last, so that it can hide nothing
            module = importlib.import_module(place)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{name}: importing it fails: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RecipeError(f"{name}: {place} has no function named {attribute}")
    checked: Callable[..., Any] = function
    return checked


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    # One module per file, however often it is named; under a name that no other can have.
    name = f"{path.stem} in {path.resolve().parent}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def call_score_function(
    function: ScoreFunction, name: str, prompts: Sequence[Chat], responses: Sequence[str]
) -> list[float]:
    """Call a score function and check what it returns.

    Raises:
        RecipeError: it raises, or does not return one finite number per response.
    """
    try:
        scores = [float(score) for score in function(prompts, responses)]
    except Exception as error:
        raise RecipeError(f"{name}: fails with {type(error).__name__}: {error}") from error
    if len(scores) != len(responses):
        raise RecipeError(f"{name}: returned {len(scores)} scores for {len(responses)} responses")
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise RecipeError(f"{name}: score {i} is {score}; it has to be a finite number")
    return scores
