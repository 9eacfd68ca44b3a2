"""The reward stage's loss of a batch, against plain transformers and hand arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from align.errors import InputError
from align.recipe_adapter import Adapter
from align.recipe_reward import Reward
from data.records import Message, Ranking
from pipelines.ranked_tokens import RankedTokens, collate
from pipelines.reward_loss import output_head, reward_loss
from reward.model import new_reward_model
from tests import tiny
from tests.adapters import sft_adapter

HI = (Message("user", "hi"),)
# The best responses are [8, 9, 1] and [5, 1]; the third ranking is all tied.
ROWS = [
    RankedTokens([2, 3], ([4, 1], [8, 9, 1]), Ranking(HI, ("a", "b"), (0.0, 1.0))),
    RankedTokens([7], ([5, 1], [6, 6, 1], [4, 1]), Ranking(HI, ("a", "b", "c"), (2.0, 0.0, 1.0))),
    RankedTokens([9], ([5, 1], [6, 1]), Ranking(HI, ("a", "b"), (1.0, 1.0))),
]


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_the_auxiliary_loss_is_that_of_the_best_responses(make, tmp_path) -> None:
    folder = sft_adapter(make(), tmp_path / "sft")
    base: PreTrainedModel = make()
    head = output_head(base)
    expected = []
    model = new_reward_model(base, Adapter(r=4, alpha=8.0), folder, seed=3)
    for row in ROWS[:2]:
        ids = torch.tensor([row.prompt + row.responses[row.best]])
        states = model.states(ids, torch.ones_like(ids, dtype=torch.bool))
        log_p = F.log_softmax(head(states).float(), dim=-1)[0]
        start = len(row.prompt)
        picked = [log_p[i - 1, ids[0, i]] for i in range(start, ids.shape[1])]
        expected.append(-sum(picked) / len(picked))

    def loss(**changes: float) -> float:
        section = Reward(lr=1.0, batch_size=4, **changes)
        batch = collate(ROWS, 0)
        value, _ = reward_loss(section, model, batch, lm_head=head, num_rankings=None)
        return value.item()

    added = loss(aux_lm_coef=0.5) - loss()
    assert added == pytest.approx(0.5 * (expected[0] + expected[1]).item() / 2, abs=1e-5)


def test_the_output_embeddings_stay_as_they_are(tmp_path) -> None:
    folder = sft_adapter(tiny.llama(), tmp_path / "sft")
    base = tiny.llama()
    head = output_head(base)
    before = head.weight.clone()
    model = new_reward_model(base, Adapter(r=4, alpha=8.0), folder, seed=3)
    section = Reward(lr=1.0, batch_size=4, aux_lm_coef=1.0)
    loss, _ = reward_loss(section, model, collate(ROWS, 0), lm_head=head, num_rankings=None)
    loss.backward()
    assert head.weight.grad is None
    assert torch.equal(head.weight, before)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_model_that_scales_its_logits_has_no_auxiliary_loss() -> None:
    base = tiny.llama()
    own = base.forward

    def scaled(*arguments, **settings):
        output = own(*arguments, **settings)
        output.logits = output.logits * 2
        return output

    base.forward = scaled
    with pytest.raises(InputError, match=r"reward\.aux_lm_coef: .* differ from its own"):
        output_head(base)


def test_the_batch_says_where_the_best_responses_are() -> None:
    batch = collate(ROWS, 0)
    found = [batch["input_ids"][i][batch["best_mask"][i]].tolist() for i in range(7)]
    assert found == [[], [8, 9, 1], [5, 1], [], [], [5, 1], []]
    assert batch["votes"].isnan().all()
