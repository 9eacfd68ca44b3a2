"""The whole loop on a 4-bit base, on the CPU: pretrained whole, quantised by every later stage.

With gradient checkpointing and 8-bit and paged optimisers, so that each of them runs in each stage.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align.manifest import find_manifest

REPOSITORY = Path(__file__).parents[2]
RECIPE = "miniature/smoke"
WHOLE = (
    "run.threads=1",
    "tracking.mode=disabled",
    "pretrain.model.hidden_size=64",  # weights are quantised in blocks of 64
    "pretrain.model.intermediate_size=128",
    "sft.optimizer=paged_adamw_8bit",
    "reward.optimizer=adamw_8bit",
    "ppo.optimizer=paged_adamw",
    "base.gradient_checkpointing=true",
)
NF4 = ("base.quantization=nf4", "base.double_quantization=true", "base.compute_dtype=float32")

# Loads an adapter by the libraries alone and answers greedily.
ANSWER = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained("../../pretrain/model", dtype=torch.float32,
    quantization_config=config)
model = PeftModel.from_pretrained(base, ".").eval()
tokenizer = AutoTokenizer.from_pretrained(".")
chat = [{"role": "user", "content": "Who has the red kite?"}]
ids = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
out = model.generate(**ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
print(json.dumps(out[0, ids["input_ids"].shape[1]:].tolist()))
"""


# The same by transformers alone, of an exported policy.
ANSWER_PLAIN = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("export/ppo")
tokenizer = AutoTokenizer.from_pretrained("export/ppo")
chat = [{"role": "user", "content": "Who has the red kite?"}]
ids = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
out = model.generate(**ids, do_sample=False, max_new_tokens=8)
print(json.dumps(out[0, ids["input_ids"].shape[1]:].tolist()))
"""


def python(*arguments: str, cwd: Path, code: int = 0, **changes: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | changes
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("quantized")
    python("-m", "launch", "run", RECIPE, *WHOLE, *NF4, cwd=home)
    (run,) = (home / "runs").iterdir()
    return run


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_finishes_and_says_in_what_precision_it_saw_the_base(run: Path) -> None:
    for stage in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        manifest = find_manifest(run / stage)
        assert manifest is not None
        expected = "none" if stage == "pretrain" else "nf4+double"
        assert manifest.base.precision == expected
        assert manifest.base.compute_dtype == "float32"
        assert "bitsandbytes" in manifest.versions


def test_the_ratio_is_1_and_the_kl_0_on_a_quantised_base(run: Path) -> None:
    start, *steps = metrics(run, "ppo")
    assert start["probe/kl"] == 0.0
    assert steps[0]["kl/mean"] == 0.0
    assert [row["ppo/ratio_first_max_error"] for row in steps] == [0.0] * len(steps)
    assert all(row["ppo/approx_kl"] > 0 for row in steps)


def test_every_adapter_was_trained_and_stayed_in_float32(run: Path) -> None:
    for folder in ("sft/model", "reward/model", "ppo/policy", "ppo/value"):
        tensors = load_file(run / folder / "adapter_model.safetensors")
        assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
        assert all(tensor.any() for tensor in tensors.values())  # the B of LoRA starts at 0


@pytest.mark.parametrize("folder", ["sft/model", "ppo/policy"])
def test_the_adapter_loads_in_a_fresh_process_without_our_code(run: Path, folder: str) -> None:
    from transformers import AutoTokenizer

    from align.models import load_causal_lm
    from align.recipe_io import load_recipe
    from align.roles import Roles
    from data.records import Message
    from data.render import Renderer

    theirs = python("-c", ANSWER, cwd=run / folder, PYTHONPATH="", PYTHONSAFEPATH="1")
    base = load_causal_lm(load_recipe(run / "recipe.yaml"), str(run / "pretrain" / "model"))
    roles = Roles(base, {"policy": run / folder})
    prompt = Renderer(AutoTokenizer.from_pretrained(run / folder), 64, 64).prompt(
        [Message("user", "Who has the red kite?")]
    )
    (ours,) = roles.generate(
        "policy", [prompt], max_new_tokens=8, temperature=0, end_ids=[1], pad_id=0, seed=0
    ).responses
    assert json.loads(theirs) == ours


def test_what_was_made_on_a_quantised_base_is_refused_on_the_whole_one(run: Path) -> None:
    errors = python("-m", "launch", "ppo", RECIPE, *WHOLE, cwd=run.parent.parent, code=2)
    assert "base quantization (none) is not the one that" in errors
    assert "(nf4+double)" in errors


def test_the_policy_is_exported_onto_the_dequantised_base(run: Path) -> None:
    place, options = run.parent.parent, ("--dtype", "float32", "--json")
    output = python("-m", "launch", "export", str(run), *options, cwd=place)
    facts = json.loads(output)
    assert facts["export"] == str(run / "export" / "ppo")
    assert facts["drift"]["kl/max"] < 1e-6
    assert facts["base"]["quantization"] == "nf4"
    assert [parent["stage"] for parent in facts["parents"]] == ["ppo", "pretrain", "sft", "reward"]
    bare = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    with_adapter = python("-c", ANSWER, cwd=run / "ppo/policy", **bare)
    assert json.loads(python("-c", ANSWER_PLAIN, cwd=run, **bare)) == json.loads(with_adapter)
    python("-m", "launch", "export", str(run), cwd=place, code=2)  # it is there already
    python("-m", "launch", "verify", str(run), cwd=place)
