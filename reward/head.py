"""The head of a reward model or classifier: always float32, and never drawn anew once saved."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from align.adapters import WEIGHTS, is_adapter
from reward.calibrate import RewardModelError, read_calibration, read_labels

HEAD_KEY = "base_model.model.score.weight"
# The head of an adapter that wraps the model, of a prefix, and of a whole model.
_HEAD_KEYS = (HEAD_KEY, "base_model.score.weight", "score.weight")


class ScoreHead(nn.Module):
    """A linear map from a hidden state to one score: ``(weight . hidden - shift) / scale``.

    A classifier's maps to a logit for each of its labels.

    Always float32, also when the model around it is cast to another dtype or runs under autocast:
    in bfloat16 scores near 1 move in steps of 1/128.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, num_scores: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_scores, hidden_size, dtype=torch.float32))
        self.register_buffer("shift", torch.zeros((), dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., H]`` of any dtype to float32 scores ``[...]``, or logits ``[..., C]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = F.linear(hidden.float(), self.weight).squeeze(-1)
        return (raw - self.shift) / self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScoreHead":
        # Follow to another device, never to another dtype.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


def new_score_weight(hidden_size: int, seed: int, num_scores: int = 1) -> Tensor:
    """Draw a head's first weight ``[C, H]``: normal with standard deviation 1 / sqrt(H + 1).

    As in the code of Stiennon et al. 2020 and in Huang et al. 2024, detail 11. From a generator of
    its own: the draw depends on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_scores, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def load_score_head(folder: str | Path) -> ScoreHead:
    """Read the score head of a saved reward model.

    Raises:
        RewardModelError: the head's tensor or ``score.json`` is missing or malformed. A head is
            never initialised anew: its scores would look plausible and mean nothing.
    """
    folder = Path(folder)
    weight = _head_weight(folder)
    shift, scale = read_calibration(folder)
    scores = len(read_labels(folder)) or 1
    if len(weight) != scores:
        found = f"its score head has {len(weight)} rows, and score.json tells of {scores}"
        raise RewardModelError(f"{folder}: {found}; run the reward stage again")
    head = ScoreHead(weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.shift.fill_(shift)
        head.scale.fill_(scale)
    return head


def _head_weight(folder: Path) -> Tensor:
    # A large whole model comes in several files.
    files = [] if is_adapter(folder) else sorted(folder.glob("*.safetensors"))
    found: list[Tensor] = []
    for path in files or [folder / WEIGHTS]:
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                found += [file.get_tensor(name) for name in _HEAD_KEYS if name in names]
        except (OSError, SafetensorError) as error:
            raise RewardModelError(
                f"{path}: cannot be read: {error}; run the reward stage"
            ) from None
    if not found:
        raise RewardModelError(
            f"{path}: no tensor {HEAD_KEY}: the score head was not saved here;"
            " run the reward stage again"
        )
    weight = found[0]
    if weight.ndim != 2 or weight.dtype != torch.float32:
        raise RewardModelError(
            f"{path}: {HEAD_KEY} is {tuple(weight.shape)} {weight.dtype};"
            " one float32 row (hidden_size) for every score is needed"
        )
    return weight
