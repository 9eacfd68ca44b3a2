"""The arithmetic of the memory plan against published figures, and the command that prints it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import InputError
from align.plan import plan_recipe
from align.plan_changes import cheapest, with_values
from align.plan_items import Kind
from align.plan_memory import (
    Compute,
    activation_bytes,
    cache_bytes,
    deepspeed_bytes,
    deepspeed_host_bytes,
    kept_per_token,
    zero_per_gpu,
)
from align.plan_model import Shape, linear_bytes, read_shape
from align.plan_setup import Setup, logits_item, overhead
from align.published import CONFIGS
from align.recipe import Recipe
from align.recipe_adapter import Adapter
from align.recipe_io import find_recipe, load_recipe
from launch.plan import read_memory

ROOT = Path(__file__).resolve().parents[2]
GB, GIB, MIB = 10**9, 2**30, 2**20


def config(size: str) -> dict[str, object]:
    return CONFIGS[f"meta-llama/Llama-2-{size.lower()}-hf"]


def llama2(size: str) -> Shape:
    return read_shape(config(size))


def setup(size: str, **base: object) -> Setup:
    settings = {"id": "b", "dtype": "bfloat16"} | base
    recipe = Recipe.model_validate({"name": "x", "base": settings, "data": {}})
    return Setup(recipe, llama2(size))


@pytest.mark.parametrize(
    ("size", "parameters", "linear"),
    [
        ("7B", 6_738_415_616, 6_476_005_376),
        ("13B", 13_015_864_320, 12_687_769_600),
        ("70B", 68_976_648_192, 68_451_041_280),
    ],
)
def test_parameters_of_llama_2(size: str, parameters: int, linear: int) -> None:
    shape = llama2(size)
    assert (shape.parameters, shape.linear) == (parameters, linear)


@pytest.mark.parametrize(("size", "expected"), [("7B", 13.48), ("13B", 26.03), ("70B", 137.95)])
def test_weights_in_16_bits(size: str, expected: float) -> None:
    (base,) = setup(size).base()
    assert base.bytes / GB == pytest.approx(expected, abs=0.0051)


def test_embeddings_and_head_of_7b() -> None:
    shape = llama2("7B")
    norms = (2 * 32 + 1) * 4096
    assert shape.parameters - shape.linear - norms == 262_144_000


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_of_a_quantised_weight(double: bool, bits: float) -> None:
    """32 / 64 bits for a block's scale; 8 / 64 + 32 / (64 x 256) where that is quantised, too."""
    shape = llama2("70B")
    stored = 8 * sum(linear_bytes(shape, "nf4", double)) / shape.linear
    assert stored == pytest.approx(bits, abs=0.001)


@pytest.mark.parametrize(
    ("size", "kind", "double", "measured"),
    [
        ("7B", "none", False, 13.52),
        ("7B", "nf4", False, 4.57),
        ("7B", "nf4", True, 4.26),
        ("13B", "none", False, 26.21),
        ("13B", "nf4", False, 8.32),
        ("13B", "nf4", True, 7.72),
        ("70B", "nf4", True, 37.21),
    ],
)
def test_weights_and_libraries_as_litgpt_measured(
    size: str, kind: str, double: bool, measured: float
) -> None:
    """Most memory of sampling one row, whose cache is small: within 4 %."""
    base = setup(size, quantization=kind, double_quantization=double).base()
    planned = sum(item.bytes for item in (*base, overhead("evaluate")))
    assert planned / GB == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(
    ("size", "plain", "double"), [("7B", 4.17, 3.87), ("13B", 7.79, 7.20), ("70B", 39.55, 36.36)]
)
def test_nf4_with_and_without_double_quantisation(size: str, plain: float, double: float) -> None:
    """Dettmers et al. 2023: 4.5 and 4.127 bits; embeddings, head and norms in 16."""
    shape = llama2(size)
    others = 2 * (shape.parameters - shape.linear)
    for expected, nested in ((plain, False), (double, True)):
        total = sum(linear_bytes(shape, "nf4", nested)) + others
        assert round(total / GB, 2) == pytest.approx(expected, abs=0.0101)


