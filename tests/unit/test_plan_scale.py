"""Scaling on paper: volumes of the ZeRO and ZeRO-Offload papers, and hand arithmetic on recipes."""

from typing import Any

import pytest

from align.plan_scale import limit, moved_bytes, sending_seconds, sent_bytes
from align.plan_time import card_speed, plan_work, step_work
from align.published import CARDS
from align.recipe_distributed import Offload, Zero
from align.recipe_io import load_recipe
from launch.opened import Settings, open_recipe
from launch.plan import base_shape, plan_experiment
from launch.plan_print import print_plan

LORA, FULL = "llama2-7b/lora-zero2", "llama2-7b/full-zero3-offload"
BILLION = 10**9


@pytest.mark.parametrize(
    ("zero", "sent"),
    [(0, 59_062_500_000), (1, 59_062_500_000), (2, 59_062_500_000), (3, 88_593_750_000)],
)
def test_two_and_three_times_the_weights_are_sent(zero: Zero, sent: int) -> None:
    """Rajbhandari et al. 2020, section 7, on figure 1's 7.5B and 64 GPUs; 63 / 64 of a ring.

    2 x 7.5e9 x 4 B = 60e9 B, 3 x 7.5e9 x 4 B = 90e9 B.
    """
    assert sent_bytes(zero, 30 * BILLION, 30 * BILLION, 1, 64) == sent
    assert sent_bytes(zero, 30 * BILLION, 30 * BILLION, 1, 1) == 0


@pytest.mark.parametrize(
    ("zero", "billions"),
    [
        (0, 2 * 0.875),  # adapters once a step, of 1e9 B
        (1, 2 * 0.875),
        (2, (4 + 1) * 0.875),  # their gradients after each of four passes
        (3, 4 * (2 * 140 + 1) * 0.875),  # with 140e9 B of weights forward and backward
    ],
)
def test_passes_of_adapters_on_a_frozen_base(zero: Zero, billions: float) -> None:
    assert sent_bytes(zero, 140 * BILLION, BILLION, 4, 8) == round(billions * BILLION)


@pytest.mark.parametrize(
    ("offload", "passes", "moved"),
    [
        ("none", 4, 0),
        # ZeRO-Offload, section 4: 4 M of 16 bits, which is 2 G: gradients out and weights in.
        ("optimizer", 1, 2 * BILLION),
        ("optimizer", 4, 8 * BILLION),
        ("all", 1, (1 + 2 * 3) * BILLION),
        ("all", 4, (7 + 8 * 3) * BILLION),
    ],
)
def test_what_offloading_moves(offload: Offload, passes: int, moved: int) -> None:
    assert moved_bytes(offload, 24 * BILLION, 8 * BILLION, passes, 8) == moved


@pytest.mark.parametrize(
    ("card", "gpus", "rate"),
    [
        ("h100-80g", 8, 450e9),  # NVLink, 900 GB/s both ways
        ("h100-80g", 64, 400e9),  # eight adapters of 400 Gb/s
        ("a100-80g", 8, 300e9),
        ("a100-80g", 512, 200e9),
        ("l4-24g", 64, 32e9),  # PCIe is slower than the network
    ],
)
def test_rates_are_those_of_the_slower_link(card: str, gpus: int, rate: float) -> None:
    assert sending_seconds(round(3 * rate), CARDS[card], gpus) == pytest.approx(3)


def test_what_limits_a_step() -> None:
    facts = {"step_bytes": 10, "computing": 1.0, "sending": 2.0, "moving": 3.0}
    assert limit(facts, 9) == "memory"
    assert limit(facts, 10) == "moving"
    assert limit(facts | {"moving": 0.0}, 10) == "sending"


def plan(name: str, gpus: int, *overrides: str) -> dict[str, Any]:
    return plan_experiment(open_recipe(name, overrides, Settings()), gpus=gpus, card="h100-80g")


def test_all_weights_of_7b_on_512_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    given = plan(FULL, 512, "sft.batch_size=64", "sft.micro_batch_size=1")
    assert list(given["scaling"]["stages"]["sft"]) == [1, 8, 64, 512]
    facts = given["scaling"]["stages"]["sft"]
    count = 6_738_415_616
    assert [facts[n]["passes"] for n in (1, 8, 64)] == [64, 8, 1]
    assert facts[8]["sent_bytes"] == 8 * 3 * 4 * count * 7 // 8
    assert facts[64]["sent_bytes"] == 3 * 4 * count * 63 // 64
    assert facts[1]["moved_bytes"] == (127 + 128) * 4 * count
    # 8 texts of 1024 tokens x 4 passes x (2 N + 4 L d s) at 0.4 x 67 TFLOP/s of float32, and the
    # weights read in every pass at 0.7 x 3350 GB/s; N without token embeddings and 65 norms.
    matrices = count - 32_000 * 4096 - 65 * 4096
    computing = 8 * 1024 * 4 * (2 * matrices + 4 * 32 * 4096 * 1024) / (0.4 * 67e12)
    reading = 8 * 4 * matrices * 4 / (0.7 * 3350e9)
    assert facts[8]["computing"] == pytest.approx(computing + reading, rel=1e-3)
    assert facts[8]["sending"] == pytest.approx(8 * 3 * 4 * count * 7 / 8 / 450e9)
    assert facts[8]["moving"] == pytest.approx((15 + 16) * 4 * count / 8 / 64e9)
    assert facts[8]["limit"] == "computing"
    assert facts[512]["refused"].startswith("sft.batch_size: counts over all processes, and 512")
    print_plan(given)
    said = capsys.readouterr().out
    assert "450 GB/s within 8 GPUs, 50 GB/s from each to other machines, 64 GB/s to main" in said
    assert "   512   refused: sft.batch_size:" in said


