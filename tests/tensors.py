"""Comparing and drawing small tensors."""

import torch
from torch import Tensor
from torch.testing import assert_close


def close(actual: Tensor, expected: object, atol: float = 1e-6) -> None:
    """Assert that a float32 tensor has the expected numbers."""
    assert_close(actual, torch.as_tensor(expected, dtype=torch.float32), rtol=1e-5, atol=atol)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Draw from the standard normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
