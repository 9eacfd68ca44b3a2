"""The stages pretrain and sft through their real entry point, on models made in seconds."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

from align import models
from align.generation import Generated, generate
from align.manifest import BaseFacts, read_manifest
from align.models import base_location, load_causal_lm
from align.recipe import Recipe, Sft, TokenizerSection
from align.recipe_io import load_recipe
from data.collate import collate_demonstrations
from data.load import load_records
from data.records import Message, Prompt, Text
from data.render import IGNORED, Renderer, Tokens
from data.tokenizer import prepare_tokenizer
from pipelines import sft, stage
from pipelines.blocks import documents, pack
from pipelines.heldout import heldout_loss
from tests import offline_wandb, tiny

NAMES = ["Mira", "Tom", "Lena", "Omar", "Ida", "Kofi", "Ruth", "Sven"]
PLACES = ["Paris", "Oslo", "Rome", "Lima", "Cairo", "Quito", "Delhi", "Kyoto"]


def demonstrations() -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Where does {name} live?"},
                {"role": "assistant", "content": f"{name} lives in {place}."},
            ]
        }
        for name, place in zip(NAMES, PLACES, strict=True)
    ]


def settings(root: Path, **changes) -> dict:
    """Return a recipe: a short pretraining, then sft until 8 rows are known by heart."""
    small = {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 128,
        "max_positions": 128,
    }
    optimiser = {"lr": 3e-3, "batch_size": 8, "log_every": 10}
    return {
        "name": "tiny",
        "seed": 5,
        "base": {"id": "pretrain"},
        "tokenizer": {"vocab_size": 300},
        "adapter": {"r": 16, "alpha": 32},
        "data": {
            "root": str(root),
            "max_prompt_tokens": 64,
            "max_response_tokens": 48,
            "pretrain": {
                "train": [{"path": "text.jsonl"}, {"path": "sft.jsonl"}],
                "heldout": [{"path": "text.jsonl", "rows": 20}],
            },
            "sft": {"train": [{"path": "sft.jsonl"}], "heldout": [{"path": "sft.jsonl"}]},
        },
        "pretrain": optimiser | {"lr": 1e-2, "model": small, "steps": 150, "sequence_length": 32},
        "sft": optimiser | {"lr": 4e-3, "epochs": 160, "samples": 8, "weight_decay": 0.01},
        "tracking": {"mode": "disabled"},
        "run": {"root": str(root / "runs"), "threads": 1},
    } | changes


def write(root: Path, **changes) -> Path:
    """Write data files and recipe; returns the recipe's path."""
    root.mkdir(exist_ok=True, parents=True)
    texts = [f"{n} lives in {p}. {n} likes {p}." for n in NAMES for p in PLACES] * 2
    with (root / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    with (root / "sft.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in demonstrations())
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(root, **changes)))
    return path


def run(name: str, recipe: Path, *more: str) -> int:
    return stage.main([name, str(recipe), *more])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A root with both stages finished, tracked offline."""
    root = tmp_path_factory.mktemp("finished")
    recipe = write(root, tracking={"mode": "auto"})
    assert run("pretrain", recipe) == 0
    assert run("sft", recipe) == 0
    return root


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished root, for tests that change it; its recipe points into it."""
    shutil.copytree(finished, tmp_path / "copy")
    write(tmp_path / "copy")
    return tmp_path / "copy"


def make_job(tmp_path: Path, tokenizer=None, **changes) -> stage.StageJob:
    """Return an sft job on ``tests.tiny`` models, for the parts of the stage."""
    recipe = Recipe.model_validate(
        settings(tmp_path, base={"id": "unused"}, tokenizer={}, pretrain=None, **changes)
    )
    return stage.StageJob(recipe, "sft", tmp_path / "sft", {}, {}, stage.Console(quiet=True))


