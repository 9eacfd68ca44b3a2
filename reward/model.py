"""The reward model: a sequence classifier's backbone with one fp32 score per response.

The score is read at the last real token, found by the attention mask. transformers' own pooling
looks for the last id that is not the pad id instead: with an end-of-turn id that equals the pad id,
or with an adapter whose base knows no pad id, it reads another token and says nothing.

What is saved is what PEFT writes for a SEQ_CLS adapter (``adapter_model.safetensors`` with the head
in it) and ``score.json`` with the shift and scale that turn raw scores into the model's scores.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from align.errors import AlignError

ADAPTER_FILE = "adapter_model.safetensors"
SCORE_FILE = "score.json"
HEAD_KEY = "base_model.model.score.weight"


class RewardModelError(AlignError):
    """A saved reward model is incomplete or not what its files say."""


def last_hidden(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the hidden state of every row's last real token.

    Args:
        hidden: ``[B, T, H]``.
        attention_mask: ``[B, T]``, True for real tokens; padding may lie on either side. A row
            without a real token gives the state of its first position.

    Returns:
        ``[B, H]``.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask.long()).argmax(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last.to(hidden.device)]


def position_ids(attention_mask: Tensor) -> Tensor:
    """Return ``[B, T]`` positions that count real tokens from 0, whatever side is padded."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


class ScoreHead(nn.Module):
    """A linear map from a hidden state to one score: ``(weight . hidden - shift) / scale``.

    Always float32, also when the model around it is cast to another dtype or runs under autocast:
    in bfloat16 scores near 1 move in steps of 1/128.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))
        self.register_buffer("shift", torch.zeros((), dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., H]`` of any dtype to float32 scores ``[...]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = F.linear(hidden.float(), self.weight).squeeze(-1)
        return (raw - self.shift) / self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScoreHead":
        # Follow to another device, never to another dtype.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def new_score_weight(hidden_size: int, seed: int) -> Tensor:
    """Draw a head's first weight ``[1, H]`` from N(0, 1 / (H + 1)), standard deviation squared.

    So that first scores have a spread of about 1 (Stiennon et al. 2020 in their code; Huang et al.
    2024, detail 11). From its own generator: the draw depends on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def load_score_head(folder: str | Path) -> ScoreHead:
    """Read the score head of a saved reward model.

    Raises:
        RewardModelError: the head's tensor or ``score.json`` is missing or malformed. A head is
            never initialised anew: its scores would look plausible and mean nothing.
    """
    folder = Path(folder)
    weight = _head_weight(folder / ADAPTER_FILE)
    shift, scale = read_calibration(folder)
    head = ScoreHead(weight.shape[1])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.shift.fill_(shift)
        head.scale.fill_(scale)
    return head


def _head_weight(path: Path) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            if HEAD_KEY not in file.keys():  # noqa: SIM118, safe_open is no dict
                raise RewardModelError(
                    f"{path}: no tensor {HEAD_KEY}: the score head was not saved here;"
                    " run the reward stage again"
                )
            weight: Tensor = file.get_tensor(HEAD_KEY)
    except (OSError, SafetensorError) as error:
        raise RewardModelError(f"{path}: cannot be read: {error}; run the reward stage") from None
    if weight.ndim != 2 or weight.shape[0] != 1 or weight.dtype != torch.float32:
        raise RewardModelError(
            f"{path}: {HEAD_KEY} is {tuple(weight.shape)} {weight.dtype};"
            " one float32 row (1, hidden_size) is needed"
        )
    return weight


def write_calibration(folder: Path, shift: float, scale: float) -> None:
    """Write ``score.json``."""
    text = json.dumps({"shift": shift, "scale": scale}, indent=2)
    (folder / SCORE_FILE).write_text(text + "\n", encoding="utf-8")


def read_calibration(folder: str | Path) -> tuple[float, float]:
    """Return the shift and scale in a saved reward model's ``score.json``.

    Raises:
        RewardModelError: it is missing, or does not hold a finite shift and a positive scale.
    """
    path = Path(folder) / SCORE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shift, scale = float(content["shift"]), float(content["scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewardModelError(f"{path}: no shift and scale here: {error!r}") from None
    if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
        raise RewardModelError(f"{path}: shift={shift} scale={scale}; finite, scale > 0 needed")
    return shift, scale
