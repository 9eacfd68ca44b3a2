"""Masked language modelling: which tokens are hidden, and an encoder made by it up to PPO."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from align.recipe import TokenizerSection
from data.tokenizer import prepare_tokenizer, train_encoder_tokenizer
from pipelines import stage
from pipelines.pretrain_masked import (
    Blocks,
    encoder_blocks,
    heldout_metrics,
    mask_tokens,
    masked_losses,
)
from tests import tiny
from tests.adapters import sft_adapter
from tests.finished import finish, origin, pretrain_stage
from tests.stages.test_encoder_stage import rows

RECIPE = """
name: x
base: {{id: {root}/base/model}}
tokenizer: {{vocab_size: 300}}
adapter: {{r: 4, alpha: 8.0}}
data:
  root: {root}
  max_prompt_tokens: 48
  max_response_tokens: 32
  pretrain: {{train: [{{path: pairs.jsonl}}], heldout: [{{path: pairs.jsonl}}]}}
  sft: {{train: [{{path: pairs.jsonl}}]}}
  reward: {{train: [{{path: pairs.jsonl}}]}}
  prompts: {{train: [{{path: pairs.jsonl}}], heldout: [{{path: pairs.jsonl}}]}}
pretrain:
  objective: masked
  model: {{hidden_size: 32, num_layers: 2, num_heads: 4, intermediate_size: 64, max_positions: 96}}
  sequence_length: 32
  steps: 12
  batch_size: 8
  micro_batch_size: 4
  lr: 1.0e-2
reward: {{base: {{id: pretrain, pooling: mean}}, lr: 5.0e-3, batch_size: 8, micro_batch_size: 4}}
ppo:
  {{lr: 1.0e-3, steps: 1, batch_size: 4, minibatch_size: 2, max_new_tokens: 8, probe_prompts: 2}}
tracking: {{mode: disabled}}
run: {{root: {root}/runs, threads: 1, parents: {{sft: {root}/runs/x/sft}}}}
"""


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    return train_encoder_tokenizer(tiny.TEXT, TokenizerSection(vocab_size=300))


def test_from_text_to_ppo(tmp_path: Path) -> None:
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    base = pretrain_stage(tmp_path / "base", tiny.llama(), tokenizer)
    sft = tmp_path / "runs/x/sft"
    tokenizer.save_pretrained(sft_adapter(tiny.llama(), sft / "model"))
    finish(sft, "sft", **origin(base, tokenizer))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "r.yaml").write_text(RECIPE.format(root=tmp_path))
    for name in ("pretrain", "reward", "ppo"):
        assert stage.main([name, str(tmp_path / "r.yaml"), "--debug"]) == 0, name
    made = {
        name: json.loads((tmp_path / "runs/x" / name / "stage.json").read_text())
        for name in ("pretrain", "reward", "ppo")
    }
    assert [made[name]["base"]["architecture"] for name in made] == ["encoder"] * 2 + ["decoder"]
    assert [p["stage"] for p in made["reward"]["parents"]] == ["pretrain"]
    assert [p["stage"] for p in made["ppo"]["parents"]] == ["sft", "reward"]
    assert made["reward"]["base"]["sha256"] == made["pretrain"]["base"]["sha256"]
    lines = (tmp_path / "runs/x/pretrain/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert (
        losses[0] > 5.0
    )  # about log(300) = 5.7: micro-batches add up to the mean, not to twice it
    assert losses[0] < 6.5
    assert made["pretrain"]["metrics"]["loss"] < losses[0] - 0.5
    folder = tmp_path / "runs/x/pretrain/model"
    AutoModelForMaskedLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"


def test_of_every_block_as_many_tokens_are_hidden_and_never_a_special_one() -> None:
    tokenizer = encoder_tokenizer()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 300, (500, 40), generator=generator)
    ids[:, 0], ids[:, 20] = tokenizer.cls_token_id, tokenizer.sep_token_id
    shown, chosen = mask_tokens({"input_ids": ids}, tokenizer, generator)
    assert chosen.sum(1).tolist() == [6] * 500  # 15 % of 40
    assert not chosen[:, [0, 20]].any()
    assert torch.equal(shown[~chosen], ids[~chosen])
    hidden = (shown[chosen] == tokenizer.mask_token_id).float().mean().item()
    kept = (shown[chosen] == ids[chosen]).float().mean().item()
    # Of 3000 draws a share is known to 0.015 (two standard deviations).
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    again, _ = mask_tokens({"input_ids": ids}, tokenizer, generator)
    assert not torch.equal(again, shown)


def test_the_loss_is_that_of_transformers() -> None:
    tokenizer = encoder_tokenizer()
    model = tiny.bert(300)
    ids = torch.randint(4, 300, (3, 30), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    shown, chosen = mask_tokens(inputs, tokenizer, torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = masked_losses(model, inputs, tokenizer, torch.Generator().manual_seed(2))
        theirs = model(input_ids=shown, labels=ids.masked_fill(~chosen, -100)).loss
        logits = model(input_ids=shown).logits
    assert ours.pairs is None
    assert ours.hidden.mean().item() == pytest.approx(theirs.item(), abs=1e-5)
    by_hand = F.cross_entropy(logits[chosen], ids[chosen]).item()
    found = heldout_metrics(model, Blocks(ids), tokenizer, 8, seed=2)
    assert found["loss"] == pytest.approx(by_hand, abs=1e-5)
    assert set(found) == {"loss", "perplexity"}


def test_blocks_begin_with_the_token_that_classifies() -> None:
    tokenizer = encoder_tokenizer()
    first, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    documents = [[first, 7, 8, end], [9, 10, 11, end], [12, end]]
    blocks = encoder_blocks(documents, 4, tokenizer)
    assert blocks.tolist() == [[first, 7, 8, end], [first, 9, 10, 11], [first, end, 12, end]]
    assert encoder_blocks([], 4, tokenizer).shape == (0, 4)
