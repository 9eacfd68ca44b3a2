"""The roles as they come from the folders of finished stages."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from align import lora
from align.recipe import Recipe, TokenizerSection
from align.recipe_adapter import Adapter
from align.sequences import join
from data.load import LoadedData
from data.records import Message, Prompt
from data.tokenizer import prepare_tokenizer
from pipelines import load_roles as loading
from pipelines import ppo, pretrain, reward_model, reward_start, sft
from pipelines.load_roles import load_roles
from pipelines.stage import Console, StageJob
from tests import tiny
from tests.adapters import sft_adapter
from tests.finished import plain, reward_stage

SOURCE = {"train": [{"world": "prompts"}]}


class Stop(Exception):
    """Ends a stage where it has been seen enough of."""


@pytest.fixture
def job(tmp_path: Path) -> StageJob:
    """A job whose sft stage lies there, on a base in bfloat16 that trusts remote code."""
    tiny.llama().save_pretrained(tmp_path / "base")
    model = sft_adapter(tiny.llama(), tmp_path / "runs/x/sft/model")
    prepare_tokenizer(tiny.tokenizer(), TokenizerSection()).save_pretrained(model)
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "base": {"id": str(tmp_path / "base"), "dtype": "bfloat16", "trust_remote_code": True},
            "tokenizer": {"id": "org/theirs"},
            "data": {"sft": SOURCE, "reward": SOURCE, "prompts": SOURCE}
            | {"max_prompt_tokens": 32, "max_response_tokens": 32},
            "sft": {"lr": 0.1, "batch_size": 2},
            "reward": {"lr": 0.1, "batch_size": 2, "center_on": "none"},
            "ppo": {"lr": 0.1, "batch_size": 4, "minibatch_size": 2, "steps": 1}
            | {"max_new_tokens": 8, "layout": "separate"},
            "run": {"root": str(tmp_path / "runs")},
        }
    )
    job = StageJob(recipe, "ppo", tmp_path / "runs/x/ppo", {}, {}, Console(quiet=True))
    job.parents["sft"] = None  # type: ignore[assignment]
    return job


def load(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> loading.LoadedRoles:
    monkeypatch.setattr(StageJob, "check_origin", lambda *_: None)
    sft = job.parent_folder("sft") / "model"
    folders = {"policy": sft, "reference": sft}
    return load_roles(job, folders, max_new_tokens=8, own_models=("policy",), trainable=("policy",))


def test_an_adapter_is_merged_in_float32_whatever_the_base_is_in(
    job: StageJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(job, monkeypatch)
    exact = PeftModel.from_pretrained(
        tiny.llama().bfloat16().float(), job.parent_folder("sft") / "model"
    ).merge_and_unload()
    policy = loaded.roles.model("policy").state_dict()
    for name, tensor in exact.state_dict().items():
        torch.testing.assert_close(policy[name], tensor, rtol=0, atol=1e-6)


def test_step_0_agrees_with_a_reference_on_a_base_in_bfloat16(
    job: StageJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = load(job, monkeypatch).roles
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 300, (16, 20), generator=generator).tolist()
    batch = join([row[:8] for row in ids], [row[8:] for row in ids])
    with torch.no_grad():
        kl = roles.logprobs("policy", batch) - roles.logprobs("reference", batch)
    allowed = ppo._reference_tolerance(roles, ppo._TOLERANCE["bfloat16"])
    assert 0 < float(kl.abs().max()) < allowed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_where_memory_comes_first_evaluation_copies_no_weights(
    job: StageJob, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    monkeypatch.setattr(StageJob, "check_origin", lambda *_: None)
    changes = {"dtype": "float32", "gradient_checkpointing": checkpointing}
    base = job.recipe.base.model_copy(update=changes)
    job = replace(job, recipe=job.recipe.model_copy(update={"base": base}))
    job.parents["sft"] = None  # type: ignore[assignment]
    folders = {"reference": job.parent_folder("sft") / "model"}
    roles = load_roles(job, folders, max_new_tokens=8).roles  # as evaluate does: trains nothing
    copied: list[object] = []
    monkeypatch.setattr(lora, "summed", lambda model: copied.append(model) or nullcontext())
    settings = {"temperature": 1.0, "max_new_tokens": 4, "pad_id": 0, "seed": 0}
    roles.generate("reference", [[5, 6]], end_ids=[1], **settings)
    assert bool(copied) != checkpointing


def test_a_reward_adapter_from_elsewhere_stays_on_the_base_that_it_was_trained_on(
    job: StageJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where SFT has trained all weights, whose model is a base for nothing else."""
    monkeypatch.setattr(StageJob, "check_origin", lambda *_: None)
    base = job.recipe.base.model_copy(update={"dtype": "float32"})
    changes = {"base": base, "adapter": Adapter(method="full")}
    job = replace(job, recipe=job.recipe.model_copy(update=changes))
    job.parents["sft"] = None  # type: ignore[assignment]
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    tuned, other = job.parent_folder("sft") / "model", tmp_path / "runs/other/reward"
    shutil.rmtree(tuned)
    tiny.llama(seed=5).save_pretrained(tuned)  # far from the base
    tokenizer.save_pretrained(tuned)
    reward_stage(other, tmp_path / "base", tiny.llama(), tokenizer, seed=2)
    folders = {"policy": tuned, "reference": tuned, "value": tuned, "reward1": other / "model"}
    trainable = ("policy", "value")
    loaded = load_roles(job, folders, max_new_tokens=8, own_models=trainable, trainable=trainable)
    batch = join([[5, 6, 7]], [[8, 9]])
    with torch.no_grad():
        (score,) = loaded.roles.scores(batch, "reward1").tolist()
        same = loaded.roles.logprobs("policy", batch) - loaded.roles.logprobs("reference", batch)
    assert score == pytest.approx(plain(other, tmp_path / "base", [5, 6, 7, 8, 9]), abs=1e-5)
    assert abs(score - plain(other, tuned, [5, 6, 7, 8, 9])) > 0.05
    assert float(same.abs().max()) < 1e-6


def test_a_response_ends_at_every_id_that_the_base_names(
    job: StageJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tiny.llama()
    base.config.eos_token_id = [1, 0, 40]  # a special token more, and an ordinary one
    base.save_pretrained(tmp_path / "base")
    loaded = load(job, monkeypatch)
    assert loaded.end_ids == (1, 0)

    def generate(*_: object, end_ids: tuple[int, ...], **__: object) -> None:
        assert end_ids == (1, 0)
        raise Stop

    monkeypatch.setattr(sft, "generate", generate)  # so do the samples that SFT shows
    prompt = Prompt((Message("user", "Tom?"),))
    job.data["sft"] = LoadedData((prompt,), (), ())
    with pytest.raises(Stop):
        sft._sample(job, base, loaded.renderer, 0)


def test_the_tokenizers_of_all_stages_trust_what_the_base_is_trusted_with(
    job: StageJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted = []

    def from_pretrained(location: object, **settings: object) -> None:
        trusted.append(settings.get("trust_remote_code"))
        raise Stop

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    job.data["prompts"] = LoadedData((), (), ())
    monkeypatch.setattr(reward_start, "recipe_base_facts", lambda _: None)
    for read in (
        lambda: load(job, monkeypatch),
        lambda: reward_model.run(job),
        lambda: pretrain._tokenizer(job.recipe, ()),
    ):
        with pytest.raises(Stop):
            read()
    assert trusted == [True] * 3
