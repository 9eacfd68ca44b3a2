"""What PPO maximises: the reward model on the shared base, or a Python function."""

import torch
from torch import Tensor

from align.functions import Chat, call_score_function, load_function
from align.recipe import Ppo
from align.roles import Roles
from align.sequences import Sequences
from pipelines.rollout import Scorer


def ppo_scorer(section: Ppo, roles: Roles) -> Scorer:
    """Return the scorer that ``ppo.reward`` names.

    Raises:
        RecipeError: there is no such function.
    """
    if section.reward == "model":
        return lambda prompts, responses, sequences: roles.scores(sequences)
    name = section.reward
    function = load_function(name)

    def score(prompts: list[Chat], responses: list[str], sequences: Sequences) -> Tensor:
        scores = call_score_function(function, name, prompts, responses)
        return torch.tensor(scores, dtype=torch.float32, device=roles.device)

    return score
