"""Weights that are damaged or another model's: refused by name before anything is written."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.adapters import CONFIG, WEIGHTS, load_adapter
from align.errors import ParentError
from align.recipe import TokenizerSection
from data.tokenizer import prepare_tokenizer
from pipelines import stage
from tests import tiny
from tests.adapters import sft_adapter
from tests.finished import ADAPTER, finish, origin, pretrain_stage, reward_stage

BASE = "runs/x/pretrain/model/model.safetensors"
SFT = f"runs/x/sft/model/{WEIGHTS}"
REWARD = f"runs/x/reward/model/{WEIGHTS}"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished stages sft and reward on a base in a folder, and a recipe, ``r.yaml``."""
    monkeypatch.chdir(tmp_path)
    tokenizer = prepare_tokenizer(tiny.tokenizer(), TokenizerSection())
    base = pretrain_stage(tmp_path / "runs/x/pretrain", tiny.llama(), tokenizer)
    sft = tmp_path / "runs/x/sft"
    sft_adapter(tiny.llama(), sft / "model")
    tokenizer.save_pretrained(sft / "model")
    finish(sft, "sft", **origin(base, tokenizer))
    reward_stage(tmp_path / "runs/x/reward", base, tiny.llama(), tokenizer, seed=1)
    world = {"demonstration_rows": 8, "ranked_prompts": 8, "prompt_rows": 8, "heldout_rows": 8}
    recipe = {
        "name": "x",
        "base": {"id": "runs/x/pretrain/model"},
        "adapter": ADAPTER.model_dump(mode="json"),
        "data": {
            "sft": {"train": [{"world": "demonstrations"}]},
            "reward": {"train": [{"world": "pairs"}]},
            "prompts": {"train": [{"world": "prompts"}]},
            "max_prompt_tokens": 160,
            "max_response_tokens": 64,
            "world": world,
        },
        "sft": {"lr": 0.1, "batch_size": 2},
        "reward": {"lr": 0.1, "batch_size": 2, "center_on": "none"},
        "ppo": {"lr": 0.1, "batch_size": 4, "minibatch_size": 2, "steps": 1, "max_new_tokens": 8},
        "tracking": {"mode": "disabled"},
    }
    Path("r.yaml").write_text(json.dumps(recipe))
    return tmp_path


def refused(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a stage; return what it says in one line, after it has left every file as it was."""

    def content() -> dict[Path, str]:
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = content()
    capsys.readouterr()
    assert stage.main([name, "r.yaml"]) == 2
    assert content() == before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"{name}: "), said
    return last


def cut(content: bytes) -> bytes:
    return content[:-100]


def header_beyond_the_file(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content[8:]


def no_json(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    return content[:8] + b"#" * length + content[8 + length :]


def offsets_beyond_the_data(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header[max(header)]
    entry["data_offsets"][1] += 10**9
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


DAMAGES = (cut, header_beyond_the_file, no_json, offsets_beyond_the_data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_safetensors(
    root: Path, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file in (("sft", BASE), ("reward", SFT), ("ppo", SFT), ("ppo", REWARD)):
        path = Path(file)
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        said = refused(name, root, capsys)
        assert f"{file}: cannot be read" in said
        path.write_bytes(whole)


def change(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a file; a name's beginning stands for the first."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for start, tensor in changes.items():
        name = min((name for name in tensors if start in name), default=start)
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"down_proj": None}, "1 tensors are missing in the files, like model.layers.0.mlp.down_"),
        ({"down_proj": torch.zeros(7, 7)}, "down_proj.weight is (7, 7) in the files; (32, 64) is"),
    ],
    ids=["missing", "shape"],
)
def test_a_base_whose_weights_are_not_its_configurations(
    root: Path, changes: dict, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(Path(BASE), **changes)
    said = refused("sft", root, capsys)
    assert "base runs/x/pretrain/model: its weights do not fit its config.json: " in said
    assert expected in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_A": None}, "down_proj.lora_A.weight is missing in the file; (4, 64) is needed"),
        ({"lora_A": torch.zeros(9, 64)}, "is (9, 64) in the file; (4, 64) is needed"),
        ({"model.model.layers.7.x.lora_A": torch.zeros(1)}, "(1,) in the file; nothing is needed"),
    ],
    ids=["missing", "rank", "more"],
)
def test_an_adapter_of_another_rank_or_base(
    root: Path, changes: dict, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file in (("reward", SFT), ("ppo", SFT), ("ppo", REWARD)):
        whole = Path(file).read_bytes()
        names = changes
        if "layers.7" in next(iter(changes)):
            names = {f"base_model.{key}.weight": tensor for key, tensor in changes.items()}
        change(Path(file), **names)
        said = refused(name, root, capsys)
        assert f"{file}: does not fit the base: " in said
        assert expected in said
        Path(file).write_bytes(whole)


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_an_adapter_without_a_configuration_of_pefts(
    root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(f"runs/x/sft/model/{CONFIG}")
    for content, expected in (("{", "not JSON"), ("{}", "names no peft_type")):
        config.write_text(content)
        assert f"{config}: {expected}" in refused(name, root, capsys)


@pytest.mark.parametrize("tensor", [None, torch.zeros(9, 64)], ids=["missing", "rank"])
def test_an_adapter_that_peft_itself_would_take(root: Path, tensor: torch.Tensor | None) -> None:
    """PEFT on its own leaves what is missing, or has another size, as it was drawn."""
    change(Path(SFT), lora_A=tensor)
    with pytest.raises(ParentError, match=rf"{WEIGHTS}: does not fit the base: "):
        load_adapter(tiny.llama(), Path(SFT).parent)
