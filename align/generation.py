"""Sampling responses from a language model, with every sampling setting explicit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from align.sequences import position_ids


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
) -> Generated:
    """Sample one response per prompt from the unmodified softmax at ``temperature``.

    Nothing of the checkpoint's own ``generation_config`` takes part: no top-k, no nucleus, no
    repetition penalty. Otherwise the rollouts would not come from the distribution whose
    log-probabilities PPO computes. The global random state is left as it was.

    Args:
        prompt_ids: one list of ids per prompt, not empty.
        temperature: 0 means greedy.
        end_ids: every id that ends a response.
        pad_id: fills the batch; has no effect on the responses.
        seed: decides the samples, together with the prompts and ``batch_size``.
        batch_size: prompts per forward pass; None: all at once. Prompts are batched by length.
    """
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    step = batch_size or len(order) or 1
    responses: list[list[int]] = [[] for _ in order]
    ended = [False] * len(order)
    config = _config(max_new_tokens, temperature, end_ids, pad_id)
    stops = set(end_ids)
    training = model.training
    model.eval()  # with dropout, or checkpointing without a cache, samples would be wrong
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            sampled = _generate_batch(model, [prompt_ids[i] for i in rows], config, pad_id)
            for i, ids in zip(rows, sampled, strict=True):
                length = next((n + 1 for n, token in enumerate(ids) if token in stops), None)
                responses[i] = ids[:length]
                ended[i] = length is not None
    model.train(training)
    return Generated(responses, ended)


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


def _generate_batch(
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
