"""What it saves that the responses of a prompt share it: the reward model's training both ways.

    python -m tests.benchmarks.shared_prompts

Seconds of a forward and a backward pass over rankings of random tokens, one row per response with
padding as transformers has it, and packed with every prompt once, in turn, on one thread: medians
of ``--repeats``, their ratio, and the tokens of both. The model is a Llama of 4 million parameters
with LoRA in all layers.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from align.attention import packed_attention
from align.recipe_adapter import Adapter
from align.recipe_reward import Reward
from data.records import Message, Ranking
from pipelines.ranked_tokens import RankedTokens, collate
from pipelines.reward_loss import reward_loss
from reward.model import RewardModel, new_reward_model
from tests import tiny
from tests.adapters import sft_adapter

VOCAB = 2048
# Rankings of a batch, responses of each, and tokens of prompts and responses, at most.
CASES = {
    "pairs, long prompts": (8, 2, 256, 128),
    "pairs": (8, 2, 128, 128),
    "4 responses": (16, 4, 64, 32),
    "9 responses": (4, 9, 128, 64),
}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


def rankings(count: int, responses: int, prompt: int, response: int) -> list[RankedTokens]:
    """Draw rankings of lengths between half of the given ones and these."""
    generator = torch.Generator().manual_seed(0)

    def text(longest: int) -> list[int]:
        length = int(torch.randint(longest // 2, longest + 1, (1,), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    scores = tuple(float(place) for place in range(responses))
    ranking = Ranking((Message("user", "?"),), ("x",) * responses, scores)
    return [
        RankedTokens(text(prompt), tuple(text(response) for _ in range(responses)), ranking)
        for _ in range(count)
    ]


def seconds(model: RewardModel, rows: list[RankedTokens], *, shared: bool) -> float:
    """Return what one pass forward and back takes."""
    batch = collate(rows, 0, share_prompts=shared)
    started = time.perf_counter()
    with packed_attention(model.backbone) if shared else nullcontext():
        loss, _ = reward_loss(
            Reward(lr=1e-3, batch_size=len(rows)), model, batch, lm_head=None, num_rankings=None
        )
        loss.backward()
    model.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    adapter = Adapter(r=4, alpha=8.0)  # that of `sft_adapter`
    with tempfile.TemporaryDirectory() as folder:
        sft = sft_adapter(tiny.llama(VOCAB, **SIZES), Path(folder))
        model = new_reward_model(tiny.llama(VOCAB, **SIZES), adapter, sft, seed=0).train()
    print("| rankings | tokens, padded | shared | seconds, padded | shared | faster |")
    print("|---|---|---|---|---|---|")
    for name, sizes in CASES.items():
        rows = rankings(*sizes)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats + 1):
            for shared in (False, True):
                times[shared].append(seconds(model, rows, shared=shared))
        padded, shared = (statistics.median(times[way][1:]) for way in (False, True))
        tokens = collate(rows, 0)["input_ids"].numel()
        ours = sum(row.num_tokens for row in rows)
        print(
            f"| {name} | {tokens:,} | {ours:,} | {padded:.2f} | {shared:.2f} |"
            f" {padded / shared:.2f} |"
        )


if __name__ == "__main__":
    main()
