"""The head of a reward model or classifier: always float32, and never drawn anew once saved.

It is one linear map, as transformers' classifiers of decoders have it, or several with a GELU
between two: maps without biases. Of several, the first lies where transformers and PEFT look for
the only one: its shape is another, so that without this module they refuse the model instead of
drawing a head.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from align.adapters import WEIGHTS, is_adapter
from reward.calibrate import RewardModelError, read_calibration, read_labels, read_widths

# Where the head of an adapter that wraps the model lies, of a prefix, and of a whole model.
_PLACES = ("base_model.model.score.", "base_model.score.", "score.")
HEAD_KEY = f"{_PLACES[0]}weight"


class DeepLinear(nn.Module):
    """Several linear maps in turn, which stand where a classifier of transformers has one."""

    def __init__(self, in_features: int, out_features: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight, self.deeper = _empty_maps(in_features, out_features, widths)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., H]`` float32 to ``[..., C]``."""
        return _mapped(hidden, self.weight, self.deeper)


def score_maps(
    in_features: int, out_features: int, widths: Sequence[int]
) -> "nn.Linear | DeepLinear":
    """Return what a classifier of ours has as ``score``, in float32 and not yet drawn."""
    if widths:
        return DeepLinear(in_features, out_features, widths)
    return nn.Linear(in_features, out_features, bias=False, dtype=torch.float32)


def widths_of(score: nn.Module | None) -> tuple[int, ...]:
    """Return the widths between the maps of a ``score``; () for one map."""
    deeper = score.deeper if isinstance(score, DeepLinear | ScoreHead) else ()
    return tuple(weight.shape[1] for weight in deeper)


def _empty_maps(
    in_features: int, out_features: int, widths: Sequence[int]
) -> tuple[nn.Parameter, nn.ParameterList]:
    first, *others = pairwise((in_features, *widths, out_features))
    return (
        nn.Parameter(torch.zeros(first[1], first[0], dtype=torch.float32)),
        nn.ParameterList([torch.zeros(b, a, dtype=torch.float32) for a, b in others]),
    )


def _mapped(hidden: Tensor, weight: Tensor, deeper: Iterable[Tensor]) -> Tensor:
    hidden = F.linear(hidden, weight)
    for following in deeper:
        hidden = F.linear(F.gelu(hidden), following)
    return hidden


class ScoreHead(nn.Module):
    """A map from a hidden state to one score: ``(map(hidden) - shift) / scale``.

        map(h) = weight . h                                    with ``widths`` ()
        map(h) = deeper[n] . gelu(... deeper[0] . gelu(weight . h))

    A classifier's maps to a logit for each of its labels.

    Always float32, also when the model around it is cast to another dtype or runs under autocast:
    in bfloat16 scores near 1 move in steps of 1/128.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, num_scores: int = 1, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.weight, self.deeper = _empty_maps(hidden_size, num_scores, widths)
        self.register_buffer("shift", torch.zeros((), dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., H]`` of any dtype to float32 scores ``[...]``, or logits ``[..., C]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = _mapped(hidden.float(), self.weight, self.deeper).squeeze(-1)
        return (raw - self.shift) / self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScoreHead":
        # Follow to another device, never to another dtype.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


@torch.no_grad()
def draw_maps(score: nn.Module, seed: int) -> None:
    """Draw a head's first weights ``[C, H]``: normal with standard deviation 1 / sqrt(H + 1).

    As in the code of Stiennon et al. 2020 and in Huang et al. 2024, detail 11. From a generator of
    its own: the draw depends on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in score.parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.copy_(drawn / math.sqrt(weight.shape[1] + 1))


def load_score_head(folder: str | Path) -> ScoreHead:
    """Read the score head of a saved reward model.

    Raises:
        RewardModelError: a tensor of the head or ``score.json`` is missing or malformed. A head is
            never initialised anew: its scores would look plausible and mean nothing.
    """
    folder = Path(folder)
    weights = _head_weights(folder)
    shift, scale = read_calibration(folder)
    scores = len(read_labels(folder)) or 1
    head = ScoreHead(weights[0].shape[1], scores, read_widths(folder))
    maps = [head.weight, *head.deeper]
    if [w.shape for w in weights] != [w.shape for w in maps]:
        found, told = (", ".join(f"{len(w)} x {w.shape[1]}" for w in ws) for ws in (weights, maps))
        found = f"its score head is {found}, and score.json tells of {told} (scores x states)"
        raise RewardModelError(f"{folder}: {found}; run the reward stage again")
    with torch.no_grad():
        for weight, ours in zip(weights, maps, strict=True):
            ours.copy_(weight)
        head.shift.fill_(shift)
        head.scale.fill_(scale)
    return head


def _head_weights(folder: Path) -> list[Tensor]:
    """Return the head's maps in their order, as far as the files have them."""
    # A large whole model comes in several files.
    files = [] if is_adapter(folder) else sorted(folder.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for path in files or [folder / WEIGHTS]:
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(_PLACES)]  # noqa: SIM118
                found |= {name.rpartition("score.")[2]: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise RewardModelError(
                f"{path}: cannot be read: {error}; run the reward stage"
            ) from None
    if "weight" not in found:
        raise RewardModelError(
            f"{path}: no tensor {HEAD_KEY}: the score head was not saved here;"
            " run the reward stage again"
        )
    first, others = found.pop("weight"), sorted(found, key=lambda name: (len(name), name))
    weights = [first, *(found[name] for name in others)]
    for weight in weights:
        if weight.ndim != 2 or weight.dtype != torch.float32:
            raise RewardModelError(
                f"{path}: {HEAD_KEY} is {tuple(weight.shape)} {weight.dtype};"
                " one float32 row (hidden_size) for every score is needed"
            )
    return weights