def some_rows() -> list[Tokens]:
    """Rows of different lengths; two learned stretches in one; pad ids (0) that are real tokens."""
    return [
        Tokens([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9]),
        Tokens([4, 0, 3, 0], [IGNORED, 0, 3, 0]),
        Tokens([10, 11, 12, 13, 14, 15, 16], [IGNORED, 11, IGNORED, IGNORED, 14, IGNORED, 16]),
        Tokens([20, 1], [IGNORED, 1]),
    ]


def naive_loss(model, rows) -> float:
    """Mean of -log p(token) over the learned tokens, one row and one token at a time."""
    terms = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        for t, label in enumerate(row.labels):
            if label != IGNORED:
                log_p = logits[t - 1] - logits[t - 1].exp().sum().log()
                terms.append(-log_p[label].item())
    return sum(terms) / len(terms)


def trainer_for(tmp_path, model, rows, **section):
    job = make_job(tmp_path, sft=settings(tmp_path)["sft"] | section)
    adapted = sft.add_adapter(model, job.recipe)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return sft.make_trainer(job, job.recipe.sft, adapted, tiny.tokenizer(), rows)


def gradients(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one optimiser step over all rows in their order."""
    size = trainer.args.per_device_train_batch_size
    data = trainer.train_dataset
    pieces = [data.select(range(i, min(i + size, len(data)))) for i in range(0, len(data), size)]
    batches = [trainer.data_collator(list(piece)) for piece in pieces]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, batch, count).item() for batch in batches)
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return loss, found


def small_stage(monkeypatch, tmp_path, **section):
    """An sft job on ``tests.tiny`` models that runs in a second."""
    path = write(tmp_path, base={"id": "unused"}, pretrain=None, tokenizer={})
    overrides = [f"sft.{key}={value}" for key, value in ({"epochs": 1} | section).items()]
    recipe = load_recipe(str(path), overrides)
    for place in (sft, models):
        monkeypatch.setattr(place, "load_causal_lm", lambda *_: tiny.llama())
    monkeypatch.setattr(sft, "base_config", lambda *_: tiny.llama().config)
    monkeypatch.setattr(
        sft, "recipe_base_facts", lambda *_: BaseFacts(id="b", revision="0123abcd", sha256="")
    )
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    monkeypatch.setattr(sft, "load_tokenizer", lambda *_: tokenizer)
    data, console = load_records(recipe, "sft"), stage.Console(quiet=True)
    return stage.StageJob(recipe, "sft", tmp_path / "runs/tiny/sft", {}, data, console)


def test_a_trained_adapter_is_saved_before_anything_is_measured(monkeypatch, tmp_path):
    def fail(*_):
        raise MemoryError("measuring")

    monkeypatch.setattr(sft, "heldout_loss", fail)
    job = small_stage(monkeypatch, tmp_path)
    with pytest.raises(MemoryError, match="measuring"):
        sft.run(job)
    PeftModel.from_pretrained(tiny.llama(), job.directory / "model")
    settings = json.loads((job.directory / "model/adapter_config.json").read_text())
    assert settings["revision"] == "0123abcd"
    assert (job.directory / "model/tokenizer.json").is_file()


def test_answers_are_sampled_in_micro_batches(monkeypatch, tmp_path):
    seen = []

    def sample(model, prompts, **settings):
        seen.append(settings["batch_size"])
        return Generated([[1]] * len(prompts), [True] * len(prompts))

    monkeypatch.setattr(sft, "generate", sample)
    sft.run(small_stage(monkeypatch, tmp_path, micro_batch_size=2))
    assert seen == [2]


class TestLoss:
    def test_uniform_model_has_log_of_vocabulary(self, tmp_path):
        model = tiny.llama()
        torch.nn.init.zeros_(model.lm_head.weight)
        assert heldout_loss(model, some_rows(), 0, 3) == pytest.approx(math.log(320), abs=1e-6)
        loss, _ = gradients(trainer_for(tmp_path, model, some_rows()))
        assert loss == pytest.approx(math.log(320), abs=1e-5)

    @pytest.mark.parametrize("section", [{}, {"packing": True}, {"micro_batch_size": 2}])
    def test_is_the_mean_over_learned_tokens(self, tmp_path, section):
        trainer = trainer_for(tmp_path, tiny.llama(), some_rows(), **section)
        loss, _ = gradients(trainer)
        assert loss == pytest.approx(naive_loss(trainer.model.eval(), some_rows()), abs=2e-5)

    @pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
    @pytest.mark.parametrize("micro", [1, 2])
    def test_packs_give_the_gradient_of_their_rows(self, tmp_path, make, micro):
        """Whatever tells the rows apart: a mask, or our attention."""
        rows = some_rows() * 12  # several packs
        settings = {"packing": True, "batch_size": 2, "micro_batch_size": micro}
        model, other = make(), make()
        for module in (*model.modules(), *other.modules()):
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        expected_loss, expected = gradients(trainer_for(tmp_path, other, rows, **settings))
        trainer = trainer_for(tmp_path, model, rows, **settings)
        assert len(trainer.train_dataset) > 1
        attention = model.config._attn_implementation
        with sft.separate_rows(trainer, model, Sft(lr=1.0, **settings)):
            assert model.config._attn_implementation == "align"
            batch = trainer.data_collator([trainer.train_dataset[0]])
            assert sum(batch["layout"].lengths) == batch["input_ids"].numel()
            assert len(batch["layout"].lengths) > 1
            loss, found = gradients(trainer)
        assert model.config._attn_implementation == attention
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)

    def test_packs_of_a_base_with_another_attention_are_told_apart_by_the_mask(self, tmp_path):
        """GPT-Neo's is not transformers' interface, though nothing in its configuration says so."""
        config = GPTNeoConfig(
            vocab_size=320,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global"], 2]],
            max_position_embeddings=256,
        )
        model, section = GPTNeoForCausalLM(config), {"packing": True, "batch_size": 2}
        trainer = trainer_for(tmp_path, model, some_rows(), **section)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        attention, collate = model.config._attn_implementation, trainer.data_collator
        with sft.separate_rows(trainer, model, Sft(lr=1.0, **section)):
            assert trainer.data_collator is collate
            loss, _ = gradients(trainer)
        assert loss == pytest.approx(naive_loss(trainer.model.eval(), some_rows()), abs=2e-5)
        assert model.config._attn_implementation == attention

    @pytest.mark.parametrize("batch_size", [1, 3, 4])
    @pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
    def test_heldout_does_not_depend_on_batches(self, make, batch_size):
        expected = naive_loss(make(), some_rows())
        assert heldout_loss(make(), some_rows(), 0, batch_size) == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("micro", [1, 2, 4])
    def test_gradients_do_not_depend_on_micro_batches(self, tmp_path, micro):
        section = {"batch_size": 4}
        whole = trainer_for(tmp_path, tiny.llama(), some_rows(), **section)
        parts = trainer_for(tmp_path, tiny.llama(), some_rows(), micro_batch_size=micro, **section)
        loss, expected = gradients(whole)
        other_loss, found = gradients(parts)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)

    def test_pads_are_neither_learned_nor_seen(self):
        rows = some_rows()
        batch = collate_demonstrations(rows, 0)
        assert (batch["labels"] != IGNORED).sum() == 3 + 3 + 3 + 1
        logits = tiny.llama()(**batch).logits
        for i, row in enumerate(rows):
            alone = tiny.llama()(input_ids=torch.tensor([row.input_ids])).logits[0]
            torch.testing.assert_close(logits[i, : len(row.input_ids)], alone)


class TestPretrain:
    def test_stream_is_documents_with_an_end_token(self):
        tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
        texts = ["Tom has a kite.", "A <|end|> in the text."]
        rows, dropped = documents([Text(text) for text in texts], tokenizer)
        assert not dropped
        assert [row.count(1) for row in rows] == [1, 1]  # what data writes is no end token
        assert [tokenizer.decode(row[:-1]) for row in rows] == texts
        stream = rows[0] + rows[1]
        assert pack(rows, 4).flatten().tolist() == stream[: len(stream) // 4 * 4]

    def test_prompts_are_documents_without_what_asks_for_an_answer(self):
        tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
        (row,), dropped = documents([Prompt((Message("user", "Say hello."),))], tokenizer)
        assert tokenizer.decode(row) == "\n\nHuman: Say hello.<|end|>"
        assert not dropped

    def test_learns_and_measures_on_heldout(self, finished):
        manifest = read_manifest(finished / "runs/tiny/pretrain", "pretrain")
        first = rows_of(finished / "runs/tiny/pretrain/metrics.jsonl")[0]
        assert first["step"] == 1
        assert first["loss"] == pytest.approx(math.log(300), rel=0.02)
        assert manifest.metrics["loss"] < 0.5 * first["loss"]
        assert manifest.metrics["perplexity"] == pytest.approx(math.exp(manifest.metrics["loss"]))

    def test_heldout_loss_is_that_of_the_saved_model(self, finished):
        folder = finished / "runs/tiny/pretrain/model"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = []
        for row in rows_of(finished / "text.jsonl")[:20]:
            ids += [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], 1]
        total = count = 0
        for start in range(0, len(ids), 32):
            block = torch.tensor([ids[start : start + 32]])
            if block.shape[1] > 1:
                with torch.no_grad():
                    logits = model(input_ids=block).logits
                total += F.cross_entropy(logits[0, :-1], block[0, 1:], reduction="sum").item()
                count += block.shape[1] - 1
        manifest = read_manifest(finished / "runs/tiny/pretrain", "pretrain")
        assert manifest.metrics["loss"] == pytest.approx(total / count, rel=1e-5)


class TestSft:
    def test_rows_known_by_heart_end(self, finished):
        manifest = read_manifest(finished / "runs/tiny/sft", "sft")
        assert manifest.metrics["eos_rate"] == 1
        assert manifest.metrics["perplexity"] < 1.1
        samples = rows_of(finished / "runs/tiny/sft/samples.jsonl")
        assert len(samples) == 8
        learned = {
            row["messages"][0]["content"]: row["messages"][1]["content"] for row in demonstrations()
        }
        right = sum(learned[s["prompt"][0]["content"]] == s["response"] for s in samples)
        assert right >= 5
        assert all(sample["ended"] for sample in samples)

    def test_manifest_says_what_it_was_made_from(self, finished):
        sft_facts = read_manifest(finished / "runs/tiny/sft", "sft")
        parent = read_manifest(finished / "runs/tiny/pretrain", "pretrain")
        assert sft_facts.base == parent.base
        assert sft_facts.tokenizer_sha256 == parent.tokenizer_sha256
        assert (sft_facts.pad_id, sft_facts.eos_ids) == (0, (1,))
        assert [p.model_dump() for p in sft_facts.parents] == [
            {
                "stage": "pretrain",
                "path": "../pretrain",
                "sha256": parent.outputs_sha256(),
                "in_chain": True,
            }
        ]
        assert set(sft_facts.outputs) == {
            f"model/{name}"
            for name in (
                "adapter_config.json",
                "adapter_model.safetensors",
                "chat_template.jinja",
                "tokenizer.json",
                "tokenizer_config.json",
            )
        }
        assert sorted(p.name for p in (finished / "runs/tiny/sft").iterdir()) == [
            "metrics.jsonl",
            "model",
            "recipe.yaml",
            "samples.jsonl",
            "stage.json",
        ]

    def test_wandb_holds_what_the_file_holds(self, finished):
        logged = finished / "runs/tiny/wandb"
        wandb_id = read_manifest(finished / "runs/tiny/sft", "sft").wandb_id
        (directory,) = logged.glob(f"*{wandb_id}")
        merged: dict[int, dict] = {}
        for row in rows_of(finished / "runs/tiny/sft/metrics.jsonl"):
            merged.setdefault(row["step"], {}).update(row)
        found = [
            {key: value for key, value in row.items() if not key.startswith("samples/")}  # a table
            for row in offline_wandb.history(directory)
        ]
        assert found == list(merged.values())

    def test_saved_recipe_reads_back_equal(self, finished):
        given = load_recipe(finished / "recipe.yaml")
        assert load_recipe(finished / "runs/tiny/recipe.yaml") == given

    def test_every_stage_keeps_the_recipe_that_it_was_made_with(self, copy):
        before = (copy / "runs/tiny/pretrain/recipe.yaml").read_text()
        job = make_job(copy / "runs/tiny", seed=9, name="runs", run={"root": str(copy)})
        assert job.log is not None
        job.close(0)
        assert load_recipe(copy / "runs/tiny/sft/recipe.yaml") == job.recipe
        assert (copy / "runs/tiny/pretrain/recipe.yaml").read_text() == before

    def test_finished_stage_is_skipped_until_forced(self, copy, capsys):
        before = (copy / "runs/tiny/sft/stage.json").stat().st_mtime_ns
        assert run("sft", copy / "recipe.yaml") == 0
        assert "finished and up to date" in capsys.readouterr().err
        assert (copy / "runs/tiny/sft/stage.json").stat().st_mtime_ns == before

    def test_same_seed_same_files_wherever(self, finished, copy):
        assert run("pretrain", copy / "recipe.yaml", "--force") == 0
        assert run("sft", copy / "recipe.yaml", "--force") == 0
        for name in ("pretrain", "sft"):
            there = read_manifest(finished / "runs/tiny" / name, name)
            here = read_manifest(copy / "runs/tiny" / name, name)
            assert here.outputs == there.outputs
            ignored = ("tokens_per_second",)
            for ours, theirs in zip(
                rows_of(copy / "runs/tiny" / name / "metrics.jsonl"),
                rows_of(finished / "runs/tiny" / name / "metrics.jsonl"),
                strict=True,
            ):
                assert {k: v for k, v in ours.items() if k not in ignored} == {
                    k: v for k, v in theirs.items() if k not in ignored
                }

    def test_packing_trains_on_every_row(self, copy):
        assert run("sft", copy / "recipe.yaml", "sft.packing=true", "sft.epochs=30") == 0
        assert read_manifest(copy / "runs/tiny/sft", "sft").metrics["perplexity"] < 2

    def test_loads_in_a_fresh_process_without_our_code(self, finished):
        script = (
            "import torch\n"
            "from peft import AutoPeftModelForCausalLM, PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "one = AutoPeftModelForCausalLM.from_pretrained('.')\n"
            "base = AutoModelForCausalLM.from_pretrained('../../pretrain/model')\n"
            "two = PeftModel.from_pretrained(base, '.')\n"
            "tokenizer = AutoTokenizer.from_pretrained('.')\n"
            "chat = [{'role': 'user', 'content': 'Where does Mira live?'}]\n"
            "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True,"
            " return_tensors='pt', return_dict=False)\n"
            "assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)\n"
            "out = one.generate(input_ids=ids, max_new_tokens=40, do_sample=False)\n"
            "print(out[0, ids.shape[1] :].tolist())\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            cwd=finished / "runs/tiny/sft/model",
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(self._greedy(finished))

    def _greedy(self, root: Path) -> list[int]:
        """Answer the same prompt greedily with our own loading and sampling."""
        recipe = load_recipe(root / "recipe.yaml")
        folder = root / "runs/tiny/sft/model"
        base = load_causal_lm(recipe, base_location(recipe))
        prompt = Renderer(sft.load_tokenizer(recipe), 64, 48).prompt(
            [Message("user", "Where does Mira live?")]
        )
        generated = generate(
            PeftModel.from_pretrained(base, folder),
            [prompt],
            max_new_tokens=40,
            temperature=0,
            end_ids=(1,),
            pad_id=0,
            engine="hf",
            seed=0,
        )
        return generated.responses[0]


class TestRefusals:
    def test_bad_row_leaves_the_old_result(self, copy, capsys):
        before = {p: p.stat().st_mtime_ns for p in (copy / "runs").rglob("*") if p.is_file()}
        (copy / "sft.jsonl").write_text('{"messages": "no list"}\n')
        assert run("sft", copy / "recipe.yaml") == 2
        assert "sft.jsonl:1" in capsys.readouterr().err
        after = {p: p.stat().st_mtime_ns for p in (copy / "runs").rglob("*") if p.is_file()}
        assert after == before

    def test_too_many_unusable_rows_leave_the_old_result(self, copy, capsys):
        assert run("sft", copy / "recipe.yaml", "data.max_response_tokens=3") == 2
        assert "response_too_long" in capsys.readouterr().err
        assert (copy / "runs/tiny/sft/stage.json").is_file()

    def test_other_template_than_the_parents(self, copy, capsys):
        template = copy / "t.jinja"
        template.write_text(
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
            "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        assert run("sft", copy / "recipe.yaml", f"tokenizer.chat_template={template}") == 2
        shown = capsys.readouterr().err
        assert "chat template" in shown
        assert "pretrain" in shown
        assert (copy / "runs/tiny/sft/stage.json").is_file()

    def test_missing_parent(self, tmp_path, capsys):
        assert run("sft", write(tmp_path)) == 2
        assert "no finished pretrain stage here" in capsys.readouterr().err

    def test_stage_without_section(self, tmp_path, capsys):
        assert run("sft", write(tmp_path, sft=None)) == 2
        assert "has no sft section; its stages: pretrain" in capsys.readouterr().err

    def test_conversations_longer_than_the_model(self, copy, capsys):
        assert run("sft", copy / "recipe.yaml", "data.max_prompt_tokens=500") == 2
        assert "548 exceeds the base's 128 positions" in capsys.readouterr().err

    def test_responses_of_later_stages_longer_than_the_model(self, copy, capsys):
        words = ["evaluate.max_new_tokens=120", "evaluate.prompts=2", "data.max_prompt_tokens=20"]
        assert run("sft", copy / "recipe.yaml", *words) == 2
        shown = capsys.readouterr().err
        assert "data.max_prompt_tokens + evaluate.max_new_tokens = 140 exceeds" in shown

    def test_loss_that_is_not_finite(self, copy, capsys):
        assert run("pretrain", copy / "recipe.yaml", "pretrain.lr=1e30") == 1
        shown = capsys.readouterr().err
        assert "pretrain: step 3:" in shown
        assert "Traceback" not in shown
        assert not (copy / "runs/tiny/pretrain/stage.json").exists()
        assert not (copy / "runs/tiny/pretrain/model").exists()

    def test_adapter_that_reloads_otherwise_is_not_finished(self, copy, capsys, monkeypatch):
        def save_wrong(model, folder, *, base, revision):
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_B[
                "default"
            ].weight.data += 1
            save(model, folder, base=base, revision=revision)
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_B[
                "default"
            ].weight.data -= 1

        save = sft.save_trained
        monkeypatch.setattr(sft, "save_trained", save_wrong)
        assert run("sft", copy / "recipe.yaml", "sft.epochs=1") == 1
        assert "does not load as what was trained" in capsys.readouterr().err
        assert not (copy / "runs/tiny/sft/stage.json").exists()

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_signal_ends_it_in_one_line(self, copy, number, code):
        shutil.rmtree(copy / "runs/tiny/pretrain")
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pipelines.stage",
                "pretrain",
                str(copy / "recipe.yaml"),
                "pretrain.steps=100000",
                "pretrain.lr=1e-6",
                "pretrain.log_every=1",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        log = copy / "runs/tiny/pretrain/metrics.jsonl"
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) > 2:
                break
            time.sleep(0.1)
        process.send_signal(number)
        _, shown = process.communicate(timeout=60)
        assert process.returncode == code
        name = signal.Signals(number).name
        last = shown.splitlines()[-1]
        assert last == f"pretrain: stopped by {name}; the same command makes what is not finished"
        assert "Traceback" not in shown
        assert not (copy / "runs/tiny/pretrain/stage.json").exists()
