"""Operations and time of a plan against published throughputs, and hand arithmetic."""

import json
import subprocess
from typing import Any

import pytest

from align import plan_time
from align.errors import InputError
from align.plan_model import Shape, read_shape
from align.plan_time import Work, card_speed, forward_flops, plan_work
from align.published import CARDS, CONFIGS
from align.recipe import StageName
from align.recipe_io import load_recipe
from launch import plan as plans
from launch.opened import Settings, open_recipe
from launch.plan_print import print_plan
from pipelines import calibrate, reward_report
from reward.analysis import PROBES


@pytest.mark.parametrize(
    ("tokens_per_second", "peak", "share"), [(4641, 312e12, 0.6423), (10643, 989.5e12, 0.4644)]
)
def test_the_share_of_the_peak_that_mosaicml_reached(
    tokens_per_second: float, peak: float, share: float
) -> None:
    """MPT-7B (6,658,859,008 weights, 32 blocks, 4096 wide), 2048 tokens, A100 and H100."""
    operations = 3 * forward_flops(6_658_859_008, 32, 4096, 2048)  # all weights: 3 passes
    assert operations * tokens_per_second / peak == pytest.approx(share, abs=5e-4)


def llama(size: str) -> Shape:
    return read_shape(CONFIGS[f"meta-llama/Llama-2-{size}-hf"])


def parts(stage: StageName, *overrides: str, recipe: str = "llama2-7b/qlora") -> dict[str, Work]:
    loaded = load_recipe(recipe, overrides)
    works = {work.stage: work for work in plan_work(loaded, read_shape(CONFIGS[loaded.base.id]))}
    return {part.name: part for part in works[stage].parts}


@pytest.mark.parametrize(("checkpointing", "per_weight"), [("false", 4), ("true", 6)])
def test_adapters_take_4_operations_for_a_weight_and_6_with_recomputation(
    checkpointing: str, per_weight: int
) -> None:
    """10,000 rows of 1024 tokens; 6,607,077,376 weights in matrices and 2 x 32 x 4096 x 1024."""
    training = parts("sft", f"base.gradient_checkpointing={checkpointing}")["training"]
    assert training.tokens == 10_000 * 1024 * per_weight // 2
    attention = 2 * 32 * 4096 * 1024
    expected = 10_000 * 1024 * per_weight * (6_476_005_376 + 131_072_000 + attention)
    assert training.flops == expected


def test_a_reward_model_has_no_output_embeddings() -> None:
    """And the two responses of a pair, of 512 tokens each, share a prompt of 512."""
    training = parts("reward")["training"]
    assert training.flops == 20_000 * 1536 * 6 * (6_476_005_376 + 2 * 32 * 4096 * 1024)


def test_the_reward_stage_probes_its_report_and_learns_language_if_asked() -> None:
    """2,000 held-out answers: 200 of 1,000 rankings are probed four times. 20,000 rankings."""
    assert len(PROBES) == plan_time._PROBES
    assert reward_report.PROBED_ROWS == plan_time._PROBED_ROWS
    assert parts("reward")["probes"].tokens == 4 * 200 * 1024
    assert "auxiliary language modelling" not in parts("reward")
    extra = parts("reward", "reward.aux_lm_coef=0.5")["auxiliary language modelling"]
    assert extra.flops == 20_000 * 512 * 2 * 2 * 4096 * 32_000


def test_the_benchmark_of_the_evaluation() -> None:
    source = "data.benchmark={b: {path: b.jsonl, rows: 300}}"
    assert parts("evaluate", source)["benchmark"].tokens == 300 * 2 * 1024
    assert "benchmark" not in parts("evaluate")


def test_the_passes_of_ppo() -> None:
    """200 rollouts of 64, 11 looks at 32; four roles; two epochs of three passes for two."""
    found = parts("ppo")
    texts = 200 * 64 + 11 * 32
    assert found["sampling"].tokens == texts * 1024
    assert found["sampling"].steps == 512 * texts // 8
    assert found["scores, log-probabilities"].tokens == texts * 1024 * 4
    assert found["updates"].tokens == 200 * 64 * 1024 * 2 * 2 * 3
    half = parts("ppo", "adapter.layers=top-half", "ppo.value.trunk=policy")
    assert half["scores, log-probabilities"].tokens == texts * 1024 * (1 + 3) // 2
    assert half["updates"].tokens == 200 * 64 * 1024 * 2 * 3 // 2


def tokens_per_second(length: int) -> float:
    overrides = (f"data.max_prompt_tokens={length // 2}", f"data.max_response_tokens={length // 2}")
    training = parts("sft", *overrides)["training"]
    speed = card_speed("a100-40g", CARDS["a100-40g"], quantized=True)
    return 10_000 * length / training.seconds(speed, 32)


