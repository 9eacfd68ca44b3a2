"""The last layer on wanted tokens alone: what plain transformers compute says what comes out."""

import pytest
import torch
from torch.testing import assert_close

from align import attention
from align.attention import KeyValueCache, Layout
from align.last_layer import narrow_last_layer
from align.trunk import layer_list
from tests import tiny

LENGTHS = [7, 1, 12]
# All of the response but its end, the end alone, and everything of a text.
SPANS = {"responses": [(3, 6), (7, 8), (9, 19)], "ends": [(6, 7), (7, 8), (19, 20)]}
SPANS["all"] = [(0, 7), (7, 8), (8, 20)]


@pytest.fixture(params=["llama", "gpt2"])
def backbones(request):
    """The same model as transformers runs it, and with the last layer narrowed."""
    make = {"llama": tiny.llama, "gpt2": tiny.gpt2}[request.param]
    theirs, ours = make(), make()
    ours.set_attn_implementation(attention.NAME)
    narrow_last_layer(ours.base_model)
    return theirs.base_model, ours.base_model


def run(backbone, ids, layout):
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return backbone(input_ids=ids, position_ids=positions, use_cache=False, layout=layout)[0][0]


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_states_and_gradients_are_those_of_each_text_alone(backbones, spans):
    theirs, ours = backbones
    torch.manual_seed(0)
    ids = torch.randint(2, 90, (1, sum(LENGTHS)))
    wanted = torch.cat([torch.arange(*span) for span in spans])
    found = run(ours, ids, Layout(LENGTHS, wanted=spans))[wanted]
    expected = torch.cat([theirs(input_ids=text)[0][0] for text in ids.split(LENGTHS, 1)])[wanted]
    assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn(found.shape)
    gradients = [
        torch.autograd.grad((states * weights).sum(), list(backbone.parameters()))
        for states, backbone in ((found, ours), (expected, theirs))
    ]
    for (name, _), mine, other in zip(ours.named_parameters(), *gradients, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_the_last_mlp_sees_the_wanted_tokens_and_the_others_see_all(backbones, spans):
    _, ours = backbones
    seen = []
    for layer in layer_list(ours)[1]:
        layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    run(ours, torch.full((1, sum(LENGTHS)), 5), Layout(LENGTHS, wanted=spans))
    assert seen[:-1] == [sum(LENGTHS)] * (len(seen) - 1)
    assert seen[-1] == sum(after - first for first, after in spans)


def test_a_cache_gets_the_keys_and_values_of_all_tokens(backbones):
    _, ours = backbones
    ids = torch.arange(5, 5 + sum(LENGTHS))[None]
    caches = []
    for wanted in (None, SPANS["ends"]):
        cache = KeyValueCache(LENGTHS, max_new_tokens=2)
        with torch.no_grad():
            run(ours, ids, Layout(LENGTHS, cache, wanted=wanted))
        caches.append(cache)
    for name in ("keys", "values"):
        whole, narrow = (getattr(cache, name) for cache in caches)
        assert whole.keys() == narrow.keys()
        for layer, expected in whole.items():
            assert_close(narrow[layer], expected, rtol=0, atol=1e-6)


def test_a_layer_that_is_given_more_than_tokens_computes_all_states(backbones):
    """A mask ``[1, 1, N, N]``, say: which of it belongs to a token is not known here."""
    _, ours = backbones
    layer = layer_list(ours)[1][-1]
    seen = []
    layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    states = torch.randn(1, sum(LENGTHS), ours.config.hidden_size)
    more = {"attention_mask": torch.ones(1, 1, sum(LENGTHS), sum(LENGTHS))}
    if hasattr(ours, "rotary_emb"):
        more["position_embeddings"] = ours.rotary_emb(states, torch.arange(sum(LENGTHS))[None])
    layer(states, layout=Layout(LENGTHS, wanted=SPANS["ends"]), **more)
    assert seen == [sum(LENGTHS)]
