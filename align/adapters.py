"""LoRA adapters: what they are put on, and folders of them that load without our code.

PEFT's own ``save_pretrained`` leaves files whose content depends on where they lie (absolute paths,
a model card) and on Python's hash seed (the order of the target names); ours does neither, so that
a run tree can be moved and two equal runs have equal hashes.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.errors import InputError, TrainingError
from align.manifest import FILE as MANIFEST
from align.recipe import Adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "score"  # transformers' name for the head of a decoder that classifies


def lora_config(
    adapter: Adapter, task_type: Literal["CAUSAL_LM", "SEQ_CLS"], model: nn.Module
) -> LoraConfig:
    """Return the PEFT configuration for a recipe's adapter on ``model``.

    Args:
        task_type: SEQ_CLS also trains and saves the ``score`` head of the model.
        model: the model without adapters; ``all-linear`` is spelled out from its layers, because
            PEFT would reach into heads with it.

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
        modules_to_save=[HEAD] if task_type == "SEQ_CLS" else None,
        task_type=task_type,
        bias="none",
        fan_in_fan_out=conv,  # GPT-2 stores its matrices transposed
    )


def _adapted_layers(adapter: Adapter, model: nn.Module) -> list[int] | None:
    """Return the numbers of the layers that carry adapters, None for all of them."""
    if adapter.layers == "all":
        return None
    depth = int(model.config.num_hidden_layers)  # type: ignore[arg-type, union-attr]
    carried = -(-depth // {"top-half": 2, "top-quarter": 4}[adapter.layers])
    return list(range(depth - carried, depth))


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


def check_trained(model: nn.Module) -> None:
    """Check that what is trained is the LoRA adapter and a score head: all of both, in float32.

    Libraries that prepare a model for training rewrite which of its parameters are, and in which
    precision.

    Raises:
        TrainingError: names the first parameters that should not be trained, or should be.
    """
    wrong = []
    for name, parameter in model.named_parameters():
        wanted = ".lora_" in name or f".{HEAD}.modules_to_save." in name
        if parameter.requires_grad != wanted or (wanted and parameter.dtype != torch.float32):
            wrong.append(f"{name} ({parameter.dtype}, trained: {parameter.requires_grad})")
    if wrong or not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "only a float32 adapter and score head must be trained, all of both; but found"
            f" {len(wrong)} others, like {wrong[:2]}"
        )


def save_adapter(
    model: PeftModel,
    folder: Path,
    adapter_name: str = "default",
    *,
    base: str,
    revision: str | None,
) -> None:
    """Write one adapter of ``model`` as a flat folder of safetensors and configuration.

    Args:
        folder: must not hold an adapter already.
        base: where the base was loaded from. If it is the result of a stage, its path relative to
            ``folder`` is stored, so that the two can be moved together.
        revision: the commit of a base from the hub, so that the adapter comes back on that one.

    Raises:
        FileExistsError: there is an adapter in the folder.
    """
    if (folder / CONFIG).exists():
        raise FileExistsError(f"{folder}: holds an adapter already")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        # save_embedding_layers: "auto" would ask the hub for the base's configuration.
        model.save_pretrained(
            temporary,
            safe_serialization=True,
            selected_adapters=[adapter_name],
            save_embedding_layers=False,
        )
        source = Path(temporary)
        if adapter_name != "default":
            source = source / adapter_name
        settings = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = stored_base(base, folder)
        settings["revision"] = revision
        for key in ("target_modules", "modules_to_save"):
            if isinstance(settings.get(key), list):
                settings[key] = sorted(settings[key])
        shutil.move(source / WEIGHTS, folder / WEIGHTS)
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, not a whole model."""
    return (folder / CONFIG).is_file()


def stored_base(base: str, folder: Path) -> str:
    """Return what ``adapter_config.json`` in ``folder`` says about the base at ``base``.

    A stage's result: the path relative to the folder. Another folder: its absolute path. A hub
    id: as it is.
    """
    path = Path(base)
    if (path.parent / MANIFEST).is_file():
        return os.path.relpath(path.resolve(), folder.resolve())
    return str(path.resolve()) if path.is_dir() else base
