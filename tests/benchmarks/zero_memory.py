"""What each of two processes holds for training by ZeRO, beside what the plan says.

    python -m tests.benchmarks.zero_memory
    python -m tests.benchmarks.zero_memory --hidden 256 --ways 0 3

The real sft stage trains all weights of a Llama in two gloo processes with DeepSpeed, two passes a
step. At every optimiser step and in every backward pass each process counts the bytes of its
tensors, each piece of memory once, by what it belongs to: trained weights, ZeRO's copies of them,
gradients, the bucket through which ZeRO 2 and 3 send them, Adam's moments. A line has the most that
one of the two held of each kind, in brackets what the plan says, in MiB, and the difference of
their sums. ``offload`` moves tensors to main memory, which on a CPU is where they are: its ways are
not told apart here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.plan import plan_recipe
from align.plan_items import Kind, StagePlan
from align.plan_model import read_shape
from align.recipe_io import load_recipe
from align.zero import BUCKET
from pipelines import sft, stage
from tests import tiny
from tests.benchmarks.common import ROOT, one_thread

KINDS = ("weights", "copies", "gradients", "bucket", "states")
RECIPE = """
name: zero
base: {{id: {root}/base}}
adapter: {{method: full}}
data:
  root: {root}
  max_prompt_tokens: 32
  max_response_tokens: 96
  sft: {{train: [{{world: demonstrations}}]}}
  world: {{demonstration_rows: 8}}
sft: {{lr: 1.0e-4, batch_size: 4, micro_batch_size: 1, samples: 0, epochs: 2.0}}
tracking: {{mode: disabled}}
run: {{root: {root}/runs, threads: 1, keep_checkpoints: 0}}
"""


def held(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of some tensors' memory; what several share counts once."""
    given = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({memory.data_ptr(): memory.nbytes() for memory in given}.values())


class Counter:
    """Counts what this process holds in its second and later steps; ``most`` is the result.

    ZeRO hands the optimiser one group of parameters after the other, and its part of their
    gradients with it; before that it may have whole gradients.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.most = dict.fromkeys(KINDS, 0)
        self._gradients: dict[int, int] = {}  # by the address of what they are of

    def watch(self, trainer: Any) -> None:
        """Have the gradients counted whenever the backward pass has made one."""
        self.trainer = trainer
        for parameter in trainer.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: self.in_backward())

    def in_backward(self) -> None:
        """Count what the gradients of the model's parameters lie in.

        From ZeRO 2 on that is the bucket. With ZeRO 2 some lie where this process keeps its part of
        them, or of those of the passes before.
        """
        gradients = [p.grad for p in self.trainer.model.parameters()]
        plugin = self.trainer.accelerator.state.deepspeed_plugin
        if plugin is None or plugin.zero_stage < 2:
            self._see("gradients", held(gradients))
            return
        kept: list[Tensor | None] = []
        if plugin.zero_stage == 2:
            optimizer = self.trainer.model_wrapped.optimizer
            before = [of_group or [] for of_group in optimizer.all_grad_tensors.values()]
            kept = [optimizer.grads_in_partition, *(part for parts in before for part in parts)]
        self._see("gradients", held(kept))
        self._see("bucket", held([*kept, *gradients]) - held(kept))

    def in_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count what the optimiser is given, and what it has."""
        parts = [p for settings in optimizer.param_groups for p in settings["params"]]
        for part in parts:
            self._gradients[part.data_ptr()] = held([part.grad])
        self._see("gradients", sum(self._gradients.values()))
        # Under ZeRO 3 a parameter's own tensor is empty, and its share beside it.
        weights = [getattr(p, "ds_tensor", p.data) for p in self.trainer.model.parameters()]
        self._see("weights", held(weights))
        self._see("copies", held([*weights, *optimizer.state]) - held(weights))
        values = [value for state in optimizer.state.values() for value in state.values()]
        self._see("states", held([v for v in values if torch.is_tensor(v) and v.ndim]))

    def _see(self, kind: str, found: int) -> None:
        self.most[kind] = max(self.most[kind], found)


def worker(out: str, arguments: list[str]) -> int:
    """Run the stage in this process, and write what it holds to a file of its own."""
    counter = Counter()
    train, step = sft.train_to_end, torch.optim.AdamW.step

    def watched(trainer: Any, *given: Any) -> Any:
        counter.watch(trainer)
        return train(trainer, *given)

    def counting_step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        counter.in_step(self)
        return step(self, closure)

    sft.train_to_end = watched
    torch.optim.AdamW.step = counting_step  # type: ignore[method-assign]
    rank = int(os.environ["RANK"])
    code = stage.main(arguments)
    Path(f"{out}-{rank}").write_text(json.dumps(counter.most))
    return code


def measure(root: Path, zero: int) -> dict[str, int]:
    """Train by one way of ZeRO; return the most that a process holds of each kind."""
    out = root / f"zero-{zero}"
    words = [f"name=zero-{zero}", "distributed.processes=2", f"distributed.zero={zero}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "tests.benchmarks.zero_memory", "--worker", str(out)]
    command = [sys.executable, *torchrun, *module, "sft", str(root / "recipe.yaml"), *words]
    done = subprocess.run(command, env=one_thread(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found = [json.loads(Path(f"{out}-{rank}").read_text()) for rank in (0, 1)]
    return {kind: max(facts[kind] for facts in found) for kind in KINDS}


def planned(plan: StagePlan, zero: int) -> dict[str, float]:
    """Return what the plan says of a process; see ``align.plan_items.StagePlan``."""
    kinds: tuple[Kind, ...] = ("weights", "gradients", "states")
    weights, gradients, states = (plan.sum(kind) for kind in kinds)
    return {
        "weights": weights / (2 if zero == 3 else 1),
        "copies": gradients / 2 if zero else 0.0,
        # Half of them with ZeRO 2 and 3; with ZeRO 2 twice, of this pass and of those before.
        "gradients": gradients / (2 if zero == 3 else 1),
        "bucket": 4.0 * BUCKET if zero >= 2 else 0.0,
        "states": states / (2 if zero else 1),
    }


def main() -> None:
    """Make the base, train by every way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=512, help="width of the Llama, of 8 layers")
    parser.add_argument("--ways", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        hidden = options.hidden
        sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 8}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
        tiny.llama(4096, **sizes, **heads).save_pretrained(root / "base")
        tiny.tokenizer().save_pretrained(root / "base")
        (root / "recipe.yaml").write_text(RECIPE.format(root=root))
        shape = read_shape(json.loads((root / "base" / "config.json").read_text()))
        plans = {plan.stage: plan for plan in plan_recipe(load_recipe(root / "recipe.yaml"), shape)}
        print(f"| ZeRO | {' | '.join(KINDS)} | together | planned | differs by |")
        print("|---" * (len(KINDS) + 4) + "|")
        for zero in options.ways:
            found, expected = measure(root, zero), planned(plans["sft"], zero)
            cells = [f"{found[k] / 2**20:.1f} ({expected[k] / 2**20:.1f})" for k in KINDS]
            whole, said = sum(found.values()), sum(expected.values())
            cells += [f"{whole / 2**20:.1f}", f"{said / 2**20:.1f}", f"{whole / said - 1:+.1%}"]
            print(f"| {zero} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2], sys.argv[3:]))
    main()