@pytest.mark.parametrize(("size", "saved"), [("7B", 0.302), ("13B", 0.592)])
def test_what_double_quantisation_saves(size: str, saved: float) -> None:
    """LitGPT measured 0.31 and 0.60 GB."""
    plain, double = (sum(linear_bytes(llama2(size), "nf4", nested)) for nested in (False, True))
    assert (plain - double) / GB == pytest.approx(saved, abs=0.001)


def test_int8_has_a_scale_per_output() -> None:
    stored, constants = linear_bytes(llama2("7B"), "int8", False)
    outputs = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert (stored, constants) == (6_476_005_376, 4 * outputs)


@pytest.mark.parametrize(
    ("targets", "r", "count", "percent"),
    [
        (("q_proj", "v_proj"), 8, 4_194_304, 0.06),
        ("all-linear", 8, 19_988_480, 0.30),
        ("all-linear", 16, 39_976_960, 0.59),
        ("all-linear", 64, 159_907_840, 2.37),
    ],
)
def test_lora_parameters_of_7b(targets: object, r: int, count: int, percent: float) -> None:
    shape, adapter = llama2("7B"), Adapter(r=r, targets=targets)  # type: ignore[arg-type]
    assert sum(shape.lora_tensors(adapter)) == count
    assert 100 * count / shape.parameters == pytest.approx(percent, abs=0.0051)


def test_adapters_in_the_upper_layers_only() -> None:
    adapter = Adapter(r=8, layers="top-quarter")
    assert sum(llama2("7B").lora_tensors(adapter)) == 19_988_480 // 4


def test_a_target_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"adapter\.targets=c_attn: no such linear layers"):
        llama2("7B").targets(Adapter(targets=("q_proj", "c_attn")))


