"""RMS norms in closed form: the library's own norms and autograd say what they should give."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from align.rms_norm import fuse_norms

SIZE = 12


def norm_of(kind, *, trained=True):
    torch.manual_seed(0)
    norm = kind(SIZE, eps=1e-2)  # large enough to be seen
    torch.nn.init.normal_(norm.weight)
    return norm.requires_grad_(trained)


def passes(norm, x):
    """Return output and gradients."""
    x = x.clone().requires_grad_(True)
    y = norm(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [x, *(p for p in norm.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(1, 7, SIZE), (2, 3, 5, SIZE)])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm])
def test_values_and_gradients_are_the_librarys(kind, shape, trained):
    norm, x = norm_of(kind, trained=trained), torch.randn(shape)
    fused = copy.deepcopy(norm)
    fuse_norms(fused)
    assert fused(x.requires_grad_(True)).grad_fn.name().startswith("_RmsNorm")
    theirs, ours = passes(norm, x.detach()), passes(fused, x.detach())
    assert len(ours) == 2 + trained
    assert torch.equal(ours[0], theirs[0])
    for mine, expected in zip(ours[1:], theirs[1:], strict=True):
        assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_other_norms_and_other_precisions_are_left_to_the_library(kind):
    norm, x = norm_of(kind).bfloat16(), torch.randn(1, 7, SIZE).bfloat16()
    fused = copy.deepcopy(norm)
    fuse_norms(fused)
    for mine, expected in zip(passes(fused, x), passes(norm, x), strict=True):
        assert torch.equal(mine, expected)
    whole = passes(norm.float(), x.float()), passes(fused.float(), x.float())
    assert_close(whole[1], whole[0])
