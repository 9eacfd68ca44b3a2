"""The adapter methods of the literature: what each trains, as a configuration of PEFT.

A method that trains modules of the base as they are is a LoRA without targets to PEFT, with modules
or biases that are trained and saved beside it; so all methods but ``full`` are folders that PEFT
loads.
"""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.bottleneck import BottleneckConfig
from align.errors import InputError, TrainingError
from align.recipe_adapter import Adapter, Method

HEAD = "score"  # transformers' name for the head of a decoder that classifies
Task = Literal["CAUSAL_LM", "SEQ_CLS"]

# The linear layers whose outputs are added to the residual stream: Llama and its like, GPT-2,
# GPT-NeoX, BERT and its like.
_AFTER_ATTENTION = r"(self_attn\.o_proj|attn\.c_proj|attention\.dense|attention\.output\.dense)"
_AFTER_MLP = r"(mlp\.down_proj|mlp\.c_proj|mlp\.dense_4h_to_h|layer\.\d+\.output\.dense)"
# What the names of a method's own parameters hold.
_OWN = {"lora": ".lora_", "bottleneck": ".bottleneck_", "prefix": "prompt_encoder."}


def adapter_config(
    adapter: Adapter, task_type: Task, model: PreTrainedModel, heads: Sequence[str] = (HEAD,)
) -> PeftConfig | None:
    """Return the PEFT configuration of a recipe's adapter on ``model``, None for ``full``.

    Args:
        task_type: SEQ_CLS also trains and saves the head of the model.
        model: the model without adapters.
        heads: the names of the modules that make up that head.

    Raises:
        InputError: the model has nothing that the method trains, or not so much of it.
    """
    saved = [*heads] if task_type == "SEQ_CLS" else []
    match adapter.method:
        case "full":
            return None
        case "lora":
            return lora_config(adapter, task_type, model, heads)
        case "bottleneck":
            return BottleneckConfig(
                size=adapter.bottleneck_size,
                target_modules=_sublayers(adapter, model),
                modules_to_save=saved or None,
                task_type=task_type,
            )
        case "prefix":
            return PrefixTuningConfig(
                num_virtual_tokens=adapter.prefix_tokens,
                modules_to_save=saved or None,
                task_type=task_type,
            )
    modules: list[str] = []
    if adapter.method == "head_only" and not saved:
        modules = [_output_embeddings(model)]
    elif adapter.method == "top_layers":
        modules = _top_modules(model, adapter.top_layers or 0)
    elif adapter.method == "bitfit" and not _has_biases(model.base_model):
        raise InputError(
            f"adapter.method=bitfit: {type(model).__name__} has no biases in its layers; allowed"
            " for it: another method"
        )
    return LoraConfig(
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=[*modules, *saved] or None,
        task_type=task_type,
        bias="all" if adapter.method == "bitfit" else "none",
    )


def lora_config(
    adapter: Adapter, task_type: Task, model: nn.Module, heads: Sequence[str] = (HEAD,)
) -> LoraConfig:
    """Return the PEFT configuration for a recipe's LoRA on ``model``.

    Args:
        task_type: SEQ_CLS also trains and saves the head of the model.
        model: the model without adapters; ``all-linear`` is spelled out from its layers, because
            PEFT would reach into heads with it.
        heads: the names of the modules that make up that head.

    Raises:
        InputError: a target name is not a linear layer of the model.
    """
    names = linear_names(model)
    if isinstance(adapter.targets, str):
        targets = names
    else:
        targets = sorted(set(adapter.targets))
        unknown = [name for name in targets if name not in names]
        if unknown:
            raise InputError(
                f"adapter.targets={', '.join(unknown)}: no such linear layers in"
                f" {type(model).__name__}; it has {', '.join(names)}"
            )
    conv = any(isinstance(module, Conv1D) for module in model.modules())
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=adapter.dropout,
        target_modules=targets,
        layers_to_transform=_adapted_layers(adapter, model),
        modules_to_save=[*heads] if task_type == "SEQ_CLS" else None,
        task_type=task_type,
        bias="none",
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=True if adapter.init == "kaiming" else adapter.init,
        fan_in_fan_out=conv,  # GPT-2 stores its matrices transposed
    )


