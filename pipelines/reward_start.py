"""What a reward model starts from: the SFT model, or an encoder of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.adapters import is_adapter
from align.manifest import BaseFacts
from align.models import base_location, load_causal_lm, recipe_base_facts
from align.recipe import Recipe
from align.recipe_adapter import Adapter
from align.recipe_reward import RewardBase
from align.seeds import derive_seed
from data.render import Renderer
from pipelines.encoder_base import read_encoder
from pipelines.reward_loss import output_head
from pipelines.stage import StageJob
from reward.encoder import EncoderReward, encoder_body, load_encoder_reward, new_encoder_reward
from reward.model import RewardModel, load_reward_model, new_reward_model

AnyReward = RewardModel | EncoderReward


@dataclass(frozen=True)
class Start:
    """What a reward model is made from, and how.

    Attributes:
        location: of the base, a folder or a hub id.
        new: makes the untrained model; with the base's parameters, and the output embeddings if
            its loss reads them.
        load: reads a saved model from its folder.
    """

    location: str
    facts: BaseFacts
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    adapter: Adapter
    new: Callable[[], tuple[int, AnyReward, nn.Module | None]]
    load: Callable[[Path], AnyReward]


def reward_start(job: StageJob) -> Start:
    """Return what the recipe's reward model starts from, once its parents are found to fit.

    Raises:
        InputError: the base cannot be found, or is not of the kind that is needed.
        ParentError: a parent was made on another base or with another tokenizer or template.
    """
    section = job.recipe.reward
    assert section is not None
    if section.base is not None:
        return _from_encoder(job, section.base)
    return _from_sft(job)


def _from_sft(job: StageJob) -> Start:
    recipe, limits = job.recipe, job.recipe.data
    location, sft = base_location(recipe), job.parent_folder("sft") / "model"
    facts = recipe_base_facts(recipe)
    tokenizer = AutoTokenizer.from_pretrained(sft, trust_remote_code=recipe.base.trust_remote_code)
    job.check_origin(tokenizer, facts)
    return Start(
        location=location,
        facts=facts,
        tokenizer=tokenizer,
        renderer=Renderer(tokenizer, limits.max_prompt_tokens, limits.max_response_tokens),
        adapter=recipe.adapter,
        new=partial(_new_on_sft, recipe, location, sft),
        load=partial(_load_on_base, recipe, location),
    )


def _new_on_sft(
    recipe: Recipe, location: str, sft: Path
) -> tuple[int, RewardModel, nn.Module | None]:
    assert recipe.reward is not None
    start = load_causal_lm(recipe, location if is_adapter(sft) else str(sft))
    base_parameters = start.num_parameters()
    lm_head = output_head(start) if recipe.reward.aux_lm_coef else None
    seed = derive_seed(recipe.seed, "reward", "head")
    section = recipe.reward
    model = new_reward_model(start, recipe.adapter, sft, seed, section.labels, section.head)
    return base_parameters, model, lm_head


def _load_on_base(recipe: Recipe, location: str, folder: Path) -> RewardModel:
    base = load_causal_lm(recipe, location) if is_adapter(folder) else None
    return load_reward_model(base, folder)


def _from_encoder(job: StageJob, section: RewardBase) -> Start:
    recipe = job.recipe
    assert recipe.reward is not None
    labels, head = recipe.reward.labels, recipe.reward.head
    encoder = read_encoder(recipe, section)
    job.check_origin(encoder.tokenizer, encoder.facts)
    limits, form = recipe.data, encoder.form
    adapter = section.adapter or recipe.adapter
    base_parameters = encoder_body(encoder.settings["config"]).num_parameters()

    def new() -> tuple[int, EncoderReward, None]:
        seed = derive_seed(recipe.seed, "reward", "head")
        at, settings = encoder.location, encoder.settings
        model = new_encoder_reward(at, settings, adapter, form, seed, labels, head)
        return base_parameters, model, None

    return Start(
        location=encoder.location,
        facts=encoder.facts,
        tokenizer=encoder.tokenizer,
        renderer=Renderer(encoder.tokenizer, form.max_prompt_tokens, limits.max_response_tokens),
        adapter=adapter,
        new=new,
        load=lambda folder: load_encoder_reward(folder, encoder.location, encoder.settings),
    )
