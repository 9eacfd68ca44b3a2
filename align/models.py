"""Language models: where the base lies, what it is, and how it is loaded.

Every model comes out the same whatever its folder says: dtype and quantisation of the recipe, no
dropout, no sampling settings of its own, weights from safetensors only.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.adapters import is_adapter, load_adapter
from align.errors import InputError
from align.manifest import BaseFacts, sha256_file
from align.places import stage_directory
from align.quantization import (
    check_stored,
    prepare_quantized,
    quantization_settings,
    with_quantization,
)
from align.recipe import Base, Recipe
from align.recipe_pretrain import SmallModel
from align.weights import check_files

_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "*.jinja")
_TOKENIZER_FILES = ("special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")
# transformers would draw what is missing at random, and say so only in a warning.
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def base_location(recipe: Recipe) -> str:
    """Return where the base is loaded from: the pretrain stage's model, a hub id or a folder."""
    if recipe.base.id == "pretrain":
        return str(stage_directory(recipe, "pretrain") / "model")
    return recipe.base.id


def base_facts(location: str, revision: str | None) -> BaseFacts:
    """Identify a base by the content of its weights and configuration.

    Args:
        location: a folder or a hub id; what the hub has is downloaded.
        revision: of a hub id: a commit, branch or tag; the commit is recorded.

    Raises:
        InputError: there is no such base, it has no safetensors, or they are damaged.
    """
    folder = Path(location)
    if folder.is_dir():
        # The last two parts: a run tree that is moved keeps its facts.
        name, commit = "/".join(folder.resolve().parts[-2:]), None
    else:
        folder = _from_hub(location, revision)
        name, commit = location, folder.name
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(
            f"{location}: no safetensors there; pickled weights are refused, convert them first"
        )
    check_files(folder)
    hashes = {path.name: _sha256(path) for path in (*weights, folder / "config.json")}
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return BaseFacts(id=name, revision=commit, sha256=digest)


def recipe_base_facts(recipe: Recipe) -> BaseFacts:
    """Identify the recipe's base, and say how the stages after pretraining load it.

    Raises:
        InputError: see ``base_facts``.
    """
    facts = base_facts(base_location(recipe), recipe.base.revision)
    return with_quantization(facts, recipe.base, compute_device())


def load_settings(recipe: Recipe, location: str) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that every model on the base is loaded with.

    They include the base's configuration, with all dropout at 0.

    Raises:
        InputError: the base cannot be found or its configuration cannot be read.
    """
    base = recipe.base
    origin = {"revision": base.revision or "main", "trust_remote_code": base.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(location, **origin)
    except (OSError, ValueError) as error:
        raise InputError(f"base {location}: {first_line(error)}") from error
    check_stored(config, base)
    return {
        "config": without_dropout(config),
        "dtype": dtype(base),
        "use_safetensors": True,
        **origin,
    }


def base_config(recipe: Recipe, location: str) -> PretrainedConfig:
    """Return the base's configuration, with all dropout at 0, without loading the base.

    Raises:
        InputError: the base cannot be found or its configuration cannot be read.
    """
    config: PretrainedConfig = load_settings(recipe, location)["config"]
    return config


def load_causal_lm(recipe: Recipe, location: str) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, without any adapter.

    The only place where a base is quantised: then it comes out frozen, with its heads whole, and on
    the device that it is computed on.

    Raises:
        InputError: it cannot be found, has no safetensors or damaged ones or another model's, needs
            code that is not trusted, or is stored in another precision than the recipe says.
    """
    device = compute_device()
    settings = load_settings(recipe, location) | quantization_settings(recipe.base, device)
    if Path(location).is_dir():
        check_files(Path(location))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, **settings, **REPORTED)
    except (OSError, ValueError) as error:
        raise InputError(f"base {location}: {first_line(error)}") from error
    model = all_loaded(f"base {location}", *loaded)
    model.generation_config = neutral_generation(model.config)
    model.eval()
    prepare_quantized(model, recipe.base, device)
    return model


def load_trained(recipe: Recipe, location: str, folder: Path) -> PeftModel | PreTrainedModel:
    """Load what a language-modelling stage made: its base with an adapter, or a whole model.

    Args:
        location: of the base.
    """
    if is_adapter(folder):
        return load_adapter(load_causal_lm(recipe, location), folder)
    return load_causal_lm(recipe, str(folder))


def load_backbone(recipe: Recipe, folder: Path) -> PreTrainedModel:
    """Load what gives a whole model's hidden states, without its head, in evaluation mode."""
    settings = load_settings(recipe, str(folder))
    check_files(folder)
    loaded: Any = AutoModel.from_pretrained(folder, **settings, **REPORTED)
    model = all_loaded(str(folder), *loaded)
    model.eval()
    return model


