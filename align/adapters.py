"""Folders of trained models: adapters that PEFT loads, and whole models.

PEFT's own ``save_pretrained`` leaves files whose content depends on where they lie (absolute paths,
a model card) and on Python's hash seed (the order of the target names); ours does neither, so that
a run tree can be moved and two equal runs have equal hashes.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PretrainedConfig, PreTrainedModel

from align.bottleneck import PEFT_TYPE as BOTTLENECK
from align.errors import ParentError
from align.manifest import FILE as MANIFEST
from align.recipe_adapter import Method
from align.weights import check_fits, shapes, tensor_shapes

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save_trained(
    model: PeftModel | PreTrainedModel, folder: Path, *, base: str, revision: str | None
) -> None:
    """Write what was trained: an adapter as in ``save_adapter``, or a whole model."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder, base=base, revision=revision)
    else:
        model.save_pretrained(folder, safe_serialization=True)


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


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a folder's adapter, by whatever method, on its base, which is used up; frozen.

    Raises:
        ParentError: its file is damaged, or its tensors do not fit the base. PEFT on its own would
            leave those that are missing as they are drawn.
    """
    found = tensor_shapes(folder / WEIGHTS)
    try:
        # What does not fit is named below.
        adapted = PeftModel.from_pretrained(base, folder, ignore_mismatched_sizes=True)
    except ValueError as error:  # other layers
        raise ParentError(f"{folder}: its adapter does not fit the base: {error}") from error
    ours = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_fits(folder / WEIGHTS, found, shapes(ours))
    share_config(adapted)
    return adapted


def share_config(model: PeftModel) -> None:
    """Give the layers that PEFT has copied, to train the copies, the model's own configuration.

    What is set on it later, like the kind of attention, would not reach them otherwise.
    """
    config = model.get_base_model().config
    for module in model.modules():
        if isinstance(vars(module).get("config"), PretrainedConfig):
            module.config = config


def trained_method(folder: Path) -> Method:
    """Return the adapter method that a folder's model was trained by, from its configuration."""
    if not is_adapter(folder):
        return "full"
    settings = _settings(folder)
    kind = settings["peft_type"]
    if kind == BOTTLENECK:
        return "bottleneck"
    if kind == "PREFIX_TUNING":
        return "prefix"
    if settings["target_modules"] != DUMMY_TARGET_MODULES:
        return "lora"
    if settings["bias"] != "none":
        return "bitfit"
    return "head_only" if len(settings["modules_to_save"]) == 1 else "top_layers"


def _settings(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration.

    Raises:
        ParentError: it is no JSON, or no configuration of PEFT's.
    """
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ParentError(f"{path}: not JSON: {error}; make the adapter again") from None
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ParentError(f"{path}: names no peft_type, so this is no adapter; make it again")
    return settings


def stored_base(base: str, folder: Path) -> str:
    """Return what ``adapter_config.json`` in ``folder`` says about the base at ``base``.

    A stage's result: the path relative to the folder. Another folder: its absolute path. A hub
    id: as it is.
    """
    path = Path(base)
    if (path.parent / MANIFEST).is_file():
        return os.path.relpath(path.resolve(), folder.resolve())
    return str(path.resolve()) if path.is_dir() else base
