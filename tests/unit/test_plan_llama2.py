"""The shipped Llama-2 recipes planned as they are, without network, and arithmetic that adds up."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.plan import plan_recipe
from align.plan_model import Shape, read_shape
from align.published import CONFIGS
from align.recipe import Recipe
from align.recipe_io import load_recipe, shipped_recipes
from align.stages import planned_stages
from launch.plan import base_shape, make_plan
from launch.plan_print import print_plan

ROOT = Path(__file__).resolve().parents[2]
GB, GIB = 10**9, 2**30


def planned(name: str) -> tuple[Recipe, Shape]:
    recipe = load_recipe(name)
    return recipe, read_shape(CONFIGS[recipe.base.id])


def ppo_bytes(name: str) -> dict[str, int]:
    """What PPO keeps throughout, by name."""
    ppo = next(stage for stage in plan_recipe(*planned(name)) if stage.stage == "ppo")
    return {item.name: item.bytes for item in ppo.kept}


def test_the_command_plans_7b_into_12_gib_without_network(tmp_path: Path) -> None:
    """512 + 512 tokens, four roles on one 4-bit base, layers computed again."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", "plan", "llama2-7b/qlora", "--memory", "12GiB", "--json"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert plan["base"]["parameters"] == 6_738_415_616
    assert list(plan["stages"]) == ["sft", "reward", "ppo", "evaluate"]
    recipe = load_recipe("llama2-7b/qlora")
    assert recipe.ppo is not None
    assert (recipe.data.max_prompt_tokens, recipe.ppo.max_new_tokens) == (512, 512)
    assert (recipe.ppo.layout, recipe.base.gradient_checkpointing) == ("shared", True)


@pytest.mark.parametrize(
    ("name", "room"),
    [("llama2-7b/qlora", 12), ("llama2-13b/qlora", 24 * GB / GIB), ("llama2-70b/qlora", 80)],
)
def test_the_recipes_fit_the_card_that_they_name(name: str, room: float) -> None:
    for stage in plan_recipe(*planned(name)):
        assert stage.peak <= room * GIB, stage.stage


@pytest.mark.parametrize(
    ("name", "base"),
    [("llama2-7b/qlora", 3.87), ("llama2-13b/qlora", 7.20), ("llama2-70b/qlora", 36.36)],
)
def test_the_base_is_there_once_with_its_published_size(name: str, base: float) -> None:
    """4.127 bits a weight, 16 for embeddings, head and norms (Dettmers et al. 2023)."""
    kept = ppo_bytes(name)
    parts = ("base in nf4", "quantisation constants", "embeddings and norms")
    assert sum(kept[part] for part in parts) / GB == pytest.approx(base, abs=0.0101)


def test_ppo_keeps_four_adapters_and_the_states_of_two() -> None:
    """r = 16 on all linear layers of 7B: 39,976,960 numbers (0.59 %), Adam keeps two of each."""
    kept = ppo_bytes("llama2-7b/qlora")
    roles = ("reference", "reward", "policy", "value")
    assert [kept[f"adapter: {role}"] for role in roles] == [39_976_960 * 4] * 4
    head = 4096 + 2  # weights, shift and scale; the states know the weights alone
    assert kept["head: value"] == head * 4
    assert kept["optimiser (paged_adamw)"] == 2 * 4 * (2 * 39_976_960 + 4096)


def test_the_cache_of_a_rollout() -> None:
    """Half a MiB a token (2 x 32 blocks x 4096 x 2 B), 8 rows of 1024 tokens."""
    ppo = next(s for s in plan_recipe(*planned("llama2-7b/qlora")) if s.stage == "ppo")
    (rollout,) = (phase for phase in ppo.phases if phase.name == "rollout")
    (cache,) = (item for item in rollout.items if item.name == "key-value cache")
    assert cache.bytes == 8 * 1024 * GIB // 2048


def evaluated(arithmetic: str) -> float:
    """Compute what stands before the first semicolon, words and units left out."""
    text = re.sub(r"[A-Za-z]{2,}", "", arithmetic.split(";")[0]).replace(",", "")
    text = re.sub(r"\bB\b", "", text).replace("x", "*").replace("^", "**")
    assert re.fullmatch(r"[\d.\s*/+()]+", text), arithmetic
    return float(eval(text, {"__builtins__": {}}))


INT8 = ("base.quantization=int8", "base.double_quantization=false")


@pytest.mark.parametrize("overrides", [(), INT8])
def test_the_arithmetic_of_every_item_gives_its_bytes(overrides: tuple[str, ...]) -> None:
    recipe = load_recipe("llama2-7b/qlora", overrides)
    for stage in plan_recipe(recipe, read_shape(CONFIGS[recipe.base.id])):
        for item in (*stage.kept, *(item for phase in stage.phases for item in phase.items)):
            assert evaluated(item.how) == pytest.approx(item.bytes, rel=0.005), (stage, item)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_planned_to_its_last_stage(name: str) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe, base_shape(recipe), None, 1)
    assert tuple(plan["stages"]) == planned_stages(recipe)
    assert tuple(plan["time"]["stages"]) == planned_stages(recipe)


Output = pytest.CaptureFixture[str]


def plan_on(gpus: int, memory: int, capsys: Output) -> tuple[dict[str, Any], str]:
    recipe, shape = planned("llama2-7b/qlora")
    plan = make_plan(recipe, shape, memory, gpus)
    print_plan(plan)
    return plan, capsys.readouterr().out


def test_what_each_number_of_gpus_needs(capsys: Output) -> None:
    plan, text = plan_on(6, 7 * GIB, capsys)
    assert list(plan["by_gpus"]) == [1, 2, 4, 6]
    for count, facts in plan["by_gpus"].items():
        ways = list(facts["bytes"])
        assert ways == ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 3, offload"]
        fitting = [way for way in ways if facts["bytes"][way] <= 7 * GIB]
        assert facts["needs"] == (fitting[0] if fitting else None), count
    assert "1 x: does not fit" in text
    assert "6 x: ZeRO 3 is enough" in text


def test_what_training_all_weights_would_need(capsys: Output) -> None:
    """DeepSpeed's formulas by hand: 2 P; 4 P + 16 P / N; 4 x 131,072,000 + 18 P / N; 1.5 x 32 P."""
    plan, text = plan_on(8, 80 * GIB, capsys)
    p, largest = 6_738_415_616, 32_000 * 4096
    assert plan["full_training"][8] == {
        "ZeRO 2": 6 * p,
        "ZeRO 2, offload": 2 * p,
        "ZeRO 3": 4 * largest + 18 * p // 8,
        "ZeRO 3, offload": 4 * largest + 2 * p // 8,
        "ZeRO 3, offload all": 4 * largest,
        "main memory": 48 * p,
    }
    assert "training all 6,738,415,616 weights in 16 bits" in text
