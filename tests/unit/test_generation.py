"""Sampling: the distribution is the softmax, stops are counted right, settings do not leak in."""

import pytest
import torch
from transformers import GenerationConfig

from align.generation import generate
from tests import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [20]]
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def sample(model, prompts=PROMPTS, **changes):
    settings = {
        "max_new_tokens": 8,
        "temperature": 1.0,
        "end_ids": [1],
        "pad_id": 0,
        "seed": 0,
    }
    return generate(model, prompts, **(settings | changes))


@torch.no_grad()
def greedy_by_hand(model, prompt, length, stops):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def test_greedy_in_a_padded_batch_equals_the_uncached_argmax_of_each_row(model):
    expected = [greedy_by_hand(model, prompt, 8, {1}) for prompt in PROMPTS]
    assert sample(model, temperature=0).responses == expected
    assert sample(model, temperature=0, batch_size=2).responses == expected
    assert sample(model, temperature=0, pad_id=3).responses == expected


# T28: every stop id ends a response, and the one that did is kept.
def test_t28_several_stop_ids(model):
    free = sample(model, temperature=0).responses
    stops = {free[0][2], free[1][4]}
    stopped = sample(model, temperature=0, end_ids=sorted(stops))
    expected = [greedy_by_hand(model, prompt, 8, stops) for prompt in PROMPTS]
    assert stopped.responses == expected
    assert stopped.ended == [response[-1] in stops for response in expected]
    assert stopped.ended[:2] == [True, True]


# T32: a response that is nothing but the stop token has length 1.
def test_t32_an_empty_response_is_its_stop_token(model):
    first = sample(model, temperature=0).responses[2][0]
    stopped = sample(model, [PROMPTS[2]], temperature=0, end_ids=[first])
    assert stopped.responses == [[first]]
    assert stopped.ended == [True]


# T17: reaching the width of the batch is not an end.
def test_t17_the_length_limit_is_not_an_end(model):
    result = sample(model, max_new_tokens=3)
    assert [len(response) for response in result.responses] == [3, 3, 3]
    assert result.ended == [False, False, False]


def test_t2_the_models_own_generation_settings_take_no_part(model):
    expected = sample(model)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1.3,
        min_length=50,
        suppress_tokens=[5, 6],
        bad_words_ids=[[7]],
        eos_token_id=2,
    )
    own = model.generation_config
    assert sample(model) == expected
    assert model.generation_config is own


# T2: no top-k of 50, which transformers applies where nothing is said.
def test_t2_samples_follow_the_softmax(model):
    counts = torch.zeros(320)
    for seed in range(10):
        for (token,) in sample(model, [PROMPTS[0]] * 400, max_new_tokens=1, seed=seed).responses:
            counts[token] += 1
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    rare = torch.ones(320, dtype=torch.bool)
    rare[expected.topk(50).indices] = False
    share, spread = float(expected[rare].sum()), 4 * (0.25 / 4000) ** 0.5
    assert share > 0.02
    assert float(counts[rare].sum()) / 4000 == pytest.approx(share, abs=spread)


def test_the_seed_decides_and_the_global_state_is_left_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (sample(model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert first == again
    assert first != other


def test_no_prompts_no_responses(model):
    assert sample(model, []).responses == []
