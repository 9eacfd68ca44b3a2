"""The stage graph, and when a finished stage has to be done again."""

import sys
from pathlib import Path

import pytest

import align
from align import fingerprints, inputs, places, stages
from align.errors import DataError, ParentError, TrainingError
from align.fingerprints import module_file
from align.manifest import BaseFacts, Manifest, ParentFacts, sha256_outputs, write_manifest
from align.recipe import Recipe, StageName

RECIPE = {
    "name": "x",
    "base": {"id": "pretrain"},
    "tokenizer": {"vocab_size": 300},
    "data": {
        "pretrain": {"train": [{"path": "text.txt"}]},
        "sft": {"train": [{"world": "demonstrations"}]},
        "reward": {"train": [{"world": "pairs"}]},
        "prompts": {"train": [{"world": "prompts"}]},
    },
    "pretrain": {
        "lr": 0.1,
        "batch_size": 2,
        "steps": 1,
        "sequence_length": 8,
        "model": {
            "hidden_size": 8,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "intermediate_size": 8,
            "max_positions": 1024,
        },
    },
    "sft": {"lr": 0.1, "batch_size": 2},
    "reward": {"lr": 0.1, "batch_size": 2},
    "ppo": {"lr": 0.1, "batch_size": 2, "minibatch_size": 2, "steps": 1, "max_new_tokens": 2},
    "evaluate": {},
}

FILES_CHANGED = "its data or other input files have changed"


def recipe(root: Path, **changes: object) -> Recipe:
    """Return the recipe with ``section__key=value`` changes."""
    values = Recipe.model_validate(RECIPE).model_dump()
    values["run"]["root"] = str(root / "runs")
    values["data"]["root"] = str(root)
    for key, value in changes.items():
        *sections, last = key.split("__")
        here = values
        for section in sections:
            here = here[section]
        here[last] = value
    return Recipe.model_validate(values)


def finish(recipe: Recipe, stage: StageName, content: str = "weights") -> None:
    """Leave behind what a finished stage leaves."""
    directory = places.stage_directory(recipe, stage)
    (directory / "model").mkdir(parents=True, exist_ok=True)
    (directory / "model" / "w").write_text(content)
    parents = stages.read_parents(recipe, stage)
    manifest = Manifest(
        stage=stage,
        name=recipe.name,
        seed=recipe.seed,
        recipe_sha256=stages.recipe_sha256(recipe, stage),
        inputs_sha256=stages.inputs_sha256(recipe, stage, parents),
        code_version=align.__version__,
        versions={},
        base=BaseFacts(id="b", revision=None, sha256="b"),
        tokenizer_sha256="t",
        template_sha256="t",
        pad_id=0,
        eos_ids=(1,),
        parents=tuple(
            ParentFacts(stage=name, path=f"../{name}", sha256=parent.outputs_sha256())
            for name, parent in parents.items()
        ),
        data=(),
        metrics={},
        outputs=sha256_outputs(directory, ("model",)),
        wandb_id=None,
        started="",
        finished="",
    )
    write_manifest(directory, manifest)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """Return a folder whose run has all stages finished."""
    (tmp_path / "text.txt").write_text("some text\n")
    for stage in stages.STAGES:
        finish(recipe(tmp_path), stage)
    return tmp_path


def stale(recipe: Recipe) -> list[str]:
    return [stage for stage in stages.STAGES if stages.why_not_done(recipe, stage) is not None]


def test_order_and_parents(tmp_path: Path) -> None:
    whole = recipe(tmp_path)
    assert stages.planned_stages(whole) == ("pretrain", "sft", "reward", "ppo", "evaluate")
    parents = {stage: stages.parent_stages(whole, stage) for stage in stages.STAGES}
    assert parents == {
        "pretrain": (),
        "sft": ("pretrain",),
        "reward": ("pretrain", "sft"),
        "ppo": ("pretrain", "sft", "reward"),
        "evaluate": ("pretrain", "sft", "reward", "ppo"),
    }
    by_function = recipe(tmp_path, reward=None, ppo__reward="data.judge:gold")
    assert stages.parent_stages(by_function, "ppo") == ("pretrain", "sft")
    assert stages.parent_stages(by_function, "evaluate") == ("pretrain", "sft", "ppo")


def test_a_stage_of_another_run_is_a_parent_but_not_made(tmp_path: Path) -> None:
    elsewhere = recipe(tmp_path, sft=None, run__parents__sft=str(tmp_path / "other" / "sft"))
    assert stages.planned_stages(elsewhere) == ("pretrain", "reward", "ppo", "evaluate")
    assert stages.parent_stages(elsewhere, "reward") == ("pretrain", "sft")
    assert places.stage_directory(elsewhere, "sft") == tmp_path / "other" / "sft"


def test_nothing_is_done_at_first_and_everything_when_finished(tmp_path: Path, done: Path) -> None:
    assert stale(recipe(tmp_path, name="y")) == list(stages.STAGES)
    assert stages.why_not_done(recipe(tmp_path, name="y"), "sft") == "no finished result yet"
    assert stale(recipe(done)) == []


