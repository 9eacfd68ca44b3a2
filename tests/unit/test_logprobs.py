"""Log-probabilities in chunks: torch's own softmax and autograd say what they should be."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from align import logprobs
from align.logprobs import head_logprobs

VOCAB, HIDDEN, TOKENS = 37, 8, 11


def by_torch(hidden, head, ids, temperature):
    distribution = torch.distributions.Categorical(logits=head(hidden) / temperature)
    return distribution.log_prob(ids), distribution.entropy()


@pytest.fixture(params=[1, 100, 10**6], ids=["token by token", "chunks", "at once"])
def inputs(request, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", request.param)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB)
    nn.init.normal_(head.weight)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    return hidden, head, torch.randint(VOCAB, (TOKENS,))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients_are_those_of_the_whole_softmax(
    inputs, temperature, train_head, with_entropy
):
    hidden, head, ids = inputs
    head.requires_grad_(train_head)
    weights = torch.randn(2, TOKENS)
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]

    def gradients(found, entropy):
        loss = (weights[0] * found).sum()
        if with_entropy:
            loss = loss + (weights[1] * entropy).sum()
        return torch.autograd.grad(loss, trained)

    expected = by_torch(hidden, head, ids, temperature)
    actual = head_logprobs(hidden, head, ids, temperature=temperature, with_entropy=with_entropy)
    assert_close(actual.logprobs, expected[0], rtol=0, atol=1e-5)
    if with_entropy:
        assert_close(actual.entropy, expected[1], rtol=0, atol=1e-5)
    else:
        assert actual.entropy is None
    for mine, theirs in zip(gradients(*actual), gradients(*expected), strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_t30_logprobs_of_a_bf16_model_are_float32(inputs):
    hidden, head, ids = inputs
    actual = head_logprobs(hidden.bfloat16(), head.bfloat16(), ids)
    assert actual.logprobs.dtype == torch.float32
    expected, _ = by_torch(hidden, head.float(), ids, 1.0)
    assert_close(actual.logprobs, expected, rtol=0, atol=0.2)


def test_no_tensor_of_tokens_times_vocabulary_outlives_a_chunk(monkeypatch):
    """The largest tensor that autograd keeps is the size of the hidden states."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 4096)
    kept = []
    head = nn.Linear(16, 2048).requires_grad_(False)
    hidden = torch.randn(64, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.append(x.numel()), x)[1], lambda x: x
    ):
        head_logprobs(hidden, head, torch.zeros(64, dtype=torch.long))
    assert max(kept) <= 64 * 16
