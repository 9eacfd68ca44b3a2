"""The plan against real tiny models: bytes that are there, counted storage by storage."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from align import logprobs, lora, plan_memory
from align.attention import packed_attention
from align.engine import Engine
from align.merging import merged
from align.plan import plan_recipe
from align.plan_items import Kind, StagePlan
from align.plan_memory import Compute, adam_bytes, kept_per_token
from align.plan_model import linear_bytes, read_shape
from align.plan_setup import Setup
from align.recipe import Recipe
from align.recipe_adapter import Adapter
from align.recipe_ppo import Ppo
from align.recipe_reward import Head
from align.roles import Roles
from align.sequences import join
from pipelines.reward_loss import output_head
from pipelines.sft import add_adapter
from reward.head import ScoreHead
from reward.model import new_reward_model
from tests import adapters, tiny

CONFIGS = {
    "llama": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 80},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"model_type": "llama", "head_dim": 12, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 40},
    "gpt_neox": {"model_type": "gpt_neox"},
}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


DEEP = Head(depth=3, width=256)  # on 32 states: more than all else that is trained


def full_config(name: str) -> dict[str, object]:
    config = {"vocab_size": 100} | CONFIGS[name]
    if name != "gpt2":
        config = SIZES | config
    return AutoConfig.for_model(**config).to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = full_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shape = read_shape(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    named = {m.name for m in shape.matrices}
    linear = [p for n, p in model.base_model.named_parameters() if n.split(".")[-2] in named]
    assert shape.linear == sum(p.numel() for p in linear if p.ndim == 2)


def recipe(**changes: object) -> Recipe:
    """A recipe on ``tiny.llama``; ``changes`` are sections, or keys of ``ppo``."""
    data = {
        "sft": {"train": [{"world": "demonstrations"}]},
        "reward": {"train": [{"world": "pairs"}]},
        "prompts": {"train": [{"world": "prompts"}]},
    }
    ppo = {"lr": 1e-3, "batch_size": 2, "minibatch_size": 2, "steps": 1, "max_new_tokens": 8}
    training = {"lr": 1e-3, "batch_size": 2}
    sections = {"base": {"id": "x"}, "adapter": {"r": 4, "alpha": 8.0}}
    ppo |= {key: value for key, value in changes.items() if key in Ppo.model_fields}
    sections |= {key: value for key, value in changes.items() if key not in Ppo.model_fields}
    return Recipe.model_validate(
        {"name": "x", "data": data, "sft": training, "reward": training, "ppo": ppo, **sections}
    )


def with_head(made: Recipe, head: Head) -> Recipe:
    assert made.reward is not None
    return made.model_copy(update={"reward": made.reward.model_copy(update={"head": head})})


def plans(made: Recipe, **changes: object) -> dict[str, StagePlan]:
    shape = read_shape(tiny.llama(**changes).config.to_dict())
    return {plan.stage: plan for plan in plan_recipe(made, shape)}


def stored(tensors: object) -> int:
    """Count bytes, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def check(plan: StagePlan, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Compare weights, gradients and optimiser states with the plan's, within 1 %."""
    states = [t for s in optimizer.state.values() for n, t in s.items() if n.startswith("exp")]
    counted: dict[Kind, int] = {
        "weights": stored([*module.parameters(), *module.buffers()]) - not_planned(module),
        "gradients": stored([p.grad for p in module.parameters() if p.grad is not None]),
        "states": stored(states),
    }
    for kind, number in counted.items():
        assert number > 0
        assert plan.sum(kind) == pytest.approx(number, rel=0.01), kind


def not_planned(module: nn.Module) -> int:
    """Rotary frequencies: a few numbers per model, which no plan needs to know."""
    return stored([b for name, b in module.named_buffers() if "inv_freq" in name])


def step(module: nn.Module) -> torch.optim.Optimizer:
    """Give every trainable parameter a gradient and the optimiser a step; keep the gradients."""
    trained = [p for p in module.parameters() if p.requires_grad]
    settings = recipe().ppo
    assert settings is not None
    engine = Engine([(trained, 1e-3)], settings, 1)
    for p in trained:
        p.grad = torch.ones_like(p)
    engine.optimizer.optimizer.step()
    return engine.optimizer.optimizer


def roles(tmp_path, dtype: torch.dtype, *, layout: str, trunk: str, layers: str) -> Roles:
    folder = adapters.sft_adapter(tiny.llama(), tmp_path / "a", layers=layers)
    own = {"separate": ("policy", "value"), "mixed": ("value",)}.get(layout, ())
    names = ["policy", "reference", "reward", *(["value"] if trunk == "own" else [])]
    models = {role: merged(tiny.llama().to(dtype), folder).float() for role in own if role in names}
    if "value" in models:
        models["value"] = models["value"].base_model
    return Roles(
        tiny.llama().to(dtype),
        {role: folder for role in names if role not in models},
        models=models,
        heads={"reward": ScoreHead(32), "value": ScoreHead(32)},
        trainable=("policy", "value"),
    )


@pytest.mark.parametrize("layout", ["shared", "separate", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trunk", ["own", "policy"])
@pytest.mark.parametrize("layers", ["all", "top-half"])
def test_ppo_holds_what_the_plan_says(tmp_path, layout, dtype, trunk, layers) -> None:
    made = roles(tmp_path, getattr(torch, dtype), layout=layout, trunk=trunk, layers=layers)
    critic = "separate" if (layout, trunk) == ("mixed", "own") else None
    plan = plans(
        recipe(
            layout=layout if layout != "mixed" else "shared",
            value={"trunk": trunk, "layout": critic},
            base={"id": "x", "dtype": dtype},
            adapter={"r": 4, "alpha": 8.0, "layers": layers},
        )
    )["ppo"]
    check(plan, made, step(made))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", ["all", "top-half"])
def test_sampling_adds_the_adapter_to_the_weights_that_the_plan_says(
    tmp_path, make, dtype, layers
) -> None:
    folder = adapters.sft_adapter(make(), tmp_path / "a", layers=layers)
    made = Roles(make().to(getattr(torch, dtype)), {"policy": folder})
    with made.use("policy") as model, lora.summed(model):
        kept = [vars(m)["summed"] for m in model.modules() if "summed" in vars(m)]
    adapter = {"r": 4, "alpha": 8.0, "layers": layers}
    shape = read_shape(make().config.to_dict())
    (plan,) = (
        p
        for p in plan_recipe(recipe(base={"id": "x", "dtype": dtype}, adapter=adapter), shape)
        if p.stage == "ppo"
    )
    (rollout,) = (phase for phase in plan.phases if phase.name == "rollout")
    planned = [item.bytes for item in rollout.items if item.name.startswith("weights with")]
    assert sum(planned) == stored(kept)
    assert bool(kept) == (dtype == "float32" and make is tiny.llama)


def test_with_checkpointing_sampling_adds_nothing(tmp_path, monkeypatch) -> None:
    base = {"id": "x", "gradient_checkpointing": True}
    (rollout,) = (p for p in plans(recipe(base=base))["ppo"].phases if p.name == "rollout")
    assert not [item for item in rollout.items if item.name.startswith("weights with")]
    monkeypatch.setattr(lora, "summed", lambda _: pytest.fail("added"))
    folder = adapters.sft_adapter(tiny.llama(), tmp_path / "a")
    made = Roles(tiny.llama(), {"policy": folder}, recompute=True)
    settings = {"temperature": 1.0, "max_new_tokens": 4, "pad_id": 0, "seed": 0, "end_ids": [1]}
    assert made.generate("policy", [[5, 6]], **settings).responses


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_ppo_holds_deep_heads(tmp_path, trunk) -> None:
    made = roles(tmp_path, torch.float32, layout="shared", trunk=trunk, layers="all")
    made.heads["reward"] = ScoreHead(32, 1, (256, 256)).requires_grad_(False)
    if trunk == "own":  # it starts from the reward model
        made.heads["value"] = ScoreHead(32, 1, (256, 256))
    settings = with_head(recipe(value={"trunk": trunk}), DEEP)
    check(plans(settings)["ppo"], made, step(made))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", [Head(), DEEP], ids=["linear", "deep"])
def test_sft_and_reward_hold_what_the_plan_says(tmp_path, dtype, head) -> None:
    settings = with_head(recipe(base={"id": "x", "dtype": dtype}), head)
    expected = plans(settings)
    sft = add_adapter(tiny.llama().to(getattr(torch, dtype)), settings)
    check(expected["sft"], sft, step(sft))
    sft.save_pretrained(tmp_path / "sft")
    base = tiny.llama().to(getattr(torch, dtype))
    reward = new_reward_model(base, settings.adapter, tmp_path / "sft", 0, head=head)
    del base
    check(expected["reward"], reward, step(reward))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_auxiliary_loss_keeps_the_output_embeddings(tmp_path, method, tied) -> None:
    layout = "separate" if method == "full" else "shared"
    settings = recipe(adapter={"method": method, "r": 4, "alpha": 8.0}, layout=layout)
    assert settings.reward is not None
    section = settings.reward.model_copy(update={"aux_lm_coef": 0.5})
    settings = settings.model_copy(update={"reward": section, "ppo": None})
    expected = plans(settings, tie_word_embeddings=tied)["reward"]
    base = tiny.llama(tie_word_embeddings=tied)
    if method == "lora":
        adapters.sft_adapter(tiny.llama(), tmp_path)
    reward = new_reward_model(base, settings.adapter, tmp_path, seed=0)
    head = output_head(base)
    base.get_input_embeddings().requires_grad_(method == "full")
    module = nn.ModuleList([reward, head])
    del base
    check(expected, module, step(module))


def test_pretrain_holds_what_the_plan_says() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    c = model.config
    section = {
        "model": {
            "hidden_size": c.hidden_size,
            "num_layers": c.num_hidden_layers,
            "num_heads": c.num_attention_heads,
            "num_kv_heads": c.num_key_value_heads,
            "intermediate_size": c.intermediate_size,
            "max_positions": c.max_position_embeddings,
        },
        "steps": 1,
        "sequence_length": 16,
        "lr": 1e-3,
        "batch_size": 2,
    }
    made = Recipe.model_validate(
        {
            "name": "x",
            "base": {"id": "pretrain"},
            "tokenizer": {"vocab_size": c.vocab_size},
            "data": {"pretrain": {"train": [{"world": "text"}]}},
            "pretrain": section,
        }
    )
    (plan,) = plan_recipe(made, None)
    check(plan, model, step(model))


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", True)])
def test_four_bits_take_what_bitsandbytes_makes_of_them(kind: str, double: bool) -> None:
    from bitsandbytes import functional

    config = tiny.llama(hidden_size=128, intermediate_size=320).config.to_dict()
    shape, weights, constants = read_shape(config), 0, 0
    for matrix in shape.matrices:
        weight = torch.randn(matrix.outputs, matrix.inputs)
        packed, state = functional.quantize_4bit(
            weight, quant_type=kind, compress_statistics=double
        )
        tensors = [state.absmax, state.code]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code, state.offset]
        weights += packed.nbytes * shape.layers
        constants += sum(t.nbytes for t in tensors) * shape.layers
    assert linear_bytes(shape, kind, double) == (weights, constants)


@pytest.mark.parametrize("size", [100, 4096, 5000])
def test_eight_bit_adam(size: int) -> None:
    from bitsandbytes.optim import AdamW8bit

    parameter = nn.Parameter(torch.zeros(size))
    optimizer = AdamW8bit([parameter])
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    state = optimizer.state[parameter]
    names = ("state1", "state2", "absmax1", "absmax2")
    counted = sum(state[name].nbytes for name in names if name in state)
    assert adam_bytes([size], "adamw_8bit") == counted


def test_the_chunk_is_that_of_the_log_probabilities() -> None:
    assert plan_memory.CHUNK_ELEMENTS == logprobs.CHUNK_ELEMENTS


class Kept:
    """Counts the storages that a forward pass keeps for its backward pass, weights aside."""

    def __init__(self, module: nn.Module) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.tensors: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self._known:
            self.tensors.append(tensor)
        return tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_activations_are_those_that_autograd_keeps(tmp_path, dtype, texts, make) -> None:
    """Two depths: their difference is what a block keeps."""
    kept = []
    for depth in (2, 6):
        base = deep(make, depth)
        folder = adapters.sft_adapter(deep(make, depth), tmp_path / str(depth))
        made = Roles(base.to(getattr(torch, dtype)), {"policy": folder}, trainable=("policy",))
        batch = join([[5] * 20] * texts, [[6] * 44] * texts)
        counter = Kept(made)
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda t: t):
            made.hidden("policy", batch, batch.response_spans).sum()
        kept.append(stored(counter.tensors))
    width = {"float32": 4, "bfloat16": 2}[dtype]
    compute = Compute(width, Adapter(r=4, alpha=8.0), joined=texts > 1)
    expected = kept_per_token(read_shape(base.config.to_dict()), compute)
    counted = (kept[1] - kept[0]) / 4 / (64 * texts)
    if dtype == "float32" and make is tiny.llama:  # the fused layers of align.lora keep A x nowhere
        expected -= 4 * 4 * len(read_shape(base.config.to_dict()).targets(compute.adapter))
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_of_the_stages_before_ppo_are_those_that_autograd_keeps(dtype, dropout) -> None:
    """Padded rows and PEFT's own layers. Dropout's mask takes 4 bytes on a CPU, where a GPU's 1."""
    made = recipe(base={"id": "x", "dtype": dtype}, adapter={"r": 4, "dropout": dropout})
    kept = []
    for depth in (2, 6):
        model = add_adapter(deep(tiny.llama, depth).to(getattr(torch, dtype)), made).train()
        counter = Kept(model)
        mask = torch.ones(3, 48, dtype=torch.long)
        mask[0, 40:] = 0
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda t: t):
            model.base_model.model.model(torch.full((3, 48), 5), attention_mask=mask)
        kept.append(stored(counter.tensors))
    shape = read_shape(model.config.to_dict())
    setup = Setup(made, shape)
    expected = kept_per_token(shape, setup.padded()) + 48 * setup.width  # a row of the mask
    if dropout:
        expected += (4 - 1) * sum(m.inputs for m in shape.matrices)
    counted = (kept[1] - kept[0]) / 4 / (3 * 48)
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_shared_prompts_are_those_that_autograd_keeps(tmp_path, dtype) -> None:
    """Two rankings of three responses each, whose prompts are computed once: 2 x (20 + 3 x 14)."""
    made, kept = recipe(base={"id": "x", "dtype": dtype}), []
    limits = made.data.model_copy(update={"max_prompt_tokens": 20, "max_response_tokens": 14})
    made = made.model_copy(update={"data": limits})
    for depth in (2, 6):
        folder = adapters.sft_adapter(deep(tiny.llama, depth), tmp_path / str(depth))
        base = deep(tiny.llama, depth).to(getattr(torch, dtype))
        model = new_reward_model(base, made.adapter, folder, seed=0).train()
        ids, mask = torch.full((6, 34), 5), torch.ones(6, 34, dtype=torch.bool)
        counter = Kept(model)
        with packed_attention(model.backbone) as possible:
            assert possible
            with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda t: t):
                model.states(ids, mask, torch.tensor([0, 20, 20] * 2))
        kept.append(stored(counter.tensors))
    shape = read_shape(base.config.to_dict())
    setup = Setup(made, shape)
    expected = 2 * (20 + 3 * 14) * kept_per_token(shape, setup.packed())
    expected += setup.repeated_keys(2 * 2).bytes / shape.layers
    assert (kept[1] - kept[0]) / 4 == pytest.approx(expected, rel=0.03)  # masks are not planned


def deep(make, depth: int):
    if make is tiny.llama:
        return tiny.llama(hidden_size=64, intermediate_size=176, num_hidden_layers=depth)
    config = tiny.gpt2().config
    config.n_layer = depth
    return type(tiny.gpt2())(config).eval()