def test_70b_has_to_be_shared_out_and_fit_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    whole = ("base.quantization=none", "base.double_quantization=false")
    alone = ("ppo=null", "evaluate=null", "reward=null", "sft.optimizer=adamw")
    given = plan("llama2-70b/qlora", 8, *whole, *alone, "distributed.zero=3")
    facts = given["scaling"]["stages"]["sft"]
    weights = 2 * 68_976_648_192 + 4 * 207_093_760  # bfloat16; the adapter of r=16 in float32
    assert facts[8]["sent_bytes"] == 2 * (2 * weights + 4 * 207_093_760) * 7 // 8
    assert facts[1]["limit"] == "memory"
    assert facts[8]["step_bytes"] < 80 * BILLION < facts[8]["later_bytes"]
    print_plan(given)
    assert "does not fit: the first process holds 150.00 GiB after" in capsys.readouterr().out


def test_ppo_adds_up_its_gradients_before_each_update() -> None:
    facts = plan(LORA, 4)["scaling"]["stages"]
    adapter = 4 * 39_976_960
    assert facts["sft"][4]["sent_bytes"] == (4 + 1) * adapter * 3 // 4
    # 2 epochs of 64 / 32 updates, of policy, critic and its head.
    assert facts["ppo"][4]["sent_bytes"] == 4 * 2 * (2 * adapter + 4 * 4096) * 3 // 4


def test_ppo_gathers_the_layers_of_its_base_in_every_pass() -> None:
    two, three, offloaded = (
        plan(LORA, 4, f"distributed.zero={zero}", f"distributed.offload={offload}")
        for zero, offload in ((2, "optimizer"), (3, "optimizer"), (3, "all"))
    )
    facts = [given["scaling"]["stages"]["ppo"][4] for given in (two, three, offloaded)]
    # Once for the rollout; in 2 epochs of 64 / 32 updates of 8 passes for 8 responses, of policy
    # and critic, forward and backward.
    times = 1 + 2 * 2 * 8 * 2 * 2
    layers = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11_008)  # in bfloat16
    assert facts[1]["passes"] == facts[0]["passes"] == 2 * 2 * 8
    assert facts[1]["sent_bytes"] - facts[0]["sent_bytes"] == times * layers * 3 // 4
    assert facts[1]["moved_bytes"] == facts[0]["moved_bytes"]
    assert facts[2]["moved_bytes"] - facts[1]["moved_bytes"] == times * layers // 4


def test_ppo_sends_the_gradients_of_whole_layers_with_every_pass() -> None:
    own = "ppo.layout=separate"
    two, three, offloaded = (
        plan(LORA, 4, own, f"distributed.zero={zero}", f"distributed.offload={offload}")
        for zero, offload in ((2, "optimizer"), (3, "optimizer"), (3, "all"))
    )
    facts = [given["scaling"]["stages"]["ppo"][4] for given in (two, three, offloaded)]
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    updates, passes = 2 * 2, 8
    # Forward and backward, of policy and critic; for the rollout the base's in bfloat16, too.
    gathered = (2 + 2 * 4) * linear + updates * passes * 2 * 2 * 4 * linear
    trained = 2 * 4 * linear
    # Gradients of layers leave with every pass; what they become is gathered with the layers.
    more = gathered + updates * (passes - 2) * trained
    assert facts[1]["sent_bytes"] - facts[0]["sent_bytes"] == more * 3 // 4
    back = updates * (passes - 1) * trained
    assert facts[1]["moved_bytes"] - facts[0]["moved_bytes"] == back // 4
    assert facts[2]["moved_bytes"] - facts[0]["moved_bytes"] == more // 4


def test_steps_make_up_the_stage() -> None:
    recipe = load_recipe("miniature", ["data.prompts.heldout=[]"])
    shape = base_shape(recipe)
    works = {work.stage: work for work in plan_work(recipe, shape)}
    for stage in ("pretrain", "ppo"):
        steps = getattr(recipe, stage).steps
        of_step = sum(work.flops for work in step_work(recipe, shape, works[stage].stage, 1))
        of_half = sum(work.flops for work in step_work(recipe, shape, works[stage].stage, 2))
        assert steps * of_step == pytest.approx(sum(w.flops for w in works[stage].parts))
        assert 2 * of_half == pytest.approx(of_step)


def test_float32_is_computed_without_tensor_cores() -> None:
    assert card_speed("a100-80g", CARDS["a100-80g"], False, "float32").flops == 0.4 * 19.5e12
    assert "as published for bfloat16" in plan(LORA, 1)["time"]["device"]
    assert "67 TFLOP/s" in plan(FULL, 1)["time"]["device"]