def test_a_moved_tree_is_still_done(done: Path) -> None:
    (done / "runs").rename(done / "elsewhere")
    assert stale(recipe(done, run__root=str(done / "elsewhere"))) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sft__lr": 0.2}, ["sft"]),
        ({"reward__margin": "column"}, ["reward"]),
        ({"ppo__kl__coef": 0.2}, ["ppo"]),
        ({"evaluate__prompts": 3}, ["evaluate"]),
        ({"adapter__r": 4}, ["sft", "reward", "ppo"]),
        ({"seed": 3}, list(stages.STAGES)),
        ({"evaluate__gold": "data.judge:gold"}, ["ppo", "evaluate"]),
        ({"evaluate__category": "data.judge:category"}, ["evaluate"]),
        ({"ppo__reward": ({"model": "reward", "weight": 2.0},)}, ["ppo", "evaluate"]),
        ({"run__threads": 1}, []),
        ({"tracking__mode": "disabled"}, []),
        ({"data__prompts__train": ({"world": "prompts", "rows": 3},)}, ["ppo", "evaluate"]),
    ],
)
def test_a_change_makes_those_stages_stale_that_read_it(
    done: Path, changes: dict[str, object], expected: list[str]
) -> None:
    changed = recipe(done, **changes)
    assert stale(changed) == expected
    for stage in expected:
        why = stages.why_not_done(changed, stage)  # type: ignore[arg-type]
        assert why == "its settings in the recipe have changed"


@pytest.mark.parametrize("source", ["sft", "pretrain"])
def test_ppo_reads_what_it_mixes_in(done: Path, source: str) -> None:
    mixing = recipe(done, ppo__ptx={"coef": 1.0, "source": source})
    assert set(inputs.stage_data(recipe(done), "ppo")) == {"prompts"}
    assert set(inputs.stage_data(mixing, "ppo")) == {"prompts", source}
    with pytest.raises(ValueError, match=rf"ppo\.ptx\.source: needs a section data\.{source}"):
        recipe(
            done,
            ppo__ptx={"coef": 1.0, "source": source},
            reward__center_on="none",
            **{f"data__{source}": None},
        )


def test_changed_data_make_their_stage_stale(done: Path) -> None:
    (done / "text.txt").write_text("other text\n")
    assert stale(recipe(done)) == ["pretrain"]
    assert stages.why_not_done(recipe(done), "pretrain") == FILES_CHANGED


def test_a_redone_parent_makes_its_children_stale(done: Path) -> None:
    finish(recipe(done), "sft", "other weights")
    assert stale(recipe(done)) == ["reward", "ppo", "evaluate"]
    assert stages.why_not_done(recipe(done), "ppo") == "its parent sft has changed"
    finish(recipe(done), "sft")
    assert stale(recipe(done)) == []


def test_another_version_of_the_code_makes_a_stage_stale(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align, "__version__", "9.9.9")
    assert stages.why_not_done(recipe(done), "sft") == "made by Align 0.1.0, this is 9.9.9"


def test_a_changed_reward_function_file_makes_ppo_stale(done: Path) -> None:
    function = done / "reward.py"
    function.write_text("def f(prompts, responses): ...")
    by_function = recipe(done, ppo__reward=f"{function}:f")
    finish(by_function, "ppo")
    assert stages.why_not_done(by_function, "ppo") is None
    function.write_text("def f(prompts, responses): return []")
    assert stages.why_not_done(by_function, "ppo") == FILES_CHANGED


