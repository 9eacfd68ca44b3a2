"""PPO-ptx: the policy's loss on demonstrations and plain text, beside transformers' own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing

from align.errors import DataError, InputError
from align.manifest import BaseFacts
from align.recipe import Recipe, TokenizerSection
from align.recipe_ppo import Ppo
from align.roles import Roles
from data.collate import collate_demonstrations
from data.load import LoadedData
from data.records import Demonstration, Message, Text
from data.render import Renderer
from data.tokenizer import end_ids, prepare_tokenizer
from pipelines.load_roles import LoadedRoles
from pipelines.ptx import Ptx
from pipelines.stage import Console, StageJob
from tests import adapters, tiny

USER, ASSISTANT = "user", "assistant"


def demonstration(*turns):
    roles = (USER, ASSISTANT) * len(turns)
    return Demonstration(tuple(Message(r, t) for r, t in zip(roles, turns, strict=False)))


DEMONSTRATIONS = (
    demonstration("hello", "Hello, Mira!"),
    demonstration("What is red?", "The kite."),
    demonstration("Say a", "a", "now b", "b and c"),  # two turns to learn
    demonstration("Tom", "has a red kite and two blue boats."),
)
TEXTS = (Text("Tom has a red kite."), Text("Paris"), Text("The kite is in the garden. " * 9))


def recipe(**limits):
    source = [{"path": "unused"}]
    data = {"sft": {"train": source}, "pretrain": {"train": source}}
    return Recipe.model_validate(
        {
            "name": "x",
            "seed": 3,
            "base": {"id": "tiny"},
            "data": data | {"max_prompt_tokens": 40, "max_response_tokens": 24} | limits,
        }
    )


@pytest.fixture(params=[tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def world(request, tmp_path):
    """The roles, and a copy of the policy that is plain transformers and PEFT."""
    folder = adapters.sft_adapter(request.param(), tmp_path / "sft", seed=1)
    roles = Roles(request.param(), {"policy": folder}, trainable=("policy",))
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    loaded = LoadedRoles(
        roles,
        BaseFacts(id="tiny", revision=None, sha256=""),
        tokenizer,
        Renderer(tokenizer, 40, 24),
        end_ids(tokenizer),
        tokenizer.pad_token_id,
    )
    plain = PeftModel.from_pretrained(request.param(), folder, is_trainable=True)
    return SimpleNamespace(loaded=loaded, roles=roles, plain=plain, folder=tmp_path)


def ptx(world, records, source="sft", *, batch_size=4, ppo=None, **limits):
    data = {source: LoadedData(records, (), ())}
    job = StageJob(recipe(**limits), "ppo", world.folder, {}, data, Console(quiet=True))
    section = {"lr": 1.0, "steps": 1, "batch_size": 8, "minibatch_size": 8, "max_new_tokens": 4}
    section["ptx"] = {"coef": 1.0, "source": source, "batch_size": batch_size}
    return Ptx(job, world.loaded, Ppo.model_validate(section | (ppo or {})))


def whole_loss(ptx, roles, step):
    return sum(ptx.losses(roles, step))


def test_loss_and_gradient_on_demonstrations_are_those_of_supervised_tuning(world):
    loss = whole_loss(ptx(world, DEMONSTRATIONS), world.roles, 0)
    rows = [world.loaded.renderer.demonstration(d.messages) for d in DEMONSTRATIONS]
    batch = collate_demonstrations(rows, pad_id=0)
    expected = world.plain(**batch).loss  # the mean over all labels of the batch
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    loss.backward()
    expected.backward()
    trained = [p.grad for p in world.roles.role_parameters("policy")]
    reference = [p.grad for name, p in world.plain.named_parameters() if "lora_" in name]
    assert len(trained) == len(reference) > 0
    for ours, theirs in zip(trained, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cut", [{"micro_batch_size": 1}, {"max_tokens_per_microbatch": 50}])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(world, cut):
    whole_loss(ptx(world, DEMONSTRATIONS), world.roles, 0).backward()
    policy = world.roles.role_parameters("policy")
    expected = [p.grad for p in policy]
    total, count = 0.0, 0
    for p in policy:
        p.grad = None
    for loss in ptx(world, DEMONSTRATIONS, ppo=cut).losses(world.roles, 0):
        loss.backward()
        total, count = total + loss.item(), count + 1
    assert 1 < count <= 4
    whole = whole_loss(ptx(world, DEMONSTRATIONS), world.roles, 0).item()
    assert total == pytest.approx(whole, rel=1e-5)
    for p, gradient in zip(policy, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_processes_share_a_batch_and_its_loss(world, monkeypatch):
    made = ptx(world, DEMONSTRATIONS, ppo={"max_tokens_per_microbatch": 52})
    whole = [loss.item() for loss in made.losses(world.roles, 0)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts, even = [], []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        parts.append([loss.item() for loss in made.losses(world.roles, 0)])
        even.append([loss.item() for loss in made.losses(world.roles, 0, in_step=True)])
    assert sum(map(sum, parts)) == pytest.approx(sum(whole), rel=1e-5)
    assert len(parts[0]) != len(parts[1])
    assert len(even[0]) == len(even[1])
    assert [[loss for loss in losses if loss] for losses in even] == parts


def test_loss_on_plain_text_is_language_modelling_up_to_the_limit(world):
    loss = whole_loss(ptx(world, TEXTS, "pretrain", batch_size=3), world.roles, 0)
    total, count = 0.0, 0
    for record in TEXTS:
        ids = world.loaded.tokenizer(record.text)["input_ids"]
        row = torch.tensor([[*ids, 1]])[:, :64]  # its end token, if there is room
        total += world.plain(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    assert len(world.loaded.tokenizer(TEXTS[2].text)["input_ids"]) > 64
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_rows_are_drawn_in_an_order_that_depends_on_seed_and_step_alone(world):
    first, again = (ptx(world, DEMONSTRATIONS, batch_size=1) for _ in range(2))
    epoch = [whole_loss(first, world.roles, step).item() for step in range(8)]
    # Every row once in each half, and step 6 is the same without the steps before.
    assert sorted(epoch[:4]) == pytest.approx(sorted(epoch[4:]))
    assert len(set(epoch[:4])) == 4
    assert whole_loss(again, world.roles, 6).item() == epoch[6]


def test_text_gets_the_token_that_the_tokenizer_begins_with(world):
    tokenizer = world.loaded.tokenizer
    ids = tokenizer(TEXTS[0].text)["input_ids"]
    tokenizer.bos_token = tiny.END
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tiny.END} $A", special_tokens=[(tiny.END, 1)]
    )
    loss = whole_loss(ptx(world, TEXTS[:1], "pretrain", batch_size=1), world.roles, 0)
    row = torch.tensor([[1, *ids, 1]])
    assert loss.item() == pytest.approx(
        world.plain(input_ids=row, labels=row).loss.item(), rel=1e-5
    )


def test_rows_that_cannot_be_learned_from_are_counted_and_too_many_refused(world):
    too_long = replace(demonstration("hello", "kite " * 40), origin="a:5")
    with pytest.raises(DataError, match=r"data\.sft: 1 of 5 rows .*too_long 1 \(a row 5\)"):
        ptx(world, (*DEMONSTRATIONS, too_long))
    with pytest.raises(DataError, match=r"data\.pretrain: 1 of 4 rows .*to_learn 1 \(a row 4\)"):
        ptx(world, (*TEXTS, Text("", "a:4")), "pretrain")
    ptx(world, (*DEMONSTRATIONS, too_long), max_dropped=0.5)


def test_rows_longer_than_the_base_has_positions_are_refused(world):
    with pytest.raises(InputError, match=r"ppo\.ptx: data\.max_prompt_tokens .* = 264 exceeds"):
        ptx(world, DEMONSTRATIONS, max_prompt_tokens=240)
