"""Sampling responses from a language model, with every sampling setting explicit.

Two engines give the same distribution. ``native`` computes nothing that is thrown away: prompts
are packed, keys and values go into buffers in place, finished rows leave the batch. ``hf`` is
``generate`` of transformers, the slow twin that tests compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from align.attention import KeyValueCache, Layout
from align.seeds import derive_seed
from align.sequences import position_ids

Engine = Literal["native", "hf"]


@dataclass(frozen=True, slots=True)
class Generated:
    """Responses in the order of their prompts."""

    responses: list[list[int]]  # token ids up to and including the stop token, never empty
    ended: list[bool]  # True where a stop token was sampled, False where the length limit hit


def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
    batch_size: int | None = None,
    engine: Engine = "native",
    streams: Sequence[int] | None = None,
) -> Generated:
    """Sample one response per prompt from the unmodified softmax at ``temperature``.

    Nothing of the checkpoint's own ``generation_config`` takes part: no top-k, no nucleus, no
    repetition penalty. Otherwise the rollouts would not come from the distribution whose
    log-probabilities PPO computes. The global random state is left as it was.

    Args:
        model: with the attention of ``align.attention`` for the native engine.
        prompt_ids: one list of ids per prompt, not empty.
        temperature: 0 means greedy.
        end_ids: every id that ends a response.
        pad_id: fills the batch of ``hf``; has no effect on the responses.
        seed: decides the samples. In the native engine every row draws its own numbers, so that
            its response does not depend on the rows beside it; in ``hf`` it does.
        batch_size: prompts at a time; None: all at once. Prompts are batched by length.
        streams: which numbers each prompt draws in the native engine; None: those of its position.
    """
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    step = batch_size or len(order) or 1
    responses: list[list[int]] = [[] for _ in order]
    ended = [False] * len(order)
    stops = set(end_ids)
    training = model.training
    model.eval()  # with dropout, or checkpointing without a cache, samples would be wrong
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            prompts = [prompt_ids[i] for i in rows]
            if engine == "native":
                drawn = rows if streams is None else [streams[i] for i in rows]
                uniform = _uniform(drawn, max_new_tokens, seed).to(model.device)
                sampled = _decode(model, prompts, uniform, temperature, stops)
            else:
                config = _config(max_new_tokens, temperature, end_ids, pad_id)
                sampled = _generate_hf(model, prompts, config, pad_id)
            for i, ids in zip(rows, sampled, strict=True):
                length = next((n + 1 for n, token in enumerate(ids) if token in stops), None)
                responses[i] = ids[:length]
                ended[i] = length is not None
    model.train(training)
    return Generated(responses, ended)


def _uniform(rows: Sequence[int], count: int, seed: int) -> Tensor:
    """Draw ``[len(rows), count]`` numbers in [0, 1), each row from a stream of its own."""
    generator = torch.Generator()
    streams = []
    for row in rows:
        generator.manual_seed(derive_seed(seed, "row", row))
        streams.append(torch.rand(count, generator=generator))
    return torch.stack(streams)


def _decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    uniform: Tensor,
    temperature: float,
    stops: set[int],
) -> list[list[int]]:
    """Sample until every row has stopped or ``uniform`` has no more columns."""
    backbone, head = model.base_model, model.get_output_embeddings()
    device, lengths = model.device, [len(prompt) for prompt in prompts]
    cache = KeyValueCache(lengths, max_new_tokens=uniform.shape[1])
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    packed = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    ends = list(accumulate(lengths))
    layout = Layout(lengths, cache, wanted=[(end - 1, end) for end in ends])
    hidden = _states(backbone, packed[None], positions[None], layout)[0]
    hidden = hidden[torch.tensor(ends, device=device) - 1]
    cache.finish_prompts(device, hidden.dtype)

    stop_ids = torch.tensor(sorted(stops), device=device)
    tokens = torch.zeros_like(uniform, dtype=torch.long)
    rows = torch.arange(len(prompts), device=device)  # those in the batch
    going = torch.ones_like(rows, dtype=torch.bool)  # those that have not stopped
    position = torch.tensor(lengths, device=device)
    for step in range(uniform.shape[1]):
        chosen = sample(head(hidden).float(), temperature, uniform[rows, step])
        tokens[rows, step] = chosen
        going &= ~torch.isin(chosen, stop_ids)
        stopped = len(going) - int(going.sum())
        if step + 1 == uniform.shape[1] or stopped == len(going):
            break
        if stopped > len(going) // 16:  # a few at a time: each time the cache is copied
            alive = going.nonzero()[:, 0]
            rows, position, chosen, going = (x[alive] for x in (rows, position, chosen, going))
            cache.keep(alive)
        layout = Layout(cache=cache)
        hidden = _states(backbone, chosen[:, None], position[:, None], layout)[:, 0]
        cache.filled += 1
        position = position + 1
    result: list[list[int]] = tokens[:, : step + 1].tolist()
    return result


def sample(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Choose tokens by inverting the cumulative distribution at given numbers.

    Args:
        logits: ``[B, V]`` float32.
        temperature: 0 means the most likely token.
        uniform: ``[B]`` in [0, 1).

    Returns:
        ``[B]`` long.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    # Unnormalised: the last sum stands for 1, so that rounding can never leave a gap at the end.
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _states(backbone: nn.Module, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    states: Tensor = backbone(
        input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, layout=layout
    ).last_hidden_state
    return states


def _config(
    max_new_tokens: int, temperature: float, end_ids: Sequence[int], pad_id: int
) -> GenerationConfig:
    settings: dict[str, object] = {"do_sample": temperature > 0}
    if temperature > 0:
        # An unset top_k still means 50 to transformers.
        settings |= {"temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
        use_cache=True,
        num_beams=1,
        **settings,
    )


def _generate_hf(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig, pad_id: int
) -> list[list[int]]:
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    # transformers fills unset values from the model's own configuration: give it an empty one.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(  # type: ignore[operator]
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            position_ids=position_ids(attention_mask).to(model.device),
            generation_config=config,
        )
    finally:
        model.generation_config = own
    rows: list[list[int]] = output[:, width:].tolist()
    return rows
