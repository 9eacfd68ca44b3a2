"""Policy, reference, reward model and critic: adapters on one frozen base, or models of their own.

The base's weights exist once. A role is a LoRA adapter on it, or, where all its weights are
trained, a model of its own; reward models and the critic add a head:

    policy      trainable; starts as a copy of the SFT model
    reference   the SFT model, frozen: what the KL penalty ties the policy to
    reward      the reward model, frozen, with its score head; further ones: reward1, ...
    value       trainable; starts as a copy of the reward model and its head
    base        no adapter at all
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from align import lora
from align.adapters import WEIGHTS
from align.attention import Layout, Spans, set_attention
from align.errors import InputError, ParentError
from align.functional import token_entropy, token_logprobs
from align.generation import Engine, Generated, generate
from align.last_layer import narrow_last_layer
from align.logprobs import head_logprobs
from align.models import recompute_activations
from align.rms_norm import fuse_norms
from align.sequences import Sequences, micro_batches, position_ids
from align.trunk import Trunk, trunk_depth
from align.weights import check_fits, read_tensors, shapes

Role = str


class PolicyOutput(NamedTuple):
    """What one pass of the policy gives, ``[B, R]`` float32 each; None where not asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None  # where the critic is a head on the policy's hidden states


class Roles(nn.Module):
    """One base model, an adapter or a model per role, and the heads of rewards and critic.

    Args:
        base: a causal language model; it is frozen, and its dropout is turned off.
        adapters: the adapter folder that each role on the base starts from. The same folder may
            serve several roles: each gets its own copy.
        models: roles that have a model of their own, all of whose weights may be trained.
        heads: of ``value`` and of every reward role: maps hidden states ``[..., H]`` to scores
            ``[...]`` in float32. A value head without a value adapter or model reads the policy's
            hidden states.
        trainable: the roles that get gradients.
        engine: ``native``, or ``hf`` for plain transformers: padded batches and whole logits.
        recompute: memory before time: passes with gradients keep the inputs of the layers only, and
            compute the rest again, under the role that they were computed under, in the backward
            pass; sampling does not add the adapter to the weights first.

    Raises:
        InputError: the native engine does not know the base's kind of attention.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapters: Mapping[Role, Path],
        *,
        models: Mapping[Role, PreTrainedModel] | None = None,
        heads: Mapping[Role, nn.Module] | None = None,
        trainable: Sequence[Role] = (),
        engine: Engine = "native",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.engine, self._recompute = engine, recompute
        self.base = base.eval().requires_grad_(False)
        self.peft = add_adapters(base, adapters)
        self.models = nn.ModuleDict(dict(models or {}))
        self.heads = nn.ModuleDict(dict(heads or {}))
        self._layers = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
        self.value_on_policy = (
            "value" in self.heads and "value" not in adapters and "value" not in self.models
        )
        self.requires_grad_(False)
        for role in trainable:
            for parameter in self.role_parameters(role):
                parameter.requires_grad_(True)
        for model in (base, *self.models.values()):
            _prepare(model, engine)
            if recompute:
                recompute_activations(cast(PreTrainedModel, model), self._contexts)
        depth = trunk_depth(base.base_model, lambda m: isinstance(m, BaseTunerLayer))
        partial = engine == "native" and 0 < depth < base.config.num_hidden_layers
        self.trunk = Trunk(base.base_model, depth) if partial else None
        self._activate([])

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        device: torch.device = self.base.device
        return device

    def model(self, role: Role) -> PreTrainedModel:
        """Return the model that a role runs on: its own, or the base."""
        own: Any = self.models[role] if role in self.models else self.base  # noqa: SIM401
        return cast(PreTrainedModel, own)

    def role_parameters(self, role: Role) -> list[nn.Parameter]:
        """Return the role's own parameters: its adapter's or model's, and its head's."""
        if role in self.models:
            own = list(self.models[role].parameters())
        else:
            # PEFT's names; a layer of the base itself may be called like a role.
            adapter = re.compile(rf"\.lora_\w+\.{role}(\.|$)")
            own = [p for name, p in self.base.named_parameters() if adapter.search(name)]
        if role in self.heads:
            own += self.heads[role].parameters()
        return own

    @contextmanager
    def use(self, role: Role) -> Iterator[PreTrainedModel]:
        """Give the model of a role, computing that role; undo it afterwards.

        PEFT's own ``set_adapter`` also rewrites ``requires_grad`` of every adapter, which would
        freeze one of two trained roles; this only changes which adapters the layers add.
        """
        if role in self.models:
            # Trained weights stay in float32; a base in 16 bits says in what to compute.
            low = self.base.dtype != torch.float32
            # In a pass with gradients each weight is needed once: a copy kept would be in the way.
            kept = not torch.is_grad_enabled()
            kind = self.device.type
            with torch.autocast(kind, self.base.dtype, enabled=low, cache_enabled=kept):
                yield self.model(role)
            return
        with self._adapters([] if role == "base" else [role]):
            yield self.base

    @contextmanager
    def _adapters(self, names: list[str]) -> Iterator[None]:
        previous = list(self._layers[0].active_adapters) if self._layers else []
        self._activate(names)
        try:
            yield
        finally:
            self._activate(previous)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a layer's pass and of its repetition: under the same adapter."""
        names = list(self._layers[0].active_adapters) if self._layers else []
        return nullcontext(), self._adapters(names)

    def _activate(self, names: list[str]) -> None:
        for layer in self._layers:
            layer._active_adapter = names

    def with_trunk(self, sequences: Sequences, max_tokens: int = 4096) -> Sequences:
        """Return the batch with what the layers below all adapters make of it, if there are any.

        Every later pass of a role on the base then starts from there.

        Args:
            max_tokens: tokens per forward pass; only memory depends on it.
        """
        if self.trunk is None:
            return sequences
        states = []
        for rows in micro_batches(sequences.lengths, tokens=max_tokens):
            part = sequences.rows(rows)
            with torch.no_grad(), self.use("base") as model, self.trunk.lower() as gate:
                _run_packed(model.base_model, part)
                assert gate.states is not None
                states.append(gate.states[0])
        return replace(sequences, trunk=torch.cat(states))

    def hidden(self, role: Role, sequences: Sequences, spans: Spans) -> Tensor:
        """Return the last hidden states under a role at some positions, ``[n, H]``.

        Args:
            spans: the positions in the row, one span per text; the last layer computes no others.
        """
        with self.use(role) as model, _recomputing(model):
            if self.engine == "hf":
                states = _run_padded(model.base_model, sequences)
            elif sequences.trunk is None or model is not self.base:
                states = _run_packed(model.base_model, sequences, spans)
            else:
                assert self.trunk is not None
                with self.trunk.upper(sequences.trunk[None]):
                    states = _run_packed(model.base_model, sequences, spans)
        return torch.cat([states[first:after] for first, after in spans])

    def policy(
        self,
        sequences: Sequences,
        temperature: float = 1.0,
        *,
        role: Role = "policy",
        with_entropy: bool = False,
    ) -> PolicyOutput:
        """Return log-probabilities of the response tokens and what comes with them.

        Args:
            role: which model; ``values`` only come with the policy, if the critic shares its pass.
            with_entropy: also the entropy of each choice, with its gradient.
        """
        hidden = self.hidden(role, sequences, sequences.response_spans)
        head = self.model(role).get_output_embeddings()
        tokens, entropy = sequences.response_tokens, None
        if self.engine == "hf":
            logits = head(hidden)
            logprobs = token_logprobs(logits, tokens, temperature)
            if with_entropy:
                entropy = token_entropy(logits, temperature)
        else:
            logprobs, entropy = head_logprobs(
                hidden, head, tokens, temperature=temperature, with_entropy=with_entropy
            )
        values = None
        if role == "policy" and self.value_on_policy:
            values = sequences.per_response(self.heads["value"](hidden))
        return PolicyOutput(
            sequences.per_response(logprobs),
            sequences.per_response(entropy) if entropy is not None else None,
            values,
        )

    def logprobs(self, role: Role, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """Return the log-probabilities of the response tokens, ``[B, R]`` float32."""
        return self.policy(sequences, temperature, role=role).logprobs

    def values(self, sequences: Sequences) -> Tensor:
        """Return the critic's value of the state before each response token, ``[B, R]`` float32."""
        hidden = self.hidden(self._critic, sequences, sequences.response_spans)
        return sequences.per_response(self.heads["value"](hidden))

    def last_values(self, sequences: Sequences) -> Tensor:
        """Return the critic's value of the state after each response's last token, ``[B]``."""
        hidden = self.hidden(self._critic, sequences, sequences.end_spans)
        values: Tensor = self.heads["value"](hidden)
        return values

    @property
    def _critic(self) -> Role:
        return "policy" if self.value_on_policy else "value"

    def scores(self, sequences: Sequences, role: Role = "reward") -> Tensor:
        """Return a reward model's score of each response at its last token, ``[B]`` float32."""
        scores: Tensor = self.heads[role](self.hidden(role, sequences, sequences.end_spans))
        return scores

    def generate(
        self,
        role: Role,
        prompt_ids: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        end_ids: Sequence[int],
        pad_id: int,
        seed: int,
        batch_size: int | None = None,
        streams: Sequence[int] | None = None,
    ) -> Generated:
        """Sample responses under a role; see ``align.generation.generate``."""
        with self.use(role) as model, nullcontext() if self._recompute else lora.summed(model):
            return generate(
                model,
                prompt_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                end_ids=end_ids,
                pad_id=pad_id,
                seed=seed,
                batch_size=batch_size,
                engine=self.engine,
                streams=streams,
            )


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Put the layers that recompute their activations into training mode for a pass with gradients.

    The layers only, not what is in them. Everywhere else they stay in evaluation mode, where they
    compute as if nothing were: in training mode they would throw a key-value cache away.
    """
    layers = {
        layer: layer.training
        for layer in model.modules()
        if torch.is_grad_enabled() and isinstance(layer, GradientCheckpointingLayer)
    }
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in layers.items():
            layer.training = training


def _prepare(model: Any, engine: Engine) -> None:
    """Choose the model's attention, and turn its dropout off."""
    if engine == "native":
        reason = set_attention(model)
        if reason is not None:
            raise InputError(
                f"ppo.rollout.engine=native does not know this base: {reason}; allowed for it: hf"
            )
        lora.fuse(model)
        fuse_norms(model)
        narrow_last_layer(model.base_model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _run_packed(backbone: nn.Module, sequences: Sequences, wanted: Spans | None = None) -> Tensor:
    states: Tensor = backbone(
        input_ids=sequences.input_ids[None],
        position_ids=sequences.position_ids[None],
        use_cache=False,
        return_dict=True,
        layout=Layout(lengths=sequences.lengths, wanted=wanted),
    ).last_hidden_state
    return states[0]


def _run_padded(backbone: nn.Module, sequences: Sequences) -> Tensor:
    input_ids, mask = sequences.padded()
    states: Tensor = backbone(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
        return_dict=True,
    ).last_hidden_state
    return states[mask]


def add_adapters(base: PreTrainedModel, adapters: Mapping[Role, Path]) -> PeftModel | None:
    """Put one adapter per role on the base, each with its folder's weights.

    Raises:
        ParentError: a file is damaged, or its adapter does not fit the base.
    """
    model: PeftModel | None = None
    for role, folder in adapters.items():
        config = LoraConfig.from_pretrained(str(folder))
        # The score head of a reward adapter is ours to hold, next to the base and not inside it.
        config.modules_to_save, config.task_type, config.inference_mode = None, None, False
        config.lora_dropout = 0.0
        weights = _lora_tensors(read_tensors(folder / WEIGHTS))
        try:
            if model is None:
                model = PeftModel(base, config, adapter_name=role)
            else:
                model.add_adapter(role, config)
        except ValueError as error:  # other layers
            raise ParentError(f"{folder}: its adapter does not fit the base: {error}") from error
        ours = get_peft_model_state_dict(model, adapter_name=role, save_embedding_layers=False)
        check_fits(folder / WEIGHTS, shapes(weights), shapes(_lora_tensors(ours)))
        set_peft_model_state_dict(model, weights, adapter_name=role)
    return model


def _lora_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
