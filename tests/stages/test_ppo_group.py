"""PPO in two and four gloo processes on the CPU, with DeepSpeed: they learn what one would."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.stages.test_llama2_recipes import base
from tests.stages.test_several_processes import (
    IN_FLOAT32,
    LORA,
    LORA_IN_FLOAT32,
    PPO,
    align,
    alone,
    answers,
    metrics,
    parent,
)

# A step of the critic alone, then both; a decay that would move even what has no gradient; numbers
# of passes that differ between the processes. The third rollout is the first with a KL, by a
# coefficient that has moved.
SETTINGS = (
    *(word for word in PPO if not word.startswith("ppo.steps=")),
    "ppo.steps=3",
    *IN_FLOAT32,
    "evaluate=null",
    "reward=null",
    "ppo.lr=1e-3",
    "ppo.weight_decay=0.1",
    "ppo.value.warmup_steps=1",
    "ppo.kl.target=0.5",
    "ppo.kl.horizon=20",
    "ppo.reward_scaling.mode=running",
    "ppo.max_tokens_per_microbatch=300",
    "ppo.micro_batch_size=null",
)
WAYS = [
    ["distributed.zero=0"],
    ["distributed.zero=1"],
    ["distributed.zero=2", "distributed.offload=optimizer"],
    ["distributed.zero=3"],
    ["distributed.zero=3", "distributed.offload=all", "base.gradient_checkpointing=true"],
]
GROUPS = [*((2, way) for way in WAYS), *((4, [f"distributed.zero={zero}"]) for zero in (0, 2, 3))]
NF4 = ("base.quantization=nf4", "base.compute_dtype=float32")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ppo")
    base(root, 4)
    return root


def parents(root: Path, *more: str) -> list[str]:
    """Make an SFT model and a reward model, which scores, and is where the critic starts from."""
    made = alone(root, f"one{len(more)}", LORA, ("sft", "reward"), *LORA_IN_FLOAT32, *more)
    return [parent(made)[0], "sft=null", f"run.parents.reward={made / 'reward'}", *more]


@pytest.fixture(scope="module")
def one(root: Path) -> tuple[list[str], Path]:
    """What PPO starts from, and what one process makes of it."""
    settings = [*SETTINGS, *parents(root)]
    return settings, alone(root, "ppo-one", LORA, ("ppo",), *settings) / "ppo"


def check_same(found: Path, expected: Path) -> None:
    assert answers(found) == answers(expected)
    clocks = ("time/", "memory/", "tokens_per_second", "ppo/ratio_first_max_error")
    for ours, theirs in zip(metrics(found), metrics(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for key in [key for key in theirs if not key.startswith(clocks)]:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (ours["step"], key)
    names = {str(path.relative_to(expected)) for path in expected.rglob("*.safetensors")}
    assert "value/value_head.safetensors" in names
    assert names & {"policy/adapter_model.safetensors", "policy/model.safetensors"}
    for name in names:
        files = [load_file(folder / name) for folder in (found, expected)]
        for key, tensor in files[1].items():
            assert (files[0][key] - tensor).norm() <= 1e-3 * tensor.norm(), key


def test_ppo_samples_and_learns_what_one_process_does(
    root: Path, one: tuple[list[str], Path]
) -> None:
    settings, expected = one  # the recipe's own way is ZeRO 2
    check_same(align(root, "ppo", LORA, "ppo", *settings, "--nproc", "2") / "ppo", expected)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "way"), GROUPS, ids=str)
def test_by_every_other_way(
    root: Path, one: tuple[list[str], Path], processes: int, way: list[str]
) -> None:
    settings, expected = one
    name = f"way-{processes}-" + "-".join(part.partition("=")[2] for part in way)
    more = (*way, "--nproc", str(processes))
    check_same(align(root, "ppo", LORA, name, *settings, *more) / "ppo", expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "zero"),
    [
        *(("ppo.layout=separate", zero) for zero in (0, 1, 2, 3)),
        *(("ppo.ptx={coef: 2.0, batch_size: 4}", zero) for zero in (2, 3)),
    ],
)
def test_other_training(root: Path, more: str, zero: int) -> None:
    settings, name = [*SETTINGS, *parents(root), more], f"{more[4:7]}-{zero}"
    expected = alone(root, f"one-{name}", LORA, ("ppo",), *settings) / "ppo"
    way = (f"distributed.zero={zero}", "--nproc", "2")
    check_same(align(root, "ppo", LORA, name, *settings, *way) / "ppo", expected)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_all_weights_in_every_stage(root: Path, zero: int) -> None:
    whole = ("base.dtype=float32", "adapter={method: full}", "evaluate=null")
    made = alone(root, f"whole-{zero}", LORA, ("sft", "reward"), *whole, "ppo=null")
    others = [word for word in SETTINGS if not word.startswith(("adapter", "base", "evaluate"))]
    settings = [*others, *whole, parent(made)[0], "sft=null"]
    settings += [f"run.parents.reward={made / 'reward'}", "ppo.layout=separate"]
    expected = alone(root, f"whole-one-{zero}", LORA, ("ppo",), *settings) / "ppo"
    way = (f"distributed.zero={zero}", "--nproc", "2")
    found = align(root, "ppo", LORA, f"whole-two-{zero}", *settings, *way)
    check_same(found / "ppo", expected)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_on_a_4_bit_base(root: Path, zero: int) -> None:
    settings = [*SETTINGS, *parents(root, *NF4)]
    expected = alone(root, f"nf4-one-{zero}", LORA, ("ppo",), *settings) / "ppo"
    way = (f"distributed.zero={zero}", "--nproc", "2")
    check_same(align(root, "ppo", LORA, f"nf4-{zero}", *settings, *way) / "ppo", expected)