def test_an_empty_evaluate_section_does_not_make_ppo_stale(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text\n")
    without = recipe(tmp_path, evaluate=None)
    for stage in stages.STAGES[:4]:
        finish(without, stage)
    assert stale(recipe(tmp_path)) == ["evaluate"]


def test_a_reward_function_in_a_module_is_an_input(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    package = done / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    for place, name in ((done / "rewards.py", "rewards"), (package / "rewards.py", "mine.rewards")):
        place.write_text("def f(prompts, responses): ...")
        by_function = recipe(done, ppo__reward=f"{name}:f")
        finish(by_function, "ppo")
        finish(by_function, "evaluate")
        assert stale(by_function) == []
        place.write_text("def f(prompts, responses): return []")
        assert stale(by_function) == ["ppo", "evaluate"]
        assert stages.why_not_done(by_function, "ppo") == FILES_CHANGED


def test_a_module_is_found_where_a_stage_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory comes last, however Python was started."""
    here, installed = tmp_path / "here", tmp_path / "installed"
    for folder in (here, installed):
        folder.mkdir()
        (folder / "rewards_of_mine.py").touch()
    monkeypatch.chdir(here)
    for path in (["", str(installed)], [str(here), str(installed)], [str(installed)]):
        monkeypatch.setattr(sys, "path", path)
        assert module_file("rewards_of_mine") == installed / "rewards_of_mine.py"
    monkeypatch.setattr(sys, "path", [])
    assert module_file("rewards_of_mine") == here / "rewards_of_mine.py"
    assert [module_file(name) for name in ("nowhere", "rewards_of_mine.x", "data.judge")] == [
        None
    ] * 3


def test_a_category_file_is_no_input_of_ppo(done: Path) -> None:
    file = done / "category.py"
    file.write_text("def f(prompts): ...")
    judged = recipe(done, evaluate__category=f"{file}:f")
    assert inputs.named_files(judged, "ppo") == {}
    assert inputs.named_files(judged, "evaluate") == {"evaluate.category": file}


@pytest.mark.parametrize("key", ["base", "tokenizer"])
def test_a_folder_with_a_model_is_an_input(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "text.txt").write_text("some text\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    changes: dict[str, object] = {f"{key}__id": str(folder), "tokenizer__vocab_size": None}
    if key == "base":
        changes["pretrain"] = None
    local = recipe(tmp_path, **changes)
    made = stages.planned_stages(local)
    for stage in made:
        finish(local, stage)
    read = [stage for stage in made if stage != "evaluate" or key == "base"]

    def redone() -> list[str]:
        return [stage for stage in made if stages.why_not_done(local, stage) is not None]

    assert redone() == []
    (folder / "README.md").write_text("nothing to load")
    assert redone() == []
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert redone() == read
    (folder / "model.safetensors").write_bytes(b"weights")
    assert redone() == []
    (folder / "tokenizer.json").write_text("{}")
    assert redone() == read


def test_large_weights_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_WHOLE", 1000)
    file = tmp_path / "model.safetensors"
    content = bytearray(3 * 2**20)
    file.write_bytes(content)
    hashes = {fingerprints.folder_sha256(tmp_path)}
    # The header's end, the last byte, and a change all over.
    for place in (2**20 - 1, 3 * 2**20 - 1, slice(2**20, None, 1000)):
        changed = bytearray(content)
        changed[place] = b"x" * len(range(len(content))[place]) if isinstance(place, slice) else 1
        file.write_bytes(changed)
        hashes.add(fingerprints.folder_sha256(tmp_path))
    file.write_bytes(content + b"x")
    hashes.add(fingerprints.folder_sha256(tmp_path))
    assert len(hashes) == 5


def test_the_revision_of_a_hub_data_set_counts(done: Path) -> None:
    def prompts(name: str) -> Recipe:
        return recipe(done, data__prompts__train=({"hub": name},))

    for stage in ("ppo", "evaluate"):
        finish(prompts("org/set@v1"), stage)  # type: ignore[arg-type]
    assert stale(prompts("org/set@v1")) == []
    assert stale(prompts("org/set@v2")) == ["ppo", "evaluate"]


def test_a_missing_output_makes_its_stage_stale(done: Path) -> None:
    (places.stage_directory(recipe(done), "reward") / "model" / "w").unlink()
    assert stages.why_not_done(recipe(done), "reward") == "its output model/w is missing"


def test_data_files_that_cannot_be_read(tmp_path: Path) -> None:
    finished = recipe(tmp_path)
    assert finished.data.pretrain is not None
    (source,) = finished.data.pretrain.train
    with pytest.raises(DataError, match=r"text\.txt: no such file"):
        inputs.source_fingerprint(finished, source)
    (tmp_path / "text.txt").touch()
    with pytest.raises(DataError, match="is empty"):
        inputs.source_fingerprint(finished, source)
    (tmp_path / "text.txt").unlink()
    (tmp_path / "text.txt").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        inputs.source_fingerprint(finished, source)


def test_reading_parents_names_the_one_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match=r"runs/x/pretrain: no finished pretrain stage here"):
        stages.read_parents(recipe(tmp_path), "sft")


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_a_base_that_can_only_be_a_folder_has_to_be_one(tmp_path: Path, base: str) -> None:
    changed = recipe(tmp_path)
    changed = changed.model_copy(update={"base": changed.base.model_copy(update={"id": base})})
    with pytest.raises(DataError, match=f"base.id={base}: no such folder"):
        inputs.named_files(changed, "sft")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base__gradient_checkpointing", True),
        ("pretrain__micro_batch_size", 1),
        ("sft__micro_batch_size", 1),
        ("sft__log_every", 3),
        ("reward__micro_batch_size", 1),
        ("ppo__micro_batch_size", 1),
        ("ppo__max_tokens_per_microbatch", 100),
        ("ppo__rollout__batch_size", 1),
    ],
)
def test_what_only_moves_memory_or_the_log_redoes_nothing(
    done: Path, key: str, value: object
) -> None:
    assert stale(recipe(done, **{key: value})) == []


def test_with_plain_transformers_the_batches_of_sampling_decide_its_result(done: Path) -> None:
    hashes = {
        stages.recipe_sha256(recipe(done, ppo__rollout={"engine": "hf", "batch_size": rows}), "ppo")
        for rows in (1, 2)
    }
    assert len(hashes) == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "runs/x/sft/metrics.jsonl"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        TrainingError("step 3: the checkpoint could not be written: No space left on device"),
    ],
    ids=["metrics", "model", "checkpoint"],
)
def test_a_full_disk_is_told_with_what_to_do(error, capsys):
    from pipelines.last_words import tell

    assert tell("sft", error) == 1
    said = capsys.readouterr().err
    assert str(error) in said
    assert said.endswith("Free some space; the same command goes on from the last checkpoint\n")
