"""Policy, reference, reward model and critic as adapters on one frozen base.

The base's weights exist once. Each role is a LoRA adapter on it; the reward model and the critic
add a head. Which role a forward pass computes is decided by ``use(role)``:

    policy      trainable; starts as a copy of the SFT adapter
    reference   the SFT adapter, frozen: the model that the KL penalty ties the policy to
    reward      the reward model's adapter, frozen, with its score head
    value       trainable; starts as a copy of the reward adapter and its head
    base        no adapter at all
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.adapters import WEIGHTS
from align.errors import ParentError
from align.functional import token_entropy, token_logprobs
from align.generation import Generated, generate
from align.sequences import Sequences

Role = Literal["policy", "reference", "reward", "value", "base"]


class Roles(nn.Module):
    """One base model, an adapter per role, and the heads of reward and value.

    Args:
        base: a causal language model; it is frozen, and its dropout has to be off.
        adapters: the adapter folder that each role starts from. The same folder may serve
            several roles: each gets its own copy.
        reward_head: maps hidden states ``[..., H]`` to scores ``[...]`` in float32.
        value_head: the same for values; trained together with the value adapter.
        trainable: the roles that get gradients.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapters: dict[Role, Path],
        *,
        reward_head: nn.Module | None = None,
        value_head: nn.Module | None = None,
        trainable: Sequence[Role] = (),
    ) -> None:
        super().__init__()
        self.base = base.eval().requires_grad_(False)
        self.peft = _add_adapters(base, adapters)
        self.reward_head = reward_head.requires_grad_(False) if reward_head is not None else None
        self.value_head = value_head
        self._layers = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(any(f".{role}." in name for role in trainable))
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._activate([])

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        device: torch.device = self.base.device
        return device

    def role_parameters(self, role: Role) -> list[nn.Parameter]:
        """Return the role's own parameters: its adapter's and, for value, its head's."""
        own = [p for name, p in self.base.named_parameters() if f".{role}." in name]
        if role == "value" and self.value_head is not None:
            own += self.value_head.parameters()
        return own

    @contextmanager
    def use(self, role: Role) -> Iterator[None]:
        """Make forward passes of the base compute this role, and undo it afterwards.

        PEFT's own ``set_adapter`` also rewrites ``requires_grad`` of every adapter, which would
        freeze one of two trained roles; this only changes which adapters the layers add.
        """
        previous = list(self._layers[0].active_adapters) if self._layers else []
        self._activate([] if role == "base" else [role])
        try:
            yield
        finally:
            self._activate(previous)

    def _activate(self, names: list[str]) -> None:
        for layer in self._layers:
            layer._active_adapter = names

    def hidden(self, role: Role, sequences: Sequences) -> Tensor:
        """Return the last layer's hidden states under a role, ``[B, P + R, H]``."""
        with self.use(role):
            output = self.base.base_model(
                input_ids=sequences.input_ids,
                attention_mask=sequences.attention_mask,
                position_ids=sequences.position_ids,
                use_cache=False,
                return_dict=True,
            )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def response_logits(self, role: Role, sequences: Sequences) -> Tensor:
        """Return the logits that predict the response tokens, ``[B, R, V]``."""
        length = sequences.response_mask.shape[1]
        with self.use(role):
            output = self.base(
                input_ids=sequences.input_ids,
                attention_mask=sequences.attention_mask,
                position_ids=sequences.position_ids,
                use_cache=False,
                return_dict=True,
                logits_to_keep=length + 1,
            )
        # The last position predicts what would follow the response.
        logits: Tensor = output.logits[:, :-1]
        return logits

    def logprobs(self, role: Role, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """Return the log-probabilities of the response tokens, ``[B, R]`` float32.

        Outside ``response_mask`` the values mean nothing.
        """
        logits = self.response_logits(role, sequences)
        return token_logprobs(logits, sequences.response_ids, temperature)

    def logprobs_and_entropy(
        self, role: Role, sequences: Sequences, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and, without gradient, entropies, both ``[B, R]`` float32."""
        logits = self.response_logits(role, sequences)
        logprobs = token_logprobs(logits, sequences.response_ids, temperature)
        return logprobs, token_entropy(logits.detach(), temperature)

    def values(self, sequences: Sequences) -> Tensor:
        """Return the critic's value of the state before each response token, ``[B, R]`` float32."""
        assert self.value_head is not None
        hidden = self.hidden("value", sequences)
        # The state before response token t ends at column P + t - 1.
        values: Tensor = self.value_head(hidden[:, sequences.prompt_width - 1 : -1])
        return values

    def scores(self, sequences: Sequences) -> Tensor:
        """Return the reward model's score of each response at its last token, ``[B]`` float32."""
        assert self.reward_head is not None
        hidden = self.hidden("reward", sequences)
        last = sequences.prompt_width + sequences.response_mask.sum(1) - 1
        rows = torch.arange(len(sequences), device=hidden.device)
        scores: Tensor = self.reward_head(hidden[rows, last])
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
    ) -> Generated:
        """Sample responses under a role; see ``align.generation.generate``."""
        with self.use(role):
            return generate(
                self.base,
                prompt_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                end_ids=end_ids,
                pad_id=pad_id,
                seed=seed,
                batch_size=batch_size,
            )


def _add_adapters(base: PreTrainedModel, adapters: dict[Role, Path]) -> PeftModel | None:
    """Put one adapter per role on the base, each with its folder's weights."""
    model: PeftModel | None = None
    for role, folder in adapters.items():
        config = LoraConfig.from_pretrained(str(folder))
        # The score head of a reward adapter is ours to hold, next to the base and not inside it.
        config.modules_to_save, config.task_type, config.inference_mode = None, None, False
        config.lora_dropout = 0.0
        tensors = load_file(folder / WEIGHTS)
        weights = {key: value for key, value in tensors.items() if ".lora_" in key}
        try:
            if model is None:
                model = PeftModel(base, config, adapter_name=role)
            else:
                model.add_adapter(role, config)
            result: Any = set_peft_model_state_dict(model, weights, adapter_name=role)
        except (ValueError, RuntimeError) as error:  # other layers, or other sizes
            raise ParentError(f"{folder}: its adapter does not fit the base: {error}") from error
        missing = [key for key in result.missing_keys if f".{role}." in key]
        if missing or result.unexpected_keys:
            raise ParentError(
                f"{folder}: its adapter does not fit the base: {len(missing)} tensors missing"
                f" {missing[:1]}, {len(result.unexpected_keys)} without a place"
                f" {result.unexpected_keys[:1]}"
            )
    return model
