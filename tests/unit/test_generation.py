"""Sampling: the distribution is the softmax, stops are counted right, settings do not leak in."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from align import attention, generation
from align.generation import generate
from tests import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [20]]
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}


@pytest.fixture(params=MODELS)
def plain(request):
    """The model as transformers runs it."""
    return MODELS[request.param]()


@pytest.fixture(params=["native", "hf"])
def model(request, plain):
    made = copy.deepcopy(plain)
    made.engine = request.param
    if request.param == "native":
        made.set_attn_implementation(attention.NAME)
    return made


def sample(model, prompts=PROMPTS, **changes):
    settings = {
        "engine": model.engine,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "end_ids": [1],
        "pad_id": 0,
        "seed": 0,
    }
    return generate(model, prompts, **(settings | changes))


@torch.no_grad()
def greedy_by_hand(plain, prompt, length, stops):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def test_greedy_in_a_batch_equals_the_uncached_argmax_of_each_row(model, plain):
    expected = [greedy_by_hand(plain, prompt, 8, {1}) for prompt in PROMPTS]
    assert sample(model, temperature=0).responses == expected
    assert sample(model, temperature=0, batch_size=2).responses == expected
    assert sample(model, temperature=0, pad_id=3).responses == expected


# T28: every stop id ends a response, and the one that did is kept.
def test_t28_several_stop_ids(model, plain):
    free = sample(model, temperature=0).responses
    stops = {free[0][2], free[1][4]}
    stopped = sample(model, temperature=0, end_ids=sorted(stops))
    expected = [greedy_by_hand(plain, prompt, 8, stops) for prompt in PROMPTS]
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
def test_t2_samples_follow_the_softmax(model, plain):
    counts = torch.zeros(320)
    for seed in range(10):
        for (token,) in sample(model, [PROMPTS[0]] * 400, max_new_tokens=1, seed=seed).responses:
            counts[token] += 1
    with torch.no_grad():
        expected = plain(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
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


def test_a_row_is_sampled_the_same_whatever_stands_beside_it(model):
    if model.engine == "hf":
        pytest.skip("generate of transformers draws one stream for the whole batch")
    together = sample(model, max_new_tokens=12, end_ids=[1, 40, 90, 200])
    in_parts = sample(model, max_new_tokens=12, end_ids=[1, 40, 90, 200], batch_size=1)
    assert together == in_parts
    longer = sample(model, [*PROMPTS, [30] * 40], max_new_tokens=12, end_ids=[1, 40, 90, 200])
    assert longer.responses[:3] == together.responses


def test_tokens_are_chosen_by_inverting_the_cumulative_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).log_softmax(-1).repeat(6, 1)
    # Probabilities 0.0900, 0.2447, 0.6652, 0: cumulative 0.0900, 0.3348, 1, 1.
    uniform = torch.tensor([0.0, 0.0899, 0.0901, 0.3347, 0.3349, 0.9999999])
    assert generation.sample(logits, 1.0, uniform).tolist() == [0, 0, 1, 1, 2, 2]
    # At temperature 0.5: 0.0159, 0.1173, 0.8668.
    assert generation.sample(logits, 0.5, uniform).tolist() == [0, 1, 1, 2, 2, 2]
    never = torch.tensor([[-torch.inf, 0.0]])
    assert generation.sample(never, 1.0, torch.zeros(1)).tolist() == [1]


def test_no_prompts_no_responses(model):
    assert sample(model, []).responses == []
