"""Encoder reward models: BERT and its like, which read prompt and response in both directions.

The score is what transformers' own sequence classifier gives on the first token (``cls``), or a
linear map of the mean of all tokens' states (``mean``), which no class of transformers does. Rows
are moved to the left before they are read, so that positions never depend on the padding.

What is saved is a PEFT adapter with the head in it, or a whole sequence classifier, and
``score.json`` with shift, scale and pooling.
"""

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from align.adapter_methods import HEAD, adapter_config
from align.adapters import WEIGHTS, is_adapter, save_trained, share_config
from align.errors import InputError
from align.models import first_line
from align.recipe_adapter import Adapter
from align.recipe_reward import Head, Pooling
from align.weights import check_fits, read_tensors, shapes
from reward.calibrate import (
    SCORE_FILE,
    RewardModelError,
    read_calibration,
    read_labels,
    read_widths,
    write_calibration,
)
from reward.head import draw_maps, score_maps, widths_of
from reward.model import LINEAR, bare, name_labels

Classifier = PeftModel | PreTrainedModel

# What a pass costs beside its tokens, in tokens: of a small encoder on one core; assumed on a GPU.
_FIXED_TOKENS_ON_CPU, _FIXED_TOKENS = 32, 4096


class Form(NamedTuple):
    """How an encoder's rows are made and its score is read; stands in ``score.json``."""

    pooling: Pooling
    # The id that ends prompt and response. Where the encoder tells segments apart, the response is
    # the second one: what follows the last separator but one.
    separator: int
    max_prompt_tokens: int


