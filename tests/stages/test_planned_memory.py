"""Peak resident memory of real stages on a CPU against the plan, for a model large enough to count.

Every prompt and response is as long as the recipe allows, as in the plan.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from align.plan import plan_recipe
from align.plan_model import read_shape
from align.recipe_io import load_recipe
from launch.command import Python, stage_command
from tests import tiny

REPOSITORY = Path(__file__).parents[2]
VOCAB, PROMPT, RESPONSE = 4096, 96, 32
RECIPE = """
name: planned
base: {{id: {root}/base, gradient_checkpointing: {checkpointing}}}
adapter: {{r: 16, alpha: 32.0}}
data:
  root: {root}
  max_prompt_tokens: {prompt}
  max_response_tokens: {response}
  sft: {{train: [{{path: sft.jsonl}}]}}
  reward: {{train: [{{path: pairs.jsonl}}]}}
  prompts: {{train: [{{path: sft.jsonl}}], heldout: [{{path: sft.jsonl}}]}}
sft: {{lr: 1.0e-4, batch_size: 8, samples: 0}}
reward: {{lr: 1.0e-4, batch_size: 4}}
ppo:
  lr: 1.0e-4
  batch_size: 8
  minibatch_size: 8
  steps: 1
  epochs: 1
  max_new_tokens: {response}
tracking: {{mode: disabled}}
run: {{root: {root}/runs, threads: 1}}
"""


def write(root: Path, checkpointing: str) -> Path:
    """Write a base of 40 million parameters, its data and the recipe; return the recipe's path."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
    }
    tiny.llama(VOCAB, **sizes).save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    prompt = [{"role": "user", "content": "Q" * 2 * PROMPT}]  # longer ones lose their beginning
    answer, worse = "Z" * (RESPONSE - 4), "X" * (RESPONSE - 4)  # no merge holds these letters
    demonstration = {"messages": [*prompt, {"role": "assistant", "content": answer}]}
    pair = {"prompt": prompt, "chosen": answer, "rejected": worse}
    (root / "sft.jsonl").write_text((json.dumps(demonstration) + "\n") * 8)
    (root / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    text = RECIPE.format(root=root, prompt=PROMPT, response=RESPONSE, checkpointing=checkpointing)
    (root / "recipe.yaml").write_text(text)
    return root / "recipe.yaml"


def peak(recipe: Path, stage: str, *, checkpointing: bool) -> int:
    """Run a stage as the launcher does; return the most memory its process had, in bytes."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    python = Python(sys.executable, REPOSITORY, environ)
    command = stage_command(python, stage, recipe, spare_memory=checkpointing)
    process = os.spawnve(os.P_NOWAIT, command.argv[0], command.argv, environ | command.env)
    _, status, usage = os.wait4(process, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_peak_of_a_stage_is_the_planned_one(tmp_path: Path, checkpointing: str) -> None:
    file = write(tmp_path, checkpointing)
    recipe = load_recipe(file)
    shape = read_shape(json.loads((tmp_path / "base" / "config.json").read_text()))
    plans = {plan.stage: plan for plan in plan_recipe(recipe, shape, on_cpu=True)}
    found = {stage: peak(file, stage, checkpointing=checkpointing == "true") for stage in plans}
    for stage, plan in plans.items():
        print(f"{stage}: {found[stage] / 2**20:.0f} MiB, planned {plan.peak / 2**20:.0f}")
    for stage, plan in plans.items():
        assert found[stage] == pytest.approx(plan.peak, rel=0.15), stage