def test_zero_of_the_paper() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 GPUs, Adam with K = 12."""
    p = 7_500_000_000
    shares = zero_per_gpu(2 * p, 2 * p, 12 * p, 64)
    assert [share / GB for share in shares] == pytest.approx([120, 31.406, 16.641, 1.875], abs=5e-4)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (1, (107.8, 107.8, 107.8)),
        (2, (67.4, 60.6, 53.9)),
        (4, (47.2, 37.1, 27.0)),
        (8, (37.1, 25.3, 13.5)),
    ],
)
def test_zero_of_llama_2_7b(gpus: int, expected: tuple[float, ...]) -> None:
    p = llama2("7B").parameters
    _, *shares = zero_per_gpu(2 * p, 2 * p, 12 * p, gpus)
    assert [share / GB for share in shares] == pytest.approx(expected, abs=0.051)


def test_deepspeeds_own_estimates() -> None:
    """From its documentation: 2851M parameters, 8 GPUs, largest layer 32M; t5-large on 4."""
    p, layer = 2851 * 10**6, 32 * 10**6
    two = [deepspeed_bytes(p, layer, 8, stage=2, offload=o) for o in ("none", "optimizer")]
    three = [deepspeed_bytes(p, layer, 8, stage=3, offload=o) for o in ("none", "optimizer", "all")]
    assert [n / GIB for n in two] == pytest.approx([15.93, 5.31], abs=0.006)
    assert [n / GIB for n in three] == pytest.approx([6.09, 0.78, 0.12], abs=0.006)
    assert deepspeed_host_bytes(p, 8) / GIB == pytest.approx(127.45, abs=0.006)
    p, layer = 737_670_000, 32_900_000
    t5 = [deepspeed_bytes(p, layer, 4, stage=3, offload=o) for o in ("none", "optimizer", "all")]
    assert [n / MIB for n in t5] == pytest.approx([3291, 477, 125], abs=1)


def test_activations_of_7b_lora_as_litgpt_measured() -> None:
    """21.30 GB less 13.48 of weights, up to 1304 tokens, LoRA on q and v in bfloat16.

    A second row took 7.77 GB more. Another implementation: within a quarter.
    """
    adapter = Adapter(r=8, targets=("q_proj", "v_proj"))
    compute = Compute(2, adapter, adapter_width=2)
    one, two = (
        activation_bytes(llama2("7B"), compute, rows * 1304, 32, checkpointing=False)
        + logits_item("logits", rows * 1304, 32000, 2 + 4 + 4 + 4).bytes
        for rows in (1, 2)
    )
    assert one / GB == pytest.approx(7.8, rel=0.25)
    assert (two - one) / GB == pytest.approx(7.77, rel=0.25)


def test_logits_of_7b() -> None:
    """4 b s V: 0.26 GB for 2048 tokens in float32."""
    assert logits_item("logits", 2048, 32000, 4).bytes / GB == pytest.approx(0.26, abs=0.0051)


def test_activations_by_korthikanti() -> None:
    """Fused attention, every matrix trained: 34 s b h bytes a layer, within a fifth.

    (Korthikanti et al. 2022; 9.1 GB for 2048 tokens of 7B.) Its norms keep their input in 16 bits,
    those of transformers in 32: 4 h bytes more.
    """
    compute = Compute(2, Adapter(r=1), adapter_width=2)
    kept = kept_per_token(llama2("7B"), compute) - 4 * 4096
    assert 2048 * 32 * kept / GB == pytest.approx(9.1, rel=0.2)


def test_checkpointing_keeps_an_input_per_block() -> None:
    """0.54 GB for 2048 tokens of 7B, and one block."""
    compute = Compute(2, Adapter())
    one, two = (
        activation_bytes(llama2("7B"), compute, 2048, layers, checkpointing=True)
        for layers in (1, 33)
    )
    assert (two - one) / GB == pytest.approx(0.537, abs=0.001)


def test_the_cache_of_7b() -> None:
    """Half a MiB per token in 16 bits; 70B shares keys among eight heads."""
    assert cache_bytes(llama2("7B"), 1, 1, 2) == 2 * 32 * 4096 * 2
    assert cache_bytes(llama2("70B"), 3, 5, 2) == 15 * 2 * 80 * 8 * 128 * 2


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(InputError, match="model_type=mamba"):
        read_shape({"model_type": "mamba"})
    with pytest.raises(InputError, match="vocab_size is missing"):
        read_shape({k: v for k, v in config("7B").items() if k != "vocab_size"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * GIB), ("80 GB", 80 * GB), ("512mib", 512 * MIB), ("1000", 1000)],
)
def test_memory_sizes(text: str, expected: int) -> None:
    assert read_memory(text) == expected


@pytest.mark.parametrize("text", ["", "24 apples", "-1GiB", "0"])
def test_no_memory_size(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        read_memory(text)


RECIPE = """
name: q
base: {id: FOLDER, dtype: bfloat16}
adapter: {r: 16}
data:
  sft: {train: [{world: demonstrations}]}
  reward: {train: [{world: pairs}]}
  prompts: {train: [{world: prompts}]}
