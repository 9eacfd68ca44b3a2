"""The reward model: a sequence classifier's backbone with one fp32 score per response.

A classifier is the same with several: the logits of its classes, which are not shifted or scaled.

The score is read at the last real token, found by the attention mask. transformers' own pooling
looks for the last id that is not the pad id instead: with an end-of-turn id that equals the pad id,
or with an adapter whose base knows no pad id, it reads another token and says nothing.

What is saved is what PEFT writes for a SEQ_CLS adapter (``adapter_model.safetensors`` with the head
in it), or transformers for a whole sequence classifier, and ``score.json`` with the shift and scale
that turn raw scores into the model's scores, and a classifier's labels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from align.adapter_methods import adapter_config
from align.adapters import WEIGHTS, save_trained, share_config, trained_method
from align.attention import is_packed
from align.errors import ParentError
from align.models import REPORTED, all_loaded
from align.recipe_adapter import Adapter
from align.recipe_reward import Head
from align.sequences import position_ids
from align.weights import check_files, check_fits, read_tensors, shapes
from reward.calibrate import read_labels, read_widths, write_calibration
from reward.head import ScoreHead, draw_maps, load_score_head, score_maps, widths_of
from reward.packing import pack

LINEAR = Head()


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


class RewardModel(nn.Module):
    """A sequence classifier, mostly with an adapter, scored at the last real token in float32.

    ``labels`` are those of a classifier, whose scores are logits ``[B, C]``.
    """

    def __init__(
        self,
        classifier: PeftModel | PreTrainedModel,
        head: ScoreHead,
        labels: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.head = head
        self.labels = labels

    @property
    def backbone(self) -> PreTrainedModel:
        """What gives the hidden states, with the adapter in it."""
        return cast(PreTrainedModel, bare(self.classifier).base_model)

    @property
    def has_prefix(self) -> bool:
        """Whether what is trained are keys and values before every text."""
        if not isinstance(self.classifier, PeftModel):
            return False
        return bool(self.classifier.active_peft_config.is_prompt_learning)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, repeated: Tensor | None = None
    ) -> Tensor:
        """Score rows of prompt and response.

        Args:
            input_ids: ``[B, T]`` long; what fills the padding has no effect.
            attention_mask: ``[B, T]``, True for real tokens; padding on either side.
            repeated: ``[B]``, the tokens of a prompt that are not computed again; see
                ``reward.packing``. Has an effect under ``packed_attention`` only.

        Returns:
            ``[B]`` float32; of a classifier ``[B, C]``.
        """
        states = self.states(input_ids, attention_mask, repeated)
        return self.score(states, attention_mask)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, repeated: Tensor | None = None
    ) -> Tensor:
        """Return the backbone's last hidden states ``[B, T, H]`` of such rows."""
        if is_packed(self.backbone):
            packed = pack(input_ids, attention_mask, repeated)
            states: Tensor = self.backbone(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                use_cache=False,
                return_dict=True,
                layout=packed.layout,
            ).last_hidden_state
            return states[0, packed.places]
        seen, positions = attention_mask.long(), position_ids(attention_mask)
        prefix: dict[str, Any] = {}
        if isinstance(self.classifier, PeftModel) and self.has_prefix:
            count = self.classifier.active_peft_config.num_virtual_tokens
            prefix = {"past_key_values": self.classifier.get_prompt(len(seen))}
            seen, positions = F.pad(seen, (count, 0), value=1), positions + count
        hidden: Tensor = self.backbone(
            input_ids=input_ids,
            attention_mask=seen,
            position_ids=positions,
            use_cache=False,
            return_dict=True,
            **prefix,
        ).last_hidden_state
        return hidden

    def score(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Return what ``forward`` does, of rows whose states are ``[B, T, H]``."""
        scores: Tensor = self.head(last_hidden(states, attention_mask))
        return scores

    def calibrate(self, shift: float, scale: float) -> None:
        """Set the shift and scale of the scores."""
        self.head.shift.fill_(shift)
        self.head.scale.fill_(scale)

    def save(self, folder: Path, base: str, revision: str | None) -> None:
        """Write adapter and head, or the whole model, and ``score.json``, into a fresh folder.

        Args:
            base: where the base was loaded from; see ``align.adapters.save_adapter``.
            revision: of the base, likewise.
        """
        save_trained(self.classifier, folder, base=base, revision=revision)
        self.write_calibration(folder)

    def write_calibration(self, folder: Path) -> None:
        """Write ``score.json`` anew."""
        head = self.head
        numbers = head.shift.item(), head.scale.item()
        write_calibration(folder, *numbers, self.labels, widths_of(head))


def new_reward_model(
    causal_lm: PreTrainedModel,
    adapter: Adapter,
    sft_folder: Path,
    seed: int,
    labels: tuple[str, ...] = (),
    head: Head = LINEAR,
) -> RewardModel:
    """Start a reward model from the SFT model: its base, its adapter, and a random score head.

    Args:
        causal_lm: the base, or the whole SFT model if that is one; its backbone is used as it is,
            without a copy.
        adapter: the recipe's section; has to fit what the SFT stage trained.
        sft_folder: holds the SFT model; the backbone's parameter names are the same in a causal
            language model and in a sequence classifier, so an adapter's tensors fit as they are.
            What is trained of its output embeddings has no place here.
        seed: of the head's first weight; nothing else is random here.
        labels: of a classifier.
        head: its depth and width.

    Raises:
        InputError: the base has nothing that the adapter method trains.
        ParentError: the SFT model does not fit this base or this adapter section.
    """
    method = trained_method(sft_folder)
    if method != adapter.method:
        raise ParentError(
            f"{sft_folder}: was trained with adapter.method={method}, the recipe has"
            f" {adapter.method}; use the same in all stages"
        )
    widths = head.widths(causal_lm.config.hidden_size)
    classifier = _classifier(causal_lm, labels, widths)
    draw_maps(classifier.score, seed)
    config = adapter_config(adapter, "SEQ_CLS", classifier)
    if config is None:
        return RewardModel(*_with_head(classifier.requires_grad_(True)), labels)
    if isinstance(config, LoraConfig):
        _check_scaling(config, sft_folder)
    adapted = PeftModel(classifier, config)
    _start_from(adapted, sft_folder)
    return RewardModel(*_with_head(adapted), labels)


def load_reward_model(causal_lm: PreTrainedModel | None, folder: str | Path) -> RewardModel:
    """Load a saved reward model, frozen and in evaluation mode.

    Args:
        causal_lm: the base that it was trained on; its backbone is used without a copy. None for a
            whole model.

    Raises:
        RewardModelError: the folder is incomplete.
        ParentError: the adapter does not fit the base.
        InputError: a whole model lacks a tensor.
    """
    folder = Path(folder)
    head, labels = load_score_head(folder), read_labels(folder)
    widths = read_widths(folder)
    classifier: PeftModel | PreTrainedModel
    if causal_lm is None:
        check_files(folder)
        settings = {"dtype": torch.float32, "use_safetensors": True, **REPORTED}
        body = all_loaded(str(folder), *AutoModel.from_pretrained(folder, **settings))
        classifier = _classifier(body, labels, widths)
    else:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        classifier = PeftModel(_classifier(causal_lm, labels, widths), config)
        share_config(classifier)
        _start_from(classifier, folder)
    classifier, live = _with_head(classifier)
    if live.weight.shape != head.weight.shape:
        raise ParentError(
            f"{folder}: its score head has {head.weight.shape[1]} inputs; the base gives"
            f" {live.weight.shape[1]}"
        )
    live.load_state_dict(head.state_dict())
    return RewardModel(classifier, live, labels).requires_grad_(False).eval()


def plain_classifier(
    causal_lm: PreTrainedModel, head: ScoreHead, labels: tuple[str, ...], pad_id: int
) -> tuple[PreTrainedModel, float]:
    """Return a reward model as transformers' own sequence classifier, and its logits' offset.

        score = logit - offset          offset = shift / scale

    The head's scale goes into its weight; for the shift, the heads of transformers have no bias.

    Args:
        causal_lm: the base with the reward model's adapter in its weights; used up.
        head: a linear one.
        labels: of a classifier, whose offset is 0.
        pad_id: transformers reads the score at the last id that is not this one.
    """
    classifier = _classifier(causal_lm, labels, ())
    with torch.no_grad():
        classifier.score.weight.copy_(head.weight / head.scale)
    classifier.config.pad_token_id = pad_id
    classifier.config.problem_type = "single_label_classification" if labels else "regression"
    return classifier, (head.shift / head.scale).item()


def name_labels(config: PretrainedConfig, labels: tuple[str, ...]) -> None:
    """Write a classifier's labels into its configuration; without any, that there is one score."""
    config.num_labels = len(labels) or 1
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}


