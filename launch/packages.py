"""Where our packages lie, and the check that Python finds them there."""

import importlib.util
from pathlib import Path

import align
from align.errors import InputError

ROOT = Path(align.__file__).resolve().parent.parent
_NAMES = ("data", "launch", "pipelines", "reward")


def strangers() -> dict[str, str]:
    """Return the packages of ours that Python finds elsewhere: name -> where, or "nowhere"."""
    found = {}
    for name in _NAMES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            found[name] = "nowhere"
        elif Path(spec.origin).resolve().parent != ROOT / name:
            found[name] = spec.origin
    return found


def check_packages() -> None:
    """Refuse to work with somebody else's ``data`` or ``reward``.

    Raises:
        InputError: names what was found and what was expected.
    """
    for name, where in strangers().items():
        raise InputError(
            f"`import {name}` finds {where}, not {ROOT / name}; install Align in an environment of"
            " its own, and take the other one off PYTHONPATH"
        )