def recompute_activations(
    model: PreTrainedModel,
    contexts: Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
    | None = None,
) -> None:
    """Have each layer in training mode keep its input only, and compute the rest again (Chen 2016).

    Call it after adapters have been put on: PEFT and transformers else make the embeddings' output
    require gradients, which this kind of checkpointing does not need.

    Args:
        contexts: gives, for one pass of a layer, the contexts of that pass and of its repetition.
    """
    settings = {"context_fn": contexts} if contexts is not None else {}
    model.activation_checkpointing_enable({"use_reentrant": False} | settings)
    model.disable_input_require_grads()


def new_llama(
    section: SmallModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Return a Llama with random weights in float32; the same seed gives the same weights."""
    config = LlamaConfig(
        **_sizes(section, tokenizer),
        num_key_value_heads=section.num_kv_heads or section.num_heads,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = _drawn(LlamaForCausalLM, config, seed)
    model.generation_config = neutral_generation(config)
    return model


def new_bert(
    section: SmallModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    next_sentence: bool = False,
) -> PreTrainedModel:
    """Return a BERT with random weights in float32; the same seed gives the same weights.

    It has one kind of segment: separators alone tell prompt and response apart.

    Args:
        next_sentence: with two kinds of segments, a pooler, and a head that says of two texts
            whether one follows the other.
    """
    config = BertConfig(**_sizes(section, tokenizer), type_vocab_size=1 + next_sentence)
    without_dropout(config)
    return _drawn(BertForPreTraining if next_sentence else BertForMaskedLM, config, seed)


def _sizes(section: SmallModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what the configurations of all small models say."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": section.hidden_size,
        "intermediate_size": section.intermediate_size,
        "num_hidden_layers": section.num_layers,
        "num_attention_heads": section.num_heads,
        "max_position_embeddings": section.max_positions,
        "initializer_range": section.initializer_range,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }


def _drawn(kind: type[PreTrainedModel], config: PretrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def check_lengths(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int, keys: str
) -> None:
    """Refuse a model that has no embedding for a token, or no position for a whole conversation.

    Args:
        config: of the model, which need not be loaded for this.
        keys: the recipe keys that ``max_tokens`` comes from, for the message.

    Raises:
        InputError: names both numbers.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise InputError(
            f"{keys} = {max_tokens} exceeds the base's {positions} positions; lower one of them"
        )
    embeddings = getattr(config, "vocab_size", None)
    if embeddings is not None and len(tokenizer) > embeddings:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the base only {embeddings} embeddings;"
            " they do not belong together"
        )


def check_room(
    recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a base without room for what SFT reads, or for what later stages will sample.

    Those would refuse it as well, but after hours of SFT.

    Raises:
        InputError: see ``check_lengths``.
    """
    prompt, limits = "data.max_prompt_tokens", recipe.data
    keys, longest = f"{prompt} + data.max_response_tokens", limits.max_response_tokens
    if recipe.adapter.method == "prefix":  # stands on the first positions
        keys, longest = f"{keys} + adapter.prefix_tokens", longest + recipe.adapter.prefix_tokens
    needed = {keys: longest}
    for later, section in (("ppo", recipe.ppo), ("evaluate", recipe.evaluate)):
        if section is not None:
            needed[f"{prompt} + {later}.max_new_tokens"] = section.max_new_tokens
    for keys, tokens in needed.items():
        check_lengths(config, tokenizer, limits.max_prompt_tokens + tokens, keys)


def compute_device() -> torch.device:
    """Return where models are computed: the first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def neutral_generation(config: PretrainedConfig) -> GenerationConfig:
    """Return generation settings with the model's special tokens and nothing else."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout probability in the configuration to 0 and return it."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def dtype(base: Base) -> torch.dtype:
    """Return the recipe's dtype of the base weights."""
    found: torch.dtype = getattr(torch, base.dtype)
    return found


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, which says what happened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def all_loaded(what: str, model: PreTrainedModel, info: dict[str, Any]) -> PreTrainedModel:
    """Return a model; refuse weights that are not those of the one that its config describes.

    Args:
        what: the model, for the message.
        model, info: as ``from_pretrained`` with ``REPORTED`` returns them.

    Raises:
        InputError: tensors are missing, or have another shape.
    """
    for name, stored, needed in sorted(info["mismatched_keys"]):
        raise InputError(
            f"{what}: its weights do not fit its config.json: {name} is {tuple(stored)} in"
            f" the files; {tuple(needed)} is needed"
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{what}: its weights do not fit its config.json: {len(missing)} tensors are"
            f" missing in the files, like {missing[0]}"
        )
    return model


def _from_hub(location: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                location, revision=revision, allow_patterns=[*_FILES, *_TOKENIZER_FILES]
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"base {location}: no such folder here, and the Hugging Face hub does not give it:"
            f" {first_line(error)}"
        ) from error


def _sha256(path: Path) -> str:
    """Hash a file; the hub's cache names large files by their hash, which saves reading them."""
    name = path.resolve().name
    if path.is_symlink() and len(name) == 64 and set(name) <= set("0123456789abcdef"):
        return name
    return sha256_file(path)