def linear_names(model: nn.Module) -> list[str]:
    """Return the names, without their path, of the linear layers inside the model's body.

    Output embeddings and heads are left out: they are neither adapted nor shared between roles.
    """
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in body.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and name not in ("", "lm_head", HEAD)
        }
    )


def check_trained(model: nn.Module, method: Method) -> None:
    """Check that what is trained is what the method trains and a head: all of it, in float32.

    Libraries that prepare a model for training rewrite which of its parameters are, and in which
    precision.

    Raises:
        TrainingError: names the first parameters that should not be trained, or should be.
    """
    wrong = []
    for name, parameter in model.named_parameters():
        wanted = _is_trained(name, method)
        if parameter.requires_grad != wanted or (wanted and parameter.dtype != torch.float32):
            wrong.append(f"{name} ({parameter.dtype}, trained: {parameter.requires_grad})")
    if wrong or not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            f"only what adapter.method={method} trains, and a score head, must be trained: all of"
            f" both, in float32; but found {len(wrong)} others, like {wrong[:2]}"
        )


def trained_share(model: nn.Module, base_parameters: int) -> dict[str, float]:
    """Return how many parameters are trained, and their ratio to those of the bare base."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained/parameters": float(trained), "trained/share": trained / base_parameters}


def say_share(method: Method, share: dict[str, float]) -> str:
    """Say in a line what ``trained_share`` counted."""
    count, ratio = share["trained/parameters"], share["trained/share"]
    return f"adapter.method={method} trains {count:,.0f} parameters, {ratio:.3%} of the base's"


def _is_trained(name: str, method: Method) -> bool:
    if method == "full" or ".modules_to_save." in name:
        return True
    if method == "bitfit":
        return name.endswith(".bias") and ".original_module." not in name
    return method in _OWN and _OWN[method] in name


def _adapted_layers(adapter: Adapter, model: nn.Module) -> list[int] | None:
    """Return the numbers of the layers that carry adapters, None for all of them."""
    if adapter.layers == "all":
        return None
    depth = int(model.config.num_hidden_layers)  # type: ignore[arg-type, union-attr]
    carried = -(-depth // {"top-half": 2, "top-quarter": 4}[adapter.layers])
    return list(range(depth - carried, depth))


def _sublayers(adapter: Adapter, model: PreTrainedModel) -> str:
    """Return the pattern of the linear layers behind which bottlenecks go."""
    ends = [_AFTER_MLP] if adapter.placement == "pfeiffer" else [_AFTER_ATTENTION, _AFTER_MLP]
    pattern = rf".*\.({'|'.join(ends)})"
    found = sum(re.fullmatch(pattern, name) is not None for name, _ in model.named_modules())
    if found != len(ends) * model.config.num_hidden_layers:
        raise InputError(
            f"adapter.method=bottleneck: where the sublayers of {type(model).__name__} end is not"
            " known; allowed for it: another method"
        )
    return pattern


def _output_embeddings(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def _has_biases(body: nn.Module) -> bool:
    return any(name.endswith(".bias") for name, _ in body.named_parameters())


def _top_modules(model: PreTrainedModel, count: int) -> list[str]:
    """Return the names of the uppermost layers and of what the body has above them."""
    body, depth = model.base_model, model.config.num_hidden_layers
    if count > depth:
        raise InputError(
            f"adapter.top_layers={count}: {type(model).__name__} has {depth} layers; allowed: at"
            f" most {depth}"
        )
    stacks = (m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    layers = next(stacks, None)
    if layers is None:
        raise InputError(
            f"adapter.method=top_layers: the layers of {type(model).__name__} are not found, or are"
            " one that is used again; allowed for it: another method"
        )
    parts = list(body.children())
    holder = next(i for i, part in enumerate(parts) if any(m is layers for m in part.modules()))
    above = [part for part in parts[holder + 1 :] if any(True for _ in part.parameters())]
    wanted = [*layers[depth - count :], *above]
    return [name for name, module in model.named_modules() if any(module is m for m in wanted)]
