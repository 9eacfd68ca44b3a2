"""Reward models with another base, tokenizer and template (T29): they score the text.

The expected text is written out by hand, tokenised by the plain tokenizer and scored by a plain
sequence classifier at its last token.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import InputError, ParentError, TrainingError
from align.functions import Chat
from align.manifest import find_manifest
from data.load import LoadedData
from data.records import Message, Prompt
from pipelines.rollout import as_chat
from pipelines.scoring import ppo_scorer
from tests.finished import TEMPLATE, edit_manifest, foreign_tokenizer, plain
from tests.reward_world import (
    PROMPTS,
    RESPONSES,
    World,
    ask,
    close,
    plain_far,
    policy_ids,
    scorer_of,
    start,
)


# T29: the sampled ids are no encoding of their text; a model with a tokenizer of its own encodes
# the text, and reads its score at the last token of that.
def test_t29_a_foreign_model_scores_the_text_rendered_its_own_way(world: World) -> None:
    scorer, loaded = scorer_of(world, [{"model": "runs/far/reward"}])
    expected = plain_far("far")
    assert ask(scorer, loaded) == close(expected)
    assert ask(scorer, loaded, [2, 0]) == pytest.approx([expected[2], expected[0]], abs=1e-5)
    # It does not read the tokens: none are given.
    chats = [as_chat(prompt) for prompt in PROMPTS]
    assert scorer(chats, RESPONSES, None).tolist() == close(expected)  # type: ignore[arg-type]


def test_foreign_models_on_one_base_share_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda location, **settings: loads.append(location) or load(location, **settings),
    )
    ensemble = ["runs/farther/reward", "runs/far/reward"]
    scorer, loaded = scorer_of(world, [{"ensemble": ensemble}, {"model": "runs/far/reward"}])
    both = zip(plain_far("far"), plain_far("farther"), strict=True)
    expected = [(a + b) / 2 + a for a, b in both]
    assert ask(scorer, loaded) == close(expected)
    assert loads == [str(world.root / "runs/far/pretrain/model")]


def test_a_model_made_on_the_same_base_in_4_bits_scores_on_a_4_bit_base_of_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, loaded = scorer_of(world, [{"model": "runs/other/reward"}])
    assert "reward1" in loaded.roles.heads  # it shares the policy's base
    before = ask(whole, loaded)
    manifest = find_manifest(Path("runs/other/reward"))
    assert manifest is not None
    edit_manifest(
        Path("runs/other/reward"), base=manifest.base.model_dump() | {"quantization": "nf4"}
    )
    kinds = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda location, **settings: (
            kinds.append(settings["quantization_config"].bnb_4bit_quant_type)
            or load(location, **settings)
        ),
    )
    scorer, loaded = scorer_of(world, [{"model": "runs/other/reward"}])
    assert "reward1" not in loaded.roles.heads
    assert kinds == ["nf4"]
    assert ask(scorer, loaded) != close(before)


def test_a_run_tree_with_its_base_can_be_moved(world: World) -> None:
    (world.root / "elsewhere").mkdir()
    (world.root / "runs/far").rename(world.root / "elsewhere/far")
    scorer, loaded = scorer_of(world, [{"model": "elsewhere/far/reward"}])
    found = ask(scorer, loaded)
    (world.root / "elsewhere/far").rename(world.root / "runs/far")
    assert found == close(plain_far("far"))


def test_a_reward_stage_without_its_base_is_refused(world: World) -> None:
    (world.root / "runs/far/pretrain").rename(world.root / "lost")
    with pytest.raises(ParentError, match=r"runs/far/reward: .* its base .* is not there; move"):
        scorer_of(world, [{"model": "runs/far/reward"}])


def test_a_base_or_tokenizer_changed_since_is_refused(world: World) -> None:
    world.far(290, seed=8).save_pretrained("runs/far/pretrain/model")
    with pytest.raises(ParentError, match=r"^runs/far/reward: its base \(.* not the one that it"):
        scorer_of(world, [{"model": "runs/far/reward"}])
    world.far(290, seed=7).save_pretrained("runs/far/pretrain/model")
    other = foreign_tokenizer()
    other.chat_template = TEMPLATE.replace("[", "(")
    other.save_pretrained("runs/far/reward/model")
    with pytest.raises(ParentError, match=r"^runs/far/reward: its chat template \("):
        scorer_of(world, [{"model": "runs/far/reward"}])


def test_a_foreign_base_without_room_is_refused(world: World) -> None:
    with pytest.raises(InputError, match=r"^runs/far/reward: data.max_prompt_tokens .* = 332 exc"):
        scorer_of(world, [{"model": "runs/far/reward"}], max_prompt_tokens=300)


def test_a_foreign_prompt_that_does_not_fit_loses_its_beginning(world: World) -> None:
    scorer, _ = scorer_of(world, [{"model": "runs/far/reward"}], max_prompt_tokens=224)
    question, answer = "kite " * 300, "boats " * 40
    chats: list[Chat] = [[{"role": "user", "content": question.strip()}]]
    found = scorer(chats, [answer.strip()], None)  # type: ignore[arg-type]
    encode = lambda text: foreign_tokenizer()(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt = encode(f"<s>[user]\n{question.strip()}\n[assistant]\n")
    response = encode(answer.strip() + "</s>")
    room = 256 - len(response)
    assert len(prompt) > 224 > room
    ids = prompt[:1] + prompt[len(prompt) - room + 1 :] + response
    expected = plain(Path("runs/far/reward"), Path("runs/far/pretrain/model"), ids)
    assert found.tolist() == pytest.approx([expected], abs=1e-5)


def test_a_response_longer_than_the_foreign_model_reads_is_judged_by_its_beginning(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer, _ = scorer_of(world, [{"model": "runs/far/reward"}])
    answer = "boats " * 300
    chats: list[Chat] = [[{"role": "user", "content": "Tom?"}]] * 2
    found = scorer(chats, [answer.strip(), answer.strip() + " boats"], None)  # type: ignore[arg-type]
    encode = lambda text: foreign_tokenizer()(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt = encode("<s>[user]\nTom?\n[assistant]\n")
    response = encode(answer.strip() + "</s>")
    assert len(prompt) > 8
    assert len(response) > 256
    # Eight tokens of the prompt, of the answer what there is room for, and the token that ends it.
    ids = prompt[:1] + prompt[-7:] + response[:247] + response[-1:]
    assert len(ids) == 256
    expected = plain(Path("runs/far/reward"), Path("runs/far/pretrain/model"), ids)
    assert found.tolist() == pytest.approx([expected, expected], abs=1e-5)
    said = capsys.readouterr()
    said_once = f"runs/far/reward: a response has {len(response)} tokens of this model, which can"
    assert (said.out + said.err).replace("\n", " ").count(said_once) == 1


def test_what_the_foreign_template_refuses_is_refused_before_training(world: World) -> None:
    job, loaded = start(world, [{"model": "runs/far/reward"}])
    assert job.recipe.ppo is not None
    system = Prompt((Message("system", "Be brief."), Message("user", "Tom?")), "a:4")
    heldout = (replace(system, origin="b:1"),)
    job.data["prompts"] = LoadedData((*PROMPTS, system), heldout, ())
    named = r"2 of 5 prompts cannot be .*: template_refuses 2 \(a row 4; b row 1\); remove"
    with pytest.raises(InputError, match=named):
        ppo_scorer(job, job.recipe.ppo, loaded)


def test_a_response_that_cannot_be_rendered_is_named(world: World) -> None:
    scorer, _ = scorer_of(world, [{"model": "runs/far/reward"}])
    chats = [as_chat(PROMPTS[0])]
    with pytest.raises(TrainingError, match=r"runs/far/reward: .* \(private_use_characters\)"):
        scorer(chats, ["\U000f0000"], None)  # type: ignore[arg-type]


def test_the_fixture_is_what_it_says(world: World) -> None:
    """Another model, other ids for the same text, and sampled ids that are no encoding of it."""
    ours, theirs = (
        AutoTokenizer.from_pretrained(f"runs/{name}/reward/model") for name in ("x", "far")
    )
    assert ours("Tom has a kite.")["input_ids"] != theirs("Tom has a kite.")["input_ids"]
    assert ours.eos_token_id != theirs.eos_token_id
    manifests = [find_manifest(Path("runs", name, "reward")) for name in ("x", "far")]
    assert len({m.base.sha256 for m in manifests if m is not None}) == 2
    _, loaded = scorer_of(world, "model")
    (_, spelled) = policy_ids(loaded, PROMPTS[:1], RESPONSES[:1])
    assert spelled[0] != loaded.renderer.response(PROMPTS[0].messages, RESPONSES[0])