class EncoderReward(nn.Module):
    """A sequence classifier with one label, mostly with an adapter: ``(logit - shift) / scale``.

    With ``labels`` it is a classifier of these, whose scores are its logits ``[B, C]``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, classifier: Classifier, form: Form, labels: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.classifier = classifier
        self.form = form
        self.labels = labels
        self.register_buffer("shift", torch.zeros((), dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    @property
    def backbone(self) -> PreTrainedModel:
        """What gives the hidden states, with the adapter in it."""
        body: PreTrainedModel = bare(self.classifier).base_model
        return body

    @property
    def _widths(self) -> tuple[int, ...]:
        """Those inside a deep head, which the encoder's own is not."""
        head: Any = getattr(bare(self.classifier), HEAD, None)
        trained = getattr(head, "modules_to_save", {"default": head})["default"]
        return widths_of(trained)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score rows ``[B, T]`` of prompt and response, as ``RewardModel`` does.

        Rows of like length go through the encoder together, apart from the others.
        """
        pad_id = bare(self.classifier).config.pad_token_id or 0
        ids, mask = left_aligned(input_ids, attention_mask, pad_id)
        lengths = mask.sum(1).clamp(min=1).tolist()
        fixed = _FIXED_TOKENS_ON_CPU if ids.device.type == "cpu" else _FIXED_TOKENS
        passes = passes_of_like_length(lengths, fixed)
        logits = []
        for rows in passes:
            width = max(lengths[row] for row in rows)
            logits.append(self._logits(ids[rows, :width], mask[rows, :width]))
        places = torch.tensor([row for rows in passes for row in rows]).argsort()
        raw = torch.cat(logits)[places.to(ids.device)].squeeze(-1)
        return (raw - self.shift) / self.scale

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of rows whose padding is on the right."""
        classifier = bare(self.classifier)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if getattr(classifier.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = segments(ids, mask, self.form.separator)
        logits: Tensor
        if self.form.pooling == "cls":
            logits = classifier(**inputs).logits
        else:
            states = classifier.base_model(**inputs).last_hidden_state
            logits = classifier.score(masked_mean(states, mask))
        return logits

    def calibrate(self, shift: float, scale: float) -> None:
        """Set the shift and scale of the scores."""
        self.shift.fill_(shift)
        self.scale.fill_(scale)

    def save(self, folder: Path, base: str, revision: str | None) -> None:
        """Write adapter and head, or the whole model, and ``score.json``; see ``RewardModel``."""
        save_trained(self.classifier, folder, base=base, revision=revision)
        self.write_calibration(folder)

    def write_calibration(self, folder: Path) -> None:
        """Write ``score.json`` anew."""
        numbers = self.shift.item(), self.scale.item()
        write_calibration(folder, *numbers, self.labels, self._widths, **self.form._asdict())


def passes_of_like_length(lengths: Sequence[int], fixed: int) -> list[list[int]]:
    """Divide rows into the passes that cost least, padded each to its longest row.

    Args:
        lengths: of the rows, in tokens.
        fixed: what a pass costs beside its tokens, in tokens.

    Returns:
        The numbers of each pass's rows, shortest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    # Of the first rows of the order: the least cost, and where the last pass begins.
    best = [(0, 0)]
    for end, row in enumerate(order, start=1):
        costs = (best[first][0] + (end - first) * lengths[row] + fixed for first in range(end))
        best.append(min(zip(costs, range(end), strict=True)))
    passes, end = [], len(order)
    while end:
        first = best[end][1]
        passes.append(order[first:end])
        end = first
    return passes[::-1]


def left_aligned(input_ids: Tensor, mask: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Move every row's real tokens to the left, in their order; ``[B, T]`` both.

    What fills the rest is the encoder's own pad id: RoBERTa counts positions by it.
    """
    order = mask.bool().logical_not().long().argsort(dim=1, stable=True)
    mask = mask.bool().gather(1, order)
    return input_ids.gather(1, order).masked_fill(~mask, pad_id), mask


def segments(ids: Tensor, mask: Tensor, separator: int) -> Tensor:
    """Return every token's segment, ``[B, T]``: 1 for the response and what ends it, else 0."""
    ends = (ids == separator) & mask
    following = ends.long().flip(1).cumsum(1).flip(1)  # this one and those after it
    return ((following == 1) & (ends.sum(1, keepdim=True) > 1)).long()


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the states ``[B, T, H]`` where the mask ``[B, T]`` is True."""
    real = mask.unsqueeze(-1)
    return states.masked_fill(~real, 0.0).sum(1) / real.sum(1)


def encoder_body(config: PretrainedConfig) -> PreTrainedModel:
    """Return an encoder without weights: only its shape counts.

    Raises:
        InputError: it is no encoder.
    """
    try:
        with torch.device("meta"):
            body: PreTrainedModel = AutoModel.from_config(config)
    except ValueError as error:
        raise InputError(first_line(error)) from error
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        raise InputError(f"{type(body).__name__} is no encoder; allowed: BERT and its like")
    return body


def num_positions(body: PreTrainedModel) -> int:
    """Return how many tokens an encoder can read; RoBERTa has fewer than its configuration says."""
    for name, module in body.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return getattr(body.config, "max_position_embeddings", None) or sys.maxsize


def new_encoder_reward(
    location: str,
    settings: dict[str, Any],
    adapter: Adapter,
    form: Form,
    seed: int,
    labels: tuple[str, ...] = (),
    head: Head = LINEAR,
) -> EncoderReward:
    """Start a reward model from an encoder.

    Args:
        location: a folder or a hub id; what its checkpoint lacks, as the head, is drawn.
        settings: of ``from_pretrained``; see ``align.models.load_settings``.
        seed: of all that is drawn.
        labels: of a classifier.
        head: its depth and width, with pooling ``mean``.

    Raises:
        InputError: transformers has no classifier of this kind, or the base has nothing that the
            adapter method trains.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = head.widths(settings["config"].hidden_size)
        classifier = _load_classifier(location, settings, form.pooling, labels, widths)
        if form.pooling == "mean":
            draw_maps(classifier.score, seed)
        config = adapter_config(adapter, "SEQ_CLS", classifier, _heads(classifier))
        trained: Classifier = classifier.requires_grad_(config is None)
        if config is not None:
            trained = PeftModel(classifier, config)
    return EncoderReward(trained, form, labels)


def load_encoder_reward(
    folder: str | Path, location: str | None = None, settings: dict[str, Any] | None = None
) -> EncoderReward:
    """Load a saved encoder reward model, frozen and in evaluation mode.

    Args:
        location: of the base that an adapter was trained on.
        settings: of the base's ``from_pretrained``, likewise.

    Raises:
        ParentError: the folder is incomplete, or does not fit the base.
    """
    folder = Path(folder)
    form, labels, widths = read_form(folder), read_labels(folder), read_widths(folder)
    shift, scale = read_calibration(folder)
    classifier: Any
    if is_adapter(folder):
        assert location is not None
        assert settings is not None
        base = _load_classifier(location, settings, form.pooling, labels, widths)
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        classifier = PeftModel(base, config)
        share_config(classifier)
        expected = get_peft_model_state_dict(classifier, save_embedding_layers=False)
        found = _tensors(folder, [folder / WEIGHTS], expected)
        set_peft_model_state_dict(classifier, found)
    else:
        config = AutoConfig.from_pretrained(folder)
        name_labels(config, labels)
        empty = AutoModelForSequenceClassification.from_config(config)
        classifier = _pooled(empty, form.pooling, widths)
        found = _tensors(folder, sorted(folder.glob("*.safetensors")), classifier.state_dict())
        classifier.load_state_dict(found)
    model = EncoderReward(classifier, form, labels)
    model.calibrate(shift, scale)
    return model.requires_grad_(False).eval()


def read_form(folder: Path) -> Form:
    """Return how a saved encoder reward model is read.

    Raises:
        RewardModelError: ``score.json`` does not say so.
    """
    path = folder / SCORE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        form = Form(*(content[name] for name in Form._fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewardModelError(f"{path}: does not say how it is read: {error!r}") from None
    numbers = form.separator, form.max_prompt_tokens
    if form.pooling not in get_args(Pooling) or not all(type(n) is int for n in numbers):
        raise RewardModelError(f"{path}: {form}: not known here")
    return form


def _load_classifier(
    location: str,
    settings: dict[str, Any],
    pooling: Pooling,
    labels: tuple[str, ...],
    widths: Sequence[int],
) -> Any:
    config = copy.deepcopy(settings["config"])
    name_labels(config, labels)
    if hasattr(config, "classifier_pooling"):  # ModernBERT's own is the mean
        config.classifier_pooling = "cls"
    settings = settings | {"config": config, "dtype": torch.float32, "use_safetensors": True}
    try:
        classifier = AutoModelForSequenceClassification.from_pretrained(location, **settings)
    except (OSError, ValueError) as error:
        raise InputError(first_line(error)) from error
    return _pooled(classifier, pooling, widths).eval()


def _pooled(classifier: Any, pooling: Pooling, widths: Sequence[int]) -> Any:
    """Return the classifier; for averaged states with a head of ours in the place of its own."""
    if pooling == "mean":
        for name in _heads(classifier):
            owner = classifier if name in classifier._modules else classifier.base_model
            setattr(owner, name, None)
        sizes = classifier.config.hidden_size, classifier.config.num_labels
        setattr(classifier, HEAD, score_maps(*sizes, widths))
    return classifier


def _heads(classifier: Any) -> list[str]:
    """Return the names of what lies above the states: the head, and a pooler below it."""
    prefix = classifier.base_model_prefix
    parts = [(name, part) for name, part in classifier.named_children() if name != prefix]
    pooler = getattr(classifier.base_model, "pooler", None)
    if pooler is not None:
        parts.append(("pooler", pooler))
    return [name for name, part in parts if any(True for _ in part.parameters())]


def _tensors(folder: Path, files: list[Path], expected: dict[str, Any]) -> dict[str, Tensor]:
    """Read what was saved, if it is all that is needed.

    Raises:
        ParentError: a file is damaged, a tensor missing or of another shape. Nothing is initialised
            anew: such scores would look plausible and mean nothing.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        found |= read_tensors(path)
    check_fits(folder, shapes(found), shapes(expected))
    return found