def test_qlora_of_7b_on_an_a100_as_llama_factory_measured() -> None:
    """4 bits, one row at a time, recomputation: 2,295 tokens per second at 1024 tokens."""
    assert tokens_per_second(1024) == pytest.approx(2295, rel=0.25)


@pytest.mark.parametrize(
    ("size", "quantization", "tokens_per_second"),
    [("7b", "none", 30.97), ("7b", "nf4", 17.3), ("13b", "none", 24.8), ("13b", "nf4", 14.4)],
)
def test_sampling_one_row_on_an_a100_as_litgpt_measured(
    size: str, quantization: str, tokens_per_second: float
) -> None:
    """No matter how large a block is, the GPU waits for the next one."""
    double = "true" if quantization == "nf4" else "false"
    changes = (f"base.quantization={quantization}", f"base.double_quantization={double}")
    rows = ("evaluate.batch_size=1", "evaluate.prompts=1")
    work = parts("evaluate", *changes, *rows, recipe=f"llama2-{size}/qlora")["sampling"]
    speed = card_speed("a100-40g", CARDS["a100-40g"], quantized=quantization != "none")
    seconds = work.seconds(speed, llama(size).layers)
    assert work.steps / seconds == pytest.approx(tokens_per_second, rel=0.25)


def test_rows_that_only_a_file_could_count_are_planned_by_the_thousand() -> None:
    recipe = load_recipe("hh-rlhf/small")
    works = {work.stage: work for work in plan_work(recipe, plans.base_shape(recipe))}
    assert works["sft"].per_rows == 1000
    assert works["sft"].parts[0].tokens == 1000 * 640 * 2
    assert works["ppo"].per_rows is None  # its steps are in the recipe


def test_rows_of_the_built_in_world_are_known() -> None:
    recipe = load_recipe("miniature")
    works = {work.stage: work for work in plan_work(recipe, plans.base_shape(recipe))}
    assert all(work.per_rows is None for work in works.values())
    assert works["sft"].parts[0].tokens == 4000 * 144 * 2 * 3 // 2
    assert works["reward"].parts[0].tokens == 6000 * (80 + 4 * 64) * 2  # a prompt stands once
    assert works["pretrain"].parts[0].tokens == 700 * 16 * 128 * 3


def experiment(name: str) -> Any:
    return open_recipe(name, (), Settings())


def test_a_card_gives_the_memory_and_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plans.plan_experiment(experiment("llama2-70b/qlora"), card="a100-80g")
    assert (plan["memory_bytes"], plan["fits"]) == (80 * 10**9, True)
    stages = plan["time"]["stages"].values()
    assert plan["time"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages))
    print_plan(plan)
    text = capsys.readouterr().out
    assert "a100-80g: 40% of 312 TFLOP/s and 70% of 2039 GB/s" in text
    assert "the shares are assumed" in text
    with pytest.raises(
        InputError, match="--card=a1000: not one that plan knows; allowed: a100-40g"
    ):
        plans.plan_experiment(experiment("llama2-70b/qlora"), card="a1000")
    with pytest.raises(InputError, match="give one of them"):
        plans.plan_experiment(experiment("llama2-70b/qlora"), card="a100-80g", calibrate=True)


def test_a_machine_measures_itself_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measured decides the time: a GPU of 1 TFLOP/s, of which 70 % are assumed."""
    started = []

    def run(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(argv[1:])
        measured = {"device": "GPU, bfloat16", "flops": 1e12, "bandwidth": 1e15}
        return subprocess.CompletedProcess(argv, 0, "noise\n" + json.dumps(measured) + "\n")

    monkeypatch.setattr(plans.subprocess, "run", run)
    plan = plans.plan_experiment(experiment("llama2-7b/qlora"), calibrate=True)
    (argv,) = started
    assert argv[:2] == ("-m", "pipelines.calibrate")
    assert argv[-4:] == ("--matrix", "4096x11008", "--tokens", "1024")
    training = plan["time"]["stages"]["sft"]["parts"][0]
    assert training["seconds"] == pytest.approx(training["flops"] / 0.7e12, rel=1e-3)


def test_the_measurement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product is taken for half a second: 2 x 16 x 64 x 128 operations, 64 x 128 x 4 bytes."""
    monkeypatch.setattr(calibrate, "repeat", lambda work, seconds, device: (work(), 0.5)[1])
    sizes = ["--matrix", "64x128", "--tokens", "16"]
    assert calibrate.main(["miniature", *sizes]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["flops"], measured["bandwidth"]) == (2 * 16 * 64 * 128 * 2, 64 * 128 * 4 * 2)
    assert measured["device"].endswith("threads, float32")
