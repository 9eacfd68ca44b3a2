"""Whether a base gives in our passes what its own code gives: measured before anything is trained.

Our passes pack texts into one row and compute logits from hidden states a few at a time. A model
whose own code scales or caps its logits, or does anything else to them, would train without an
error on wrong numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.errors import InputError
from align.roles import Roles
from align.sequences import join

# Largest difference of a token's log-probability; what the check is for changes it by far more.
_TOLERANCE = {torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.5


def probe_texts(vocab_size: int) -> list[list[int]]:
    """Return two texts of token ids: packed, each has to be blind to the other."""
    return [[(7 * i * i + 3) % vocab_size for i in range(1, n)] for n in (10, 7)]


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, texts: Sequence[list[int]]) -> list[Tensor]:
    """Return each text's log-probabilities after its first token, as the model alone gives them."""
    found = []
    for text in texts:
        ids = torch.tensor([text], device=model.device)
        log_p = model.eval()(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        found.append(log_p[0, :-1].gather(1, ids[0, 1:, None])[:, 0].cpu())
    return found


@torch.no_grad()
def check_base(roles: Roles, texts: Sequence[list[int]], expected: Sequence[Tensor]) -> None:
    """Compare the log-probabilities that ``roles`` computes under its base with the model's own.

    Raises:
        InputError: they differ; the message names the model's class.
    """
    packed = join([text[:1] for text in texts], [text[1:] for text in texts]).to(roles.device)
    found = roles.logprobs("base", packed).cpu()
    worst = max(
        float((row[: len(own)] - own).abs().max()) for row, own in zip(found, expected, strict=True)
    )
    if not worst <= _TOLERANCE.get(roles.base.dtype, _LOW_PRECISION_TOLERANCE):
        raise InputError(
            f"base: log-probabilities of {type(roles.base).__name__} computed here differ from the"
            f" model's own by up to {worst:.2g}; allowed: models whose logits are what their output"
            " embedding makes of the last hidden states"
        )
