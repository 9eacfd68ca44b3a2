"""What is measured on answers and rankings, against plain loops on a tiny model."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from align.manifest import BaseFacts
from align.recipe import Evaluate, TokenizerSection
from align.recipe_ppo import Ppo
from align.roles import Roles
from data.load import LoadedData
from data.records import Message, Prompt, Ranking
from data.render import Renderer
from data.tokenizer import end_ids, prepare_tokenizer
from pipelines import evaluate
from pipelines.answers import Answers, answer, answer_metrics
from pipelines.load_roles import LoadedRoles
from reward.head import ScoreHead
from tests import adapters, tiny

PROMPTS = [
    Prompt((Message("user", text),))
    for text in ("Say hello to Mira.", "Tom?", "What is the capital of France?", "Hello!")
]


@pytest.fixture
def folders(tmp_path):
    return {
        role: adapters.sft_adapter(tiny.llama(), tmp_path / role, seed=seed)
        for seed, role in enumerate(("reference", "policy", "reward"), 1)
    }


@pytest.fixture
def loaded(folders):
    head = ScoreHead(32)
    head.weight.data = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    return LoadedRoles(
        Roles(tiny.llama(), folders, heads={"reward": head}),
        BaseFacts(id="tiny", revision=None, sha256=""),
        tokenizer,
        Renderer(tokenizer, 64, 64),
        end_ids(tokenizer),
        tokenizer.pad_token_id,
    )


def section(**changes):
    return Evaluate(**({"max_new_tokens": 6, "batch_size": 3, "bootstrap": 50} | changes))


@torch.no_grad()
def logprob(model, prompt, response, temperature):
    """The log-probability of one response without padding, one token after another."""
    total = 0.0
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1]
        total += torch.log_softmax(logits / temperature, -1)[token].item()
    return total


def job_of(num_heldout, **ppo):
    values = {"lr": 1.0, "batch_size": 2, "minibatch_size": 2, "steps": 1, "max_new_tokens": 4}
    section = Ppo.model_validate(values | {"probe_prompts": 3} | ppo)
    rows = tuple(Prompt((Message("user", str(number)),)) for number in range(num_heldout))
    data = {"prompts": LoadedData((), rows, ())}
    recipe = SimpleNamespace(ppo=section)
    return SimpleNamespace(recipe=recipe, data=data, parents={"ppo": None})


@pytest.mark.parametrize(
    ("ppo", "expected", "num_selected_on"),
    [
        ({}, "0123", 0),
        ({"keep": "best"}, "3456", 0),
        ({"heldout_reward": "m:f", "stop": {"divergence": 0.1}}, "3456", 0),
        ({"keep": "best", "probe_prompts": 5}, "5601", 2),
        ({"keep": "best", "probe_prompts": 64}, "0123", 4),
    ],
)
def test_prompts_on_which_ppo_selected_come_last_and_are_counted(ppo, expected, num_selected_on):
    chosen, seen = evaluate._heldout_prompts(job_of(7, **ppo), section(prompts=4))
    assert "".join(prompt.messages[0].content for prompt in chosen) == expected
    assert seen == num_selected_on
    job = job_of(7, **ppo)
    job.parents.clear()  # no policy was selected here
    chosen, seen = evaluate._heldout_prompts(job, section(prompts=4))
    assert "".join(prompt.messages[0].content for prompt in chosen) == "0123"
    assert seen == 0


def ask(loaded, role, settings, scorer=None, gold=None):
    return answer(loaded, role, PROMPTS, settings, seed=3, scorer=scorer, gold=gold)


def test_kl_is_the_sum_over_tokens_at_the_sampling_temperature(loaded, folders):
    # Many stop tokens: answers of different lengths, padded in one batch.
    stopping = replace(loaded, end_ids=tuple(range(1, 80)))
    given = ask(stopping, "policy", section(temperature=0.7))
    assert len({len(ids) for ids in given.ids[:3]}) > 1
    models = [PeftModel.from_pretrained(tiny.llama(), folders[r]) for r in ("policy", "reference")]
    expected = []
    for prompt, ids in zip(PROMPTS, given.ids, strict=True):
        rendered = loaded.renderer.prompt(prompt.messages)
        ours, theirs = (logprob(model.eval(), rendered, ids, 0.7) for model in models)
        expected.append(ours - theirs)
    assert max(map(abs, expected)) > 0.1
    assert given.log_ratios == pytest.approx(expected, abs=1e-4)
    metrics = answer_metrics(given, None, resamples=10, seed=0)
    assert metrics["kl/mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)


def test_sft_has_no_kl_to_itself_and_greedy_answers_have_none_at_all(loaded):
    assert ask(loaded, "reference", section()).log_ratios == [0.0] * 4
    greedy = ask(loaded, "policy", section(temperature=0.0))
    assert "kl/mean" not in answer_metrics(greedy, None, resamples=10, seed=0)


def test_judges_see_the_prompts_with_their_own_answers(loaded):
    seen = []

    def scorer(chats, texts, sequences):
        assert len(sequences) == len(texts)
        return torch.tensor([float(len(chat[0]["content"])) for chat in chats])

    def gold(chats, texts):
        seen.extend(zip((chat[0]["content"] for chat in chats), texts, strict=True))
        return [0.5] * len(texts)

    given = ask(loaded, "policy", section(), scorer, gold)
    assert given.scores == [float(len(p.messages[0].content)) for p in PROMPTS]
    assert seen == [(p.messages[0].content, t) for p, t in zip(PROMPTS, given.texts, strict=True)]


def test_measures_of_four_answers_by_hand():
    answers = Answers(
        ids=[[5, 6, 1], [1], [7] * 8, [2, 3, 4, 5]],
        texts=["ab", "", "aaaaaaaa", "cdef"],
        ended=[True, True, False, False],
        log_ratios=[2.0, 0.0, 5.0, 1.0],
        scores=None,
        gold=[1.0, 0.0, 0.25, 0.75],
    )
    metrics = answer_metrics(answers, ["a", "b", "a", "b"], resamples=20, seed=0)
    low, high = metrics.pop("gold/low"), metrics.pop("gold/high")
    assert low <= 0.5 <= high
    assert metrics == {
        "length/mean": 4.0,
        "eos_rate": 0.5,
        "empty_rate": 0.25,
        "repetitive_rate": 0.25,
        "kl/mean": 2.0,
        "gold/mean": 0.5,
        "gold/a": 0.625,
        "gold/b": 0.375,
    }


def test_win_rate_is_judged_by_gold_before_the_reward():
    def model(scores, gold):
        return Answers([[1]] * 4, ["x"] * 4, [True] * 4, None, scores, gold)

    better, equal = [2.0] * 4, [1.0, 1.0, 1.0, 0.0]
    answers = {"ppo": model(better, [1.0, 1.0, 0.5, 0.0]), "sft": model([0.0] * 4, equal)}
    # By gold: tie, tie, loss, tie.
    assert evaluate._win_rate(answers, 20, 0)["ppo/win_rate/mean"] == 0.375
    answers = {"ppo": model(better, None), "sft": model([0.0] * 4, None)}
    assert evaluate._win_rate(answers, 20, 0)["ppo/win_rate/mean"] == 1.0
    assert evaluate._win_rate({"sft": answers["sft"]}, 20, 0) == {}


def test_reward_accuracy_counts_pairs_as_a_plain_loop_does(loaded):
    rows = [
        Ranking((Message("user", "Tom?"),), ("Tom has a kite.", "No", "Hello"), (2.0, 1.0, 1.0)),
        Ranking((Message("user", "Say hello to Mira."),), ("Hello, Mira!", "Paris"), (0.0, 1.0)),
        Ranking((Message("user", "Hello!"),), ("How are you?", "red boats"), (1.0, 0.0)),
    ]
    judged = {"Tom has a kite.": 1.0, "No": 0.5, "Hello": 0.0, "Hello, Mira!": 1.0, "Paris": 0.0}
    gold = lambda chats, texts: [judged.get(text, 0.3) for text in texts]  # noqa: E731
    render = loaded.renderer
    rankings = [(row, [render.response(row.messages, r) for r in row.responses]) for row in rows]
    scorer = lambda chats, texts, sequences: loaded.roles.scores(sequences)  # noqa: E731
    metrics = evaluate._reward_accuracy(partial(evaluate._score, scorer, loaded), rankings, gold)

    right = longer = label_pairs = agreed = labelled = gold_pairs = 0.0
    bins = [0.0] * 10  # right answers less their probabilities, from 0.5 to 1
    for row, ids in rankings:
        prompt = render.prompt(row.messages)
        scores = [plain_score(loaded, prompt + answer) for answer in ids]
        for i, first in enumerate(row.responses):
            for j, second in enumerate(row.responses):
                if row.scores[i] > row.scores[j]:
                    label_pairs += 1
                    right += scores[i] > scores[j]
                    said = 1 / (1 + math.exp(-abs(scores[i] - scores[j])))
                    bins[int(20 * (said - 0.5))] += (scores[i] > scores[j]) - said
                    longer += half(len(ids[i]), len(ids[j]))
                if gold([], [first])[0] > gold([], [second])[0]:
                    gold_pairs += 1
                    agreed += scores[i] > scores[j]
                    labelled += half(row.scores[i], row.scores[j])
    assert (label_pairs, gold_pairs) == (4, 4)
    assert metrics["reward/pairs"] == 4
    assert metrics["reward/accuracy"] == pytest.approx(right / 4)
    assert metrics["reward/accuracy/longer_wins"] == pytest.approx(longer / 4)
    off = sum(map(abs, bins)) / 4
    assert metrics["reward/calibration/ece"] == pytest.approx(off, abs=1e-5)
    assert metrics["reward/accuracy/gold"] == pytest.approx(agreed / 4)
    assert metrics["reward/labels/gold"] == pytest.approx(labelled / 4)
    assert metrics["reward/accuracy/low"] <= right / 4 <= metrics["reward/accuracy/high"]


def half(ours, theirs):
    return 0.5 if ours == theirs else float(ours > theirs)


@torch.no_grad()
def plain_score(loaded, ids):
    """One row without padding through the reward adapter and the head."""
    base = loaded.roles.base
    base.set_attn_implementation("sdpa")
    with loaded.roles.use("reward"):
        hidden = base.base_model(torch.tensor([ids])).last_hidden_state
    base.set_attn_implementation("align")
    return float(loaded.roles.heads["reward"](hidden[0, -1]))
