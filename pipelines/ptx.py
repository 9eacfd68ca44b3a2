"""Language modelling beside PPO, so that the policy keeps what it could (PPO-ptx)."""

from collections import Counter

from torch import Tensor

from align.functional import masked_mean
from align.models import check_lengths
from align.recipe_ppo import Ptx as PtxSection
from align.roles import Roles
from align.seeds import derive_seed
from data.order import draw
from data.records import Demonstration, Ranking, Record, as_demonstration
from data.render import Tokens, render_all
from pipelines.heldout import learned_logprobs
from pipelines.load_roles import LoadedRoles
from pipelines.stage import StageJob


class Ptx:
    """Batches of demonstrations or plain text, and the policy's loss on them.

    (Ouyang et al. 2022, equation 2.) Demonstrations are learned from as in supervised tuning; of a
    text, the first ``data.max_prompt_tokens + data.max_response_tokens`` tokens are.

    Raises:
        DataError: more rows than ``data.max_dropped`` cannot be used.
        InputError: the base has too few positions for these rows.
    """

    def __init__(self, job: StageJob, loaded: LoadedRoles, section: PtxSection) -> None:
        limits = job.recipe.data
        longest = limits.max_prompt_tokens + limits.max_response_tokens
        keys = "ppo.ptx: data.max_prompt_tokens + data.max_response_tokens"
        check_lengths(loaded.roles.base.config, loaded.tokenizer, longest, keys)
        records = job.data[section.source].train
        if section.source == "sft":
            rows, dropped = _demonstrations(records, loaded)
        else:
            rows, dropped = _texts(records, loaded, longest)
        job.check_dropped(section.source, len(rows), dropped)
        self._rows = rows
        self._batch_size = section.batch_size
        self._seed = derive_seed(job.recipe.seed, "ptx")

    def loss(self, roles: Roles, step: int) -> tuple[Tensor, int]:
        """Return the policy's loss on the batch of an optimiser step, and over how many tokens.

        The loss is the mean negative log-likelihood of the learned tokens, in nats, at temperature
        1; each row's first token is never predicted.

        Args:
            step: counted from 0 over the whole run; says which rows are drawn.
        """
        chosen = draw(len(self._rows), step * self._batch_size, self._batch_size, self._seed)
        logprobs, learned = learned_logprobs(roles, "policy", [self._rows[row] for row in chosen])
        return -masked_mean(logprobs, learned), int(learned.sum())


def _demonstrations(
    records: tuple[Record, ...], loaded: LoadedRoles
) -> tuple[list[Tokens], Counter[str]]:
    def tokens(record: Record) -> Tokens:
        assert isinstance(record, Demonstration | Ranking)
        return loaded.renderer.demonstration(as_demonstration(record).messages)

    return render_all(records, tokens)


def _texts(
    records: tuple[Record, ...], loaded: LoadedRoles, longest: int
) -> tuple[list[Tokens], Counter[str]]:
    # Here, because it brings the trainer of transformers with it: seconds, and 80 MB.
    from pipelines.pretrain import documents

    tokenizer = loaded.tokenizer
    ids, dropped = documents(records, tokenizer)
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("")["input_ids"][:1] == [bos]:
        ids = [row if row[0] == bos else [bos, *row] for row in ids]
    rows = [row[:longest] for row in ids]
    kept = [Tokens(row, row) for row in rows if len(row) > 1]
    dropped["nothing_to_learn"] += len(rows) - len(kept)
    return kept, +dropped
