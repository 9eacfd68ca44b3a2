"""Several processes and ZeRO: what is refused, what DeepSpeed is told, how batches are shared."""

import json
import re
from pathlib import Path

import pytest

from align import group
from align.errors import InputError, RecipeError
from align.plan import plan_recipe
from align.plan_items import Item, Phase, StagePlan
from align.plan_model import read_shape
from align.published import CONFIGS
from align.recipe_distributed import Distributed, rows_and_passes
from align.recipe_io import load_recipe
from align.recipe_types import Optimisation
from align.zero import deepspeed_settings
from data.order import SortedBatches, WholeBatches
from launch.command import Python, stage_command
from launch.plan import make_plan
from launch.plan_print import print_plan

GIB = 2**30
LORA, FULL = "llama2-7b/lora-zero2", "llama2-7b/full-zero3-offload"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distributed.zero=0"], "distributed.offload=all: is a part of ZeRO"),
        (["distributed.zero=2"], "offload=all: weights are whole with zero=2; allowed: none, opt"),
        (["adapter.method=bitfit"], "adapter.method=bitfit: not built with distributed.processes="),
        (["adapter.method=lora", "adapter.dora=true"], "adapter.dora=true: not built with"),
        (
            ["adapter.method=lora", "base.quantization=int8"],
            "=int8: not built with distributed.proc",
        ),
        (["sft.optimizer=adamw_8bit"], "sft.optimizer=adamw_8bit: not built with distributed.zero"),
        (
            ["sft.batch_size=24"],
            "sft.batch_size=24: counts over all processes, and 8 processes x 2",
        ),
        (["sft.micro_batch_size=null", "sft.batch_size=12"], "allowed: multiples of 8"),
        (
            ["distributed.nvme_path=/nvme", "distributed.offload=none"],
            "distributed.nvme_path=/nvme: nothing is offloaded there with zero=3, offload=none",
        ),
        (
            ["distributed.nvme_path=/nvme"],
            "run.keep_checkpoints: not built with distributed.nvme_path, where the states lie",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(FULL, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.ptx={coef: 1.0, batch_size: 4}"], "ppo.ptx.batch_size.* allowed: multiples of 3"),
        (["ppo.rollout.engine=hf"], "ppo.rollout.engine=hf: not built in a group"),
        (["distributed.zero=1", "ppo.optimizer=adamw_8bit"], "ppo.optimizer=.*: not built with"),
        (["ppo.minibatch_size=16"], "the 3 processes cannot share it equally; allowed: multiples"),
    ],
)
def test_ppo_is_refused_by_name(overrides: list[str], message: str) -> None:
    group = ["distributed.processes=3"]
    group += [f"{key}=48" for key in ("pretrain.batch_size", "sft.batch_size", "reward.batch_size")]
    group += ["ppo.batch_size=48"]
    shared = ["ppo.minibatch_size=24"] if "minibatch" not in overrides[0] else []
    micro = [f"{stage}.micro_batch_size=null" for stage in ("pretrain", "sft", "reward", "ppo")]
    with pytest.raises(RecipeError, match=message):
        load_recipe("miniature", [*group, *micro, *shared, *overrides])
    if shared:
        load_recipe("miniature", [*group, *micro, *shared])


def test_what_deepspeed_is_told() -> None:
    section = Optimisation(lr=1e-3, batch_size=24, micro_batch_size=2, max_grad_norm=0.5)
    assert deepspeed_settings(Distributed(processes=4, zero=3, offload="all"), section) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5_000_000,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2147483647,
    }
    zero = deepspeed_settings(Distributed(processes=2, zero=1), section)["zero_optimization"]
    assert zero == {"stage": 1, "reduce_bucket_size": 5_000_000}
    # PPO steps once per minibatch, 32 over 4 processes, in as many passes as each of them needs.
    recipe = load_recipe(LORA)
    assert recipe.ppo is not None
    assert deepspeed_settings(recipe.distributed, recipe.ppo) == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2147483647,
    }


def test_a_fast_disk_is_passed_on() -> None:
    section = Optimisation(lr=1e-3, batch_size=24)
    chosen = Distributed(processes=2, zero=3, offload="all", nvme_path="/nvme")
    zero = deepspeed_settings(chosen, section)["zero_optimization"]
    place = {"device": "nvme", "nvme_path": "/nvme"}
    assert (zero["offload_optimizer"], zero["offload_param"]) == (place, place)


def test_a_disk_without_libaio_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops import __compatible_ops__ as operations

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(group, "_end_with_starter", lambda: None)
    monkeypatch.setitem(operations, "deepspeed_shm_comm", False)
    monkeypatch.setitem(operations, "async_io", False)
    with pytest.raises(InputError, match=r"distributed.nvme_path: .* without libaio"):
        group.join(deepspeed=True, timeout=1.0, nvme=True)