sft: {lr: 1e-3, batch_size: 16, samples: 0}
reward: {lr: 1e-3, batch_size: 16}
ppo: {lr: 1e-3, batch_size: 16, minibatch_size: 16, steps: 1, max_new_tokens: 512}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A recipe on a folder that holds nothing but a configuration of 7B."""
    (tmp_path / "config.json").write_text(json.dumps(config("7B")))
    (tmp_path / "r.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    return tmp_path


def align(place: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "plan", *words],
        cwd=place,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_ppo_of_all_weights_of_7b(place: Path) -> None:
    """Policy and critic at 16 bytes a weight, two frozen models at 2: 242.6 GB.

    Here the frozen ones are one base with adapters (less 13.48), and a critic has no output
    embeddings (less 16 x 131,072,000).
    """
    overrides = ["ppo.layout=separate", "adapter.r=1"]
    recipe = load_recipe(place / "r.yaml", overrides)
    ppo = next(p for p in plan_recipe(recipe, llama2("7B")) if p.stage == "ppo")
    kinds: tuple[Kind, ...] = ("weights", "gradients", "states")
    held = sum(ppo.sum(kind) for kind in kinds)
    expected = 242.6 - 13.48 - 16 * 0.131072
    assert held / GB == pytest.approx(expected, rel=0.001)


def test_every_proposal_fits_and_all_of_it_is_needed(place: Path) -> None:
    recipe, memory = load_recipe(place / "r.yaml"), 40 * GIB

    def peaks(changed):
        return {plan.stage: plan.peak for plan in plan_recipe(changed, llama2("7B"))}

    def peak(values):
        changed = with_values(recipe, values)
        return max(peaks(changed).values()) if changed is not None else None

    found = cheapest(recipe, peaks, memory)
    assert len(found) == 3
    for proposal in found:
        assert peak(proposal.values) == proposal.peak <= memory
        for key in proposal.values:
            fewer = {k: v for k, v in proposal.values.items() if k != key}
            left = peak(fewer)
            assert left is None or left > memory, key


def test_answers_sampled_after_sft_can_be_what_does_not_fit() -> None:
    """A cache of 8 x 1024 tokens of 13B, 6.25 GiB, over 8.7 GiB that the stage needs anyway."""
    recipe = load_recipe(find_recipe("llama2-13b/qlora"))
    shape = llama2("13B")
    sft, *_ = plan_recipe(recipe, shape)
    assert (sft.stage, sft.largest.name) == ("sft", "sampling")
    found = cheapest(
        recipe, lambda r: {plan.stage: plan.peak for plan in plan_recipe(r, shape)}, 12 * GIB
    )
    assert found
    assert all(proposal.values["sft.samples"] == 1 for proposal in found)


def test_the_command_says_what_makes_it_fit(place: Path) -> None:
    """Exit code 1, and following a proposal gives exit code 0."""
    plan = json.loads(align(place, "r.yaml", "--memory", "40GiB", "--json", code=1).stdout)
    assert plan["fits"] is False
    for change in plan["changes"]:
        again = align(place, "r.yaml", *change["overrides"], "--memory", "40GiB", "--json")
        assert json.loads(again.stdout)["peak_bytes"] == change["peak_bytes"]
    assert "does not fit" in align(place, "r.yaml", "--memory", "40GiB", code=1).stdout


def test_the_printout_adds_up(place: Path) -> None:
    plan = json.loads(align(place, "r.yaml", "--json", "--gpus", "8").stdout)
    for name, stage in plan["stages"].items():
        kept = sum(item["bytes"] for item in stage["kept"])
        for phase in stage["phases"].values():
            assert phase["bytes"] == kept + sum(item["bytes"] for item in phase["items"])
        assert stage["peak_bytes"] == stage["phases"][stage["largest_phase"]]["bytes"]
        shares = plan["per_gpu"][name]
        assert shares["ZeRO 0"] == stage["peak_bytes"]
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
    text = align(place, "r.yaml", "--gpus", "8").stdout
    assert "6,738,415,616 x 2 B" in text
    assert "ZeRO 3, offload" in text


def test_a_base_without_configuration_is_refused(place: Path) -> None:
    errors = align(place, "r.yaml", "base.id=no/such-model", code=2).stderr
    assert "base.id=no/such-model" in errors
    assert "a folder with that one file is enough" in errors
    (place / "config.json").write_text("{")
    assert "config.json: cannot be read" in align(place, "r.yaml", code=2).stderr


def test_a_recipe_that_makes_its_base_needs_nothing_else(tmp_path: Path) -> None:
    plan = json.loads(align(tmp_path, "miniature", "--json").stdout)
    assert list(plan["stages"]) == ["pretrain", "sft", "reward", "ppo", "evaluate"]
