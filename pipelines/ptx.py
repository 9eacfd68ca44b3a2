"""Language modelling beside PPO, so that the policy keeps what it could (PPO-ptx)."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from align import group
from align.functional import masked_sum
from align.models import check_lengths
from align.recipe_ppo import Ppo
from align.roles import Roles
from align.seeds import derive_seed
from data.lost import LostRows
from data.order import draw
from data.records import Demonstration, Ranking, Record, as_demonstration
from data.render import IGNORED, Tokens, Unusable, render_all
from pipelines.heldout import learned_logprobs
from pipelines.load_roles import LoadedRoles
from pipelines.rollout import passes
from pipelines.stage import StageJob


class Ptx:
    """Batches of demonstrations or plain text, and the policy's loss on them.

    (Ouyang et al. 2022, equation 2.) Demonstrations are learned from as in supervised tuning; of a
    text, the first ``data.max_prompt_tokens + data.max_response_tokens`` tokens are.

    Raises:
        DataError: more rows than ``data.max_dropped`` cannot be used.
        InputError: the base has too few positions for these rows.
    """

    def __init__(self, job: StageJob, loaded: LoadedRoles, section: Ppo) -> None:
        ptx = section.ptx
        assert ptx is not None
        limits = job.recipe.data
        longest = limits.max_prompt_tokens + limits.max_response_tokens
        keys = "ppo.ptx: data.max_prompt_tokens + data.max_response_tokens"
        check_lengths(loaded.roles.base.config, loaded.tokenizer, longest, keys)
        records = job.data[ptx.source].train
        if ptx.source == "sft":
            rows, dropped = _demonstrations(records, loaded)
        else:
            rows, dropped = _texts(records, loaded, longest)
        job.check_dropped(ptx.source, len(rows), dropped)
        self._rows, self._section = rows, section
        self._batch_size = ptx.batch_size
        self._seed = derive_seed(job.recipe.seed, "ptx")

    def losses(self, roles: Roles, step: int, *, in_step: bool = False) -> Iterator[Tensor]:
        """Return the policy's loss on the batch of an optimiser step, pass by pass.

        Their sum is the mean negative log-likelihood of the batch's learned tokens, in nats, at
        temperature 1; each row's first token is never predicted. Backward one before asking for the
        next: passes are cut as those of PPO are, so that the batch need not fit into memory at
        once. Of several processes each gets the losses on its part of the batch; the sum is over
        all.

        Args:
            step: counted from 0 over the whole run; says which rows are drawn.
            in_step: all processes get equally many; those with fewer passes some that are 0.
        """
        chosen = draw(len(self._rows), step * self._batch_size, self._batch_size, self._seed)
        rows = [self._rows[number] for number in chosen]
        num_tokens = sum(label != IGNORED for row in rows for label in row.labels[1:])
        everywhere = [self._passes(rows, part) for part in group.parts(range(len(rows)))]
        here = everywhere[group.rank()]
        for part in here:
            yield self._loss(roles, part, num_tokens)
        if in_step:
            for _ in range(max(map(len, everywhere)) - len(here)):
                yield 0.0 * self._loss(roles, here[-1], num_tokens)

    def _passes(self, rows: list[Tokens], chosen: Sequence[int]) -> list[list[Tokens]]:
        """Return the rows of each forward pass over some of a batch's."""
        found = passes([len(rows[number].input_ids) for number in chosen], self._section)
        return [[rows[chosen[i]] for i in part] for part in found]

    def _loss(self, roles: Roles, rows: list[Tokens], num_tokens: int) -> Tensor:
        logprobs, learned = learned_logprobs(roles, "policy", rows)
        return -masked_sum(logprobs, learned) / num_tokens


def _demonstrations(
    records: tuple[Record, ...], loaded: LoadedRoles
) -> tuple[list[Tokens], LostRows]:
    def tokens(record: Record) -> Tokens:
        assert isinstance(record, Demonstration | Ranking)
        return loaded.renderer.demonstration(as_demonstration(record).messages)

    return render_all(records, tokens)


def _texts(
    records: tuple[Record, ...], loaded: LoadedRoles, longest: int
) -> tuple[list[Tokens], LostRows]:
    # Here, because it brings the trainer of transformers with it: seconds, and 80 MB.
    from pipelines.blocks import document_writer

    tokenizer = loaded.tokenizer
    write, bos = document_writer(tokenizer), tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []

    def tokens(record: Record) -> Tokens:
        row = write(record)
        row = (row if row[:1] == start else start + row)[:longest]
        if len(row) < 2:  # the first token is never predicted
            raise Unusable("nothing_to_learn")
        return Tokens(row, row)

    return render_all(records, tokens)