def test_ppo_leaves_the_optimiser_of_zero_3_to_us() -> None:
    recipe = load_recipe(LORA, ["distributed.zero=3", "distributed.offload=all"])
    assert recipe.ppo is not None
    assert deepspeed_settings(recipe.distributed, recipe.ppo)["zero_optimization"] == {
        "stage": 3,
        "memory_efficient_linear": False,  # else it would put its own in the place of torch's
        "offload_param": {"device": "cpu"},
    }


def test_the_whole_batch_is_divided_where_no_pass_is_named() -> None:
    section = Optimisation(lr=1e-3, batch_size=24)
    assert rows_and_passes(section, Distributed()) == (24, 1)
    assert rows_and_passes(section, Distributed(processes=3)) == (8, 1)


@pytest.mark.parametrize(("blank", "expected"), [(7, 9), (None, 6)])
def test_epochs_of_whole_batches_are_the_order_filled_or_cut(
    blank: int | None, expected: int
) -> None:
    order = SortedBatches([5, 3, 8, 1, 2, 9, 4], batch_size=3, seed=1)
    whole = WholeBatches(order, 3, blank)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        alone = list(order)
        whole.set_epoch(epoch)
        assert list(whole) == [*alone, 7, 7][:expected]
    assert len(whole) == expected


def test_the_command_of_a_group() -> None:
    house = Python("/env/bin/python", Path("/house"), {})
    command = stage_command(house, "sft", Path("r.yaml"), ["seed=7"], processes=4)
    words = ("-m", "pipelines.several", "4", "sft", "r.yaml", "seed=7")
    assert command.argv == ("/env/bin/python", *words)


def test_the_plan_of_all_weights_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    """Adam in float32 takes 4 + 4 + 8 bytes a weight (Rajbhandari et al. 2020, section 3.1)."""
    recipe = load_recipe(FULL)
    shape = read_shape(CONFIGS[recipe.base.id])
    sft, reward = plan_recipe(recipe, shape)
    count = 6_738_415_616
    sums = [sft.sum(kind) for kind in ("weights", "gradients", "states")]
    assert sums == [4 * count, 4 * count, 8 * count]
    without_head = count - 32_000 * 4096
    assert reward.sum("states") == 8 * (without_head + 4096)

    plan = make_plan(recipe, shape, 40 * GIB, 8)
    assert plan["way"] == "ZeRO 3, offload all"
    assert plan["fits"]
    # The first process alone, whole weights: more than its share while all train.
    assert 4 * count < plan["peak_bytes"] < 5.6 * count
    assert json.dumps(plan["deepspeed"]["sft"]["zero_optimization"]["offload_param"])
    assert plan["full_training"][8]["ZeRO 3, offload"] == 4 * 131_072_000 + 2 * count // 8
    # Another way's column is what a recipe that takes that way would need.
    for way, offload in (("ZeRO 3", "none"), ("ZeRO 3, offload", "optimizer")):
        other = load_recipe(FULL, [f"distributed.offload={offload}"])
        assert plan["by_gpus"][8]["bytes"][way] == make_plan(other, shape, None, 8)["peak_bytes"]


def test_zero_2_has_its_part_of_the_gradients_twice() -> None:
    weights, states = Item("base", 400, "", "weights"), Item("adam", 800, "", "states")
    training = Phase("training", (Item("gradients", 400, "", "gradients"),))
    plan = StagePlan("sft", (weights, states), (training,))
    bucket = 4 * 5_000_000
    # Weights, gradients, states, and from ZeRO 1 on a quarter of 400 for the copies.
    expected = (1600, 400 + 400 + 200 + 100, 400 + 2 * 100 + 200 + 100 + bucket, 500 + bucket)
    assert plan.per_gpu(4) == expected
    assert plan.trained_together(4, 2, "optimizer") == {"training": 400 + 100 + bucket}


def test_the_plan_of_lora_on_whole_bases() -> None:
    recipe = load_recipe(LORA)
    shape = read_shape(CONFIGS[recipe.base.id])
    plan = make_plan(recipe, shape, 24 * 10**9, 4)
    assert (plan["way"], plan["fits"]) == ("ZeRO 2", True)
    adapter = 39_976_960  # numbers of r=16 on all linear layers
    shares = plan["per_gpu"]["sft"]
    # Largest: after training. Adam's two moments, of which a quarter stays, and one of ZeRO's copy.
    assert shares["ZeRO 0"] - shares["ZeRO 2"] == (8 * 3 - 4) * adapter // 4
    # In PPO those of policy, critic and its head of 4096; gradients stay whole. And the bucket.
    shares = plan["per_gpu"]["ppo"]
    expected = (8 * 3 - 4) * (2 * adapter + 4096) // 4 - 4 * 5_000_000
    assert shares["ZeRO 0"] - shares["ZeRO 2"] == expected
    assert set(plan["deepspeed"]) == {"sft", "reward", "ppo"}


