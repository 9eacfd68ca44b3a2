"""The loss that the recipe's keys describe, written out row by row, and its gradient.

The models of the expected values are plain transformers and PEFT; a rollout's old log-probabilities
and values are moved, so that all clips have something to do in the first step already.
"""

import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from pipelines.shaping import Estimates
from pipelines.update import Updater
from tests import tiny
from tests.unit.test_ppo_update import PROMPTS, changed, engine_of, head, load, rolled, sampled_ids

ONE_STEP = {"minibatch_size": 8, "epochs": 1}
PTX = {"ptx": {"coef": 2.5}}
KL = {"kl": {"coef": 0.0, "loss_coef": 0.7, "estimator": "k3"}}
KEYS = [
    {},
    {"clip": 0.5},
    {"dual_clip": 1.3},
    {"value_clip": None},
    {"value_clip": 0.05},
    {"value_coef": 0.9},
    {"entropy_coef": 0.3},
    {"temperature": 0.5},
    KL,
    PTX,
    {"dual_clip": 1.3, "entropy_coef": 0.3, "value_coef": 0.9, "temperature": 0.5} | KL | PTX,
]


class Gradients:
    """In an engine's place: keeps the gradients, and changes no weight."""

    loss_scale = None

    def __init__(self):
        self.seen = []

    def backward(self, loss):
        loss.backward()

    def step(self, trained):
        self.seen.append([p.grad.clone() for p in trained])
        for p in trained:
            p.grad = None
        return 1.0


class Decay:
    """In the place of language modelling: half the sum of squares, which has the gradient p."""

    def losses(self, roles, step, in_step):
        for p in roles.role_parameters("policy"):
            yield 0.5 * (p**2).sum()


def random(seed):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


def moved(loaded, section):
    """A rollout as if an older policy and critic had made it, and random estimates."""
    rollout = rolled(loaded, section)
    width = rollout.mask.shape[1]
    noise = [random(seed)[:, :width] for seed in range(5)]
    estimates = Estimates(noise[0], rollout.values + noise[1], section.kl.loss_coef, {})
    moved = replace(
        rollout,
        logprobs=rollout.logprobs + 0.6 * noise[2],
        ref_logprobs=rollout.ref_logprobs + 0.4 * noise[3],
        values=rollout.values + 0.3 * noise[4],
    )
    return moved, estimates


class ByHand:
    """Policy and critic without anything of ours, and their loss on a rollout."""

    def __init__(self, loaded, folder, trunk):
        self.prompts = [loaded.renderer.prompt(prompt.messages) for prompt in PROMPTS]
        policy, critic = (
            PeftModel.from_pretrained(tiny.llama(), folder / name, is_trainable=True).eval()
            for name in ("sft", "rm")
        )
        models = [policy, critic] if trunk == "own" else [policy]
        self.policy, self.critic = policy, models[-1]
        self.head = torch.nn.Parameter(head().weight.detach().clone())
        lora = [[p for n, p in m.named_parameters() if "lora_" in n] for m in models]
        self.lora, self.parameters = lora[0], [*(p for group in lora for p in group), self.head]

    def losses(self, rollout, estimates, section):
        """Return the loss of the policy and that of the critic, means over all tokens."""
        policy_loss, value_loss, count = torch.zeros(()), torch.zeros(()), 0
        responses = sampled_ids(rollout)
        for row, (prompt, response) in enumerate(zip(self.prompts, responses, strict=True)):
            n = len(response)
            old, reference, old_values, advantages, returns = (
                x[row, :n]
                for x in (
                    rollout.logprobs,
                    rollout.ref_logprobs,
                    rollout.values,
                    estimates.advantages,
                    estimates.returns,
                )
            )
            ids = torch.tensor([prompt + response])
            before = slice(len(prompt) - 1, -1)  # what stands before each token
            logits = self.policy(ids).logits[0, before] / section.temperature
            logprobs = torch.log_softmax(logits, -1)
            new = logprobs[range(n), response]

            ratio = (new - old).exp()
            limited = ratio.clamp(1 - section.clip, 1 + section.clip)
            gain = torch.minimum(ratio * advantages, limited * advantages)
            if section.dual_clip is not None:
                floor = torch.maximum(gain, section.dual_clip * advantages)
                gain = torch.where(advantages < 0, floor, gain)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            kl = (reference - new).exp() - 1 - (reference - new)
            loss = -gain - section.entropy_coef * entropy + section.kl.loss_coef * kl
            policy_loss = policy_loss + loss.sum()

            hidden = self.critic.get_base_model().base_model(ids).last_hidden_state[0, before]
            values = hidden @ self.head[0]
            error = (values - returns) ** 2
            if section.value_clip is not None:
                near = old_values + (values - old_values).clamp(
                    -section.value_clip, section.value_clip
                )
                error = torch.maximum(error, (near - returns) ** 2)
            value_loss = value_loss + 0.5 * error.sum()
            count += n
        return policy_loss / count, value_loss / count

    def gradients(self, rollout, estimates, section):
        policy_loss, value_loss = self.losses(rollout, estimates, section)
        loss = policy_loss + section.value_coef * value_loss
        found = list(torch.autograd.grad(loss, self.parameters))
        if section.ptx is not None:
            for i, p in enumerate(self.lora):
                found[i] = found[i] + section.ptx.coef * p.detach()
        return found