def _classifier(causal_lm: PreTrainedModel, labels: tuple[str, ...], widths: Sequence[int]) -> Any:
    """Return a sequence classifier around the model's own backbone, with an empty fp32 head."""
    config = causal_lm.config
    name_labels(config, labels)
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, causal_lm.base_model)
    hidden_size = classifier.score.in_features
    classifier.score = score_maps(hidden_size, len(labels) or 1, widths)
    return classifier.to(causal_lm.device).requires_grad_(False).eval()


def bare(classifier: PeftModel | PreTrainedModel) -> Any:
    """Return the classifier itself, with the adapter that is in it."""
    return classifier.get_base_model() if isinstance(classifier, PeftModel) else classifier


def _with_head(
    classifier: PeftModel | PreTrainedModel,
) -> tuple[PeftModel | PreTrainedModel, ScoreHead]:
    """Return the classifier and a head that shares its weight with the one that is saved."""
    saved = bare(classifier).score
    if isinstance(classifier, PeftModel):
        saved = saved.modules_to_save["default"]
    widths = widths_of(saved)
    head = ScoreHead(saved.in_features, saved.out_features, widths).to(saved.weight.device)
    head.weight = saved.weight
    if widths:
        head.deeper = saved.deeper
    return classifier, head


def _check_scaling(config: LoraConfig, folder: Path) -> None:
    """Refuse a LoRA whose tensors mean something else under the recipe's scaling."""
    trained = LoraConfig.from_pretrained(str(folder))
    for key, name in (("lora_alpha", "alpha"), ("use_rslora", "rslora")):
        theirs, ours = getattr(trained, key), getattr(config, key)
        if theirs != ours:
            raise ParentError(
                f"{folder}: was trained with adapter.{name}={theirs}, the recipe has {ours}; its"
                f" tensors mean something else under another {name}"
            )


def _start_from(classifier: PeftModel, folder: Path) -> None:
    """Copy a folder's tensors of the backbone, all of them, onto the classifier's."""
    path = folder / WEIGHTS
    tensors = read_tensors(path)
    body = f"base_model.model.{bare(classifier).base_model_prefix}."
    of_body = (body, "prompt_embeddings")
    tensors = {name: value for name, value in tensors.items() if name.startswith(of_body)}
    ours = get_peft_model_state_dict(classifier, save_embedding_layers=False)
    expected = {name: value for name, value in ours.items() if name.startswith(of_body)}
    check_fits(path, shapes(tensors), shapes(expected))
    set_peft_model_state_dict(classifier, ours | tensors)