def test_the_plan_of_ppo_with_shared_layers() -> None:
    recipe = load_recipe(LORA)
    (ppo,) = (
        p for p in plan_recipe(recipe, read_shape(CONFIGS[recipe.base.id])) if p.stage == "ppo"
    )
    two, three, offloaded = (
        ppo.ppo_together(4, zero, offload)
        for zero, offload in ((2, "optimizer"), (3, "optimizer"), (3, "all"))
    )
    layers = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11_008)  # in bfloat16
    trained, bucket = 4 * (2 * 39_976_960 + 4096), 4 * 5_000_000  # policy, critic, and its head
    # A quarter of layers and of what is trained stays, and in updates one of 32 layers is whole.
    assert three["rollout"] - two["rollout"] == (layers + trained) // 4 - bucket
    one = layers // 32
    assert two["update"] - three["update"] == layers - one - (layers + trained) // 4 + bucket
    assert three["update"] - offloaded["update"] == (layers + trained) // 4


def test_the_plan_of_ppo_with_models_of_its_own_shared_out() -> None:
    recipe = load_recipe(LORA, ["ppo.layout=separate"])
    (ppo,) = (
        p for p in plan_recipe(recipe, read_shape(CONFIGS[recipe.base.id])) if p.stage == "ppo"
    )
    whole, parted = (ppo.ppo_together(4, zero, "none") for zero in (0, 3))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    rest = 32_000 * 4096 + (2 * 32 + 1) * 4096  # embeddings and norms; the policy's head as well
    trained = 4 * (2 * (linear + rest) + 32_000 * 4096 + 4096)  # and the critic's
    layers = (2 + 4 + 4) * linear  # of the base in bfloat16, of policy and critic
    # Whole weights all the same, and a part of them; of Adam's two moments a quarter.
    shared = (layers + trained - 8 * linear) // 4
    assert parted["rollout"] - whole["rollout"] == shared - 2 * trained * 3 // 4
    # In updates one layer is whole; of a layer's gradients those that come, and those that leave.
    one = 4 * linear // 32
    less = layers - one + 8 * linear - 2 * one - trained // 4
    assert whole["update"] - parted["update"] == less - shared + 2 * trained * 3 // 4


@pytest.mark.parametrize(
    ("name", "overrides", "memory", "key"),
    [
        (FULL, [], 24, "adapter.method"),  # 25.1 GiB of weights, whole in the first process
        (FULL, ["distributed.zero=2", "distributed.offload=none"], 40, "distributed.offload"),
        (LORA, [], 12, "base.quantization"),  # 12.6 GiB of base in every process
    ],
)
def test_what_makes_a_recipe_for_a_group_fit(
    name: str, overrides: list[str], memory: int, key: str
) -> None:
    recipe = load_recipe(name, overrides)
    shape, gpus = read_shape(CONFIGS[recipe.base.id]), recipe.distributed.processes
    plan = make_plan(recipe, shape, memory * GIB, gpus)
    assert not plan["fits"]
    # The table says of the recipe's own way what the verdict says.
    assert plan["by_gpus"][gpus]["bytes"][plan["way"]] == plan["peak_bytes"] > memory * GIB
    assert any(o.startswith(f"{key}=") for change in plan["changes"] for o in change["overrides"])
    for change in plan["changes"]:
        given = {one.partition("=")[0]: one for one in (*overrides, *change["overrides"])}
        changed = load_recipe(name, list(given.values()))
        again = make_plan(changed, shape, memory * GIB, changed.distributed.processes)
        assert again["fits"]
        assert again["peak_bytes"] == change["peak_bytes"]


def test_where_nothing_helps_the_plan_says_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(LORA)
    plan = make_plan(recipe, read_shape(CONFIGS[recipe.base.id]), GIB, 4)
    assert plan["changes"] == []
    least = plan["least"]
    changed = load_recipe(LORA, least["overrides"])
    again = make_plan(changed, read_shape(CONFIGS[recipe.base.id]), None, 4)
    assert (again["peak_bytes"], again["largest_stage"]) == (least["peak_bytes"], least["stage"])
    sizes = [item["bytes"] for item in least["items"]]
    assert sizes == sorted(sizes, reverse=True)
    assert GIB < sizes[0] < sum(sizes) <= least["peak_bytes"]
    print_plan(plan)
    said = capsys.readouterr().out
    assert "none of the changes that plan knows makes it fit: take a smaller base" in said
    assert f"{least['stage']} still needs " in said


@pytest.mark.parametrize(
    ("environ", "gpus", "own"),
    [
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 2, 1),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 8, 1),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, "of whi"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, "here: "),
    ],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(
    environ: dict[str, str], gpus: int, own: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if isinstance(own, str):
        with pytest.raises(InputError, match=rf"{own}.*each needs a GPU of its own, .* are 1$"):
            group._own_gpu(gpus)
    else:
        assert group._own_gpu(gpus) == own
