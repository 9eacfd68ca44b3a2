"""How fast this machine computes matrix products of a recipe's sizes, for ``align plan``.

    python -m pipelines.calibrate RECIPE [key=value ...] --matrix 4096x11008 --tokens 1024

Prints JSON: operations per second of whole passes, bytes per second of passes over one token.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence

import torch

from align.models import compute_device
from align.quantization import compute_dtype
from align.recipe_io import load_recipe
from pipelines.process import share_processors

_SECONDS = 4.0  # for each of the two measurements, and as long again before the first, to warm up


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.calibrate", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--matrix", required=True, metavar="INPUTSxOUTPUTS")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=_SECONDS)
    options = parser.parse_intermixed_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    device = compute_device()
    dtype = compute_dtype(recipe.base, device)
    inputs, outputs = map(int, options.matrix.split("x"))
    print(json.dumps(measure(device, dtype, inputs, outputs, options.tokens, options.seconds)))
    return 0


def measure(
    device: torch.device, dtype: torch.dtype, inputs: int, outputs: int, tokens: int, seconds: float
) -> dict[str, float | str]:
    """Return the speed of products with a matrix ``[outputs, inputs]``.

    Returns:
        ``flops``: operations per second with ``[tokens, inputs]``, two for each weight and token;
        ``bandwidth``: bytes of the weight per second with ``[1, inputs]``; ``device``: its name.
    """
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    many = torch.randn(tokens, inputs, device=device).to(dtype)
    repeat(lambda: many @ weight.T, seconds, device)
    each = repeat(lambda: many @ weight.T, seconds, device)
    one = repeat(lambda: many[:1] @ weight.T, seconds, device)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{name}, {str(dtype).removeprefix('torch.')}",
        "flops": 2 * tokens * weight.numel() / each,
        "bandwidth": weight.nbytes / one,
    }


def repeat(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return the mean seconds that ``work`` takes, over so many seconds, at least three times."""
    started, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - started < seconds:
        for _ in range(1 + count // 4):
            work()
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    share_processors()
    sys.exit(main())
