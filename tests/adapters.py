"""Adapter folders with random weights, as the stages sft and reward write them."""

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from align.adapter_methods import lora_config
from align.recipe_adapter import Adapter


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every trainable parameter a random value, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def sft_adapter(base: PreTrainedModel, folder: Path, seed: int = 1, layers: str = "all") -> Path:
    """Write a LoRA adapter for ``base``, which is wrapped in the course of it."""
    config = lora_config(Adapter(r=4, alpha=8.0, layers=layers), "CAUSAL_LM", base)
    model = get_peft_model(base, config)
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder
