"""Folders of finished stages: a manifest over whatever lies in them; tiny reward models."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import align
from align.manifest import FILE, BaseFacts, Manifest, sha256_outputs, write_manifest
from align.models import base_facts
from align.recipe import StageName, TokenizerSection
from align.recipe_adapter import Adapter
from data.tokenizer import end_ids, prepare_tokenizer, template_sha256, tokenizer_sha256
from reward.model import new_reward_model
from tests import tiny
from tests.adapters import randomise, sft_adapter

ADAPTER = Adapter(r=4, alpha=8.0)

# Ends an answer with its end token and then a line break, which is no part of the answer.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\\n' + m['content'] }}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)


def finish(
    directory: Path, stage: StageName, outputs: tuple[str, ...] = ("model",), **facts: Any
) -> Manifest:
    """Write a stage's manifest; ``facts`` are those that matter to the test."""
    settings: dict[str, Any] = {
        "name": directory.parent.name,
        "seed": 0,
        "recipe_sha256": "",
        "inputs_sha256": "",
        "code_version": align.__version__,
        "versions": {},
        "base": BaseFacts(id="b", revision=None, sha256="b"),
        "tokenizer_sha256": "t",
        "template_sha256": "t",
        "pad_id": 0,
        "eos_ids": (1,),
        "parents": (),
        "data": (),
        "metrics": {},
        "wandb_id": None,
        "started": "",
        "finished": "",
    }
    manifest = Manifest(
        stage=stage, outputs=sha256_outputs(directory, outputs), **(settings | facts)
    )
    write_manifest(directory, manifest)
    return manifest


def placeholder(directory: Path, stage: StageName, content: str = "weights") -> Path:
    """Write a finished stage without a model in it."""
    (directory / "model").mkdir(parents=True, exist_ok=True)
    (directory / "model" / "w").write_text(content)
    finish(directory, stage)
    return directory


def pretrain_stage(
    directory: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Write a finished pretrain stage; return its model's folder."""
    base.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    finish(directory, "pretrain")
    return directory / "model"


def origin(base: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a manifest says about the base, the tokenizer and the template under a stage."""
    return {
        "base": base_facts(str(base), None),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "template_sha256": template_sha256(tokenizer),
        "pad_id": tokenizer.pad_token_id,
        "eos_ids": end_ids(tokenizer),
    }


def reward_stage(
    directory: Path,
    base: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Path:
    """Write a finished reward stage with random weights, a random head and its own calibration.

    Args:
        base: the folder that ``model`` was saved in; ``model`` is used up.
    """
    torch.manual_seed(seed)
    sft = sft_adapter(type(model)(model.config), directory.parent / f"start-{seed}", seed=seed)
    reward = new_reward_model(model, ADAPTER, sft, seed=seed)
    randomise(reward.classifier, seed)
    reward.head.shift.fill_(0.1 * seed)
    reward.head.scale.fill_(1.0 + 0.5 * seed)
    reward.save(directory / "model", str(base), None)
    tokenizer.save_pretrained(directory / "model")
    finish(directory, "reward", **origin(base, tokenizer))
    return directory


def sft_run(home: Path) -> tuple[Path, PreTrainedTokenizerBase]:
    """Write a base, and run x with an SFT stage; return the base's folder and the tokenizer."""
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    base = pretrain_stage(home / "base", tiny.llama(), tokenizer)
    sft = home / "runs/x/sft"
    tokenizer.save_pretrained(sft_adapter(tiny.llama(), sft / "model"))
    finish(sft, "sft", **origin(base, tokenizer))
    return base, tokenizer


def rewarded_run(home: Path) -> None:
    """Write what ``sft_run`` does, and a reward stage of run x and of run other."""
    base, tokenizer = sft_run(home)
    for seed, name in enumerate(("x", "other"), 1):
        reward_stage(home / "runs" / name / "reward", base, tiny.llama(), tokenizer, seed)


def unfinish(directory: Path) -> None:
    """Take the manifest away, as if the stage had been killed."""
    (directory / FILE).unlink()


def edit_manifest(directory: Path, **changes: Any) -> None:
    """Change what a manifest says."""
    content = json.loads((directory / FILE).read_text())
    (directory / FILE).write_text(json.dumps(content | changes))


def foreign_tokenizer() -> PreTrainedTokenizerFast:
    """Another vocabulary, other special tokens at other ids, and a beginning-of-text token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["[user]\n[assistant]\n", "kite boats Paris hello"], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


@torch.no_grad()
def plain(folder: Path, base: Path, ids: list[int]) -> float:
    """Score one row by the libraries alone: the head's output at the row's last token."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(classifier, folder / "model").eval().base_model.model
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state
    raw = model.score(hidden[:, -1]).item()
    fixed = json.loads((folder / "model" / "score.json").read_text())
    score: float = (raw - fixed["shift"]) / fixed["scale"]
    return score