def same(ours, theirs):
    """Whether two lists of gradients are the same up to a percent."""
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in pairs)


@pytest.fixture(scope="module", params=["own", "policy"])
def models(request, tmp_path_factory):
    """Where the critic's states come from, the roles, and the same by hand; no test moves them."""
    folder = tmp_path_factory.mktemp("models")
    loaded = load(tiny.llama, folder, trunk=request.param)
    return request.param, loaded, ByHand(loaded, folder, request.param)


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_the_gradient_is_that_of_the_loss_written_out(keys, models):
    trunk, loaded, by_hand = models
    section = changed(**ONE_STEP, **keys, value={"trunk": trunk})
    rollout, estimates = moved(loaded, section)
    engine, ptx = Gradients(), Decay() if section.ptx is not None else None
    updater = Updater(loaded.roles, engine, section, ptx=ptx, tolerance=math.inf)
    metrics = updater.update(rollout, estimates, seed=0)

    (found,) = engine.seen
    expected = by_hand.gradients(rollout, estimates, section)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        _, value_loss = by_hand.losses(rollout, estimates, section)
    assert metrics["ppo/value_loss"] == pytest.approx(float(value_loss), rel=1e-4)
    # Every key that is set matters: without it the gradient is another.
    for key in keys:
        others = {k: v for k, v in keys.items() if k != key}
        without = changed(**ONE_STEP, **others, value={"trunk": trunk})
        assert not same(by_hand.gradients(rollout, estimates, without), expected), key


@pytest.mark.parametrize(("value_lr", "rates"), [(None, (1e-3, 1e-3)), (3e-3, (1e-3, 3e-3))])
def test_policy_and_critic_have_their_own_learning_rates(value_lr, rates, tmp_path):
    """Adam's first step is as long as its rate, whatever the gradient."""
    loaded = load(tiny.llama, tmp_path)
    section = changed(value_lr=value_lr, max_grad_norm=1e6)
    engine = engine_of(loaded, section)
    groups = [loaded.roles.role_parameters(role) for role in ("policy", "value")]
    before = [[p.detach().clone() for p in group] for group in groups]
    for p in engine.parameters:
        p.grad = torch.full_like(p, 2.0)
    engine.step(engine.parameters)
    for rate, group, old in zip(rates, groups, before, strict=True):
        for p, was in zip(group, old, strict=True):
            assert_close(was - p, torch.full_like(p, rate), rtol=1e-3, atol=0)
