"""Align's PPO on an exported workload: seconds, tokens and memory, as JSON.

    python WORKLOAD.py --size s --scenario eos --updates 4 --out DIR
    OMP_NUM_THREADS=1 python -m tests.benchmarks.align_ppo DIR --mode lora --dtype float32

Runs the ``collect``, ``estimate`` and ``update`` of the PPO stage on the exported checkpoints and
prompts, in a process set up as a stage's is. The modes: ``full`` trains all weights of policy and
critic, ``lora`` an adapter each in all layers, ``lora-policy-trunk`` has the critic's head on the
policy's hidden states, ``lora-top-half`` has adapters in the upper half of the layers only, and
the last mode both. The
JSON has the keys of the other program's. The first update is warm-up and is not counted.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from pipelines.process import quiet_libraries, share_processors

share_processors()  # before torch is imported, as in a stage
quiet_libraries()

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.adapters import lora_config, save_adapter  # noqa: E402
from align.engine import Engine  # noqa: E402
from align.functions import Chat  # noqa: E402
from align.manifest import BaseFacts  # noqa: E402
from align.recipe import Adapter  # noqa: E402
from align.recipe_ppo import Ppo  # noqa: E402
from align.roles import Roles  # noqa: E402
from align.sequences import Sequences  # noqa: E402
from data.records import Message, Prompt  # noqa: E402
from pipelines.load_roles import LoadedRoles  # noqa: E402
from pipelines.rollout import collect, passes  # noqa: E402
from pipelines.shaping import ScoreScaler, estimate  # noqa: E402
from pipelines.update import Updater  # noqa: E402
from reward.model import ScoreHead  # noqa: E402

MODES = ("full", "lora", "lora-policy-trunk", "lora-top-half", "lora-top-half-policy-trunk")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Workload:
    """What ``workload.py`` has written: ``policy/``, ``reward/``, ``value/`` and the prompts."""

    folder: Path
    settings: dict[str, Any]
    prompts: list[list[int]]


@dataclass(frozen=True)
class StoredPrompts:
    """Stands in for the renderer: the workload's prompts are token ids already."""

    ids: list[list[int]]
    tokenizer: PreTrainedTokenizerBase

    def record(self, row: int) -> Prompt:
        """Return the record that stands for a row."""
        return Prompt((Message("user", str(row)),))

    def prompt(self, messages: tuple[Message, ...]) -> list[int]:
        """Return the ids of the row that the record stands for."""
        return self.ids[int(messages[0].content)]

    def decode(self, ids: list[int]) -> str:
        """Return a response's text."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def build(mode: str, dtype: str, workload: Workload) -> LoadedRoles:
    """Build the roles that PPO trains from the workload's checkpoints, as the PPO stage has them.

    Policy, reference, reward and value model of the workload share one body, as after a common SFT
    stage: it is the base. Every role on it gets an adapter that is new; in mode ``full``, policy
    and critic have a model of their own instead, and the frozen roles are the base itself.
    """
    settings, folder = workload.settings, workload.folder
    base = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=getattr(torch, dtype))
    adapter = Adapter(
        r=settings["lora_r"],
        alpha=settings["lora_alpha"],
        targets=tuple(settings["lora_targets"]),
        layers="top-half" if "top-half" in mode else "all",
    )
    models: dict[str, PreTrainedModel] = {}
    on_base = ["policy", "reference", "reward", "value"]
    if mode == "full":
        on_base = []
        models["policy"] = AutoModelForCausalLM.from_pretrained(folder / "policy").float()
        models["value"] = AutoModel.from_pretrained(folder / "value").float()
    elif "policy-trunk" in mode:
        on_base.remove("value")
    torch.manual_seed(settings["seed"])
    with tempfile.TemporaryDirectory() as temporary:
        new = PeftModel(base, lora_config(adapter, "CAUSAL_LM", base))
        save_adapter(new, Path(temporary) / "new", base=str(folder / "policy"), revision=None)
        roles = Roles(
            new.unload(),
            dict.fromkeys(on_base, Path(temporary) / "new"),
            models=models,
            heads={role: _head(folder / role) for role in ("reward", "value")},
            trainable=("policy", "value"),
        )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    return LoadedRoles(
        roles,
        BaseFacts(id="workload", revision=None, sha256=""),
        tokenizer,
        StoredPrompts(workload.prompts, tokenizer),  # type: ignore[arg-type]
        (tokenizer.eos_token_id,),
        tokenizer.pad_token_id,
    )


def _head(folder: Path) -> ScoreHead:
    weight = load_file(folder / "model.safetensors")["score.weight"]
    head = ScoreHead(weight.shape[1])
    head.weight.data.copy_(weight)
    return head


def ppo_section(mode: str, workload: Workload) -> Ppo:
    """Return the recipe section with the workload's hyper-parameters."""
    w = workload.settings
    penalty = w["missing_eos_penalty"]
    return Ppo.model_validate(
        {
            "lr": w["lr_full"] if mode == "full" else w["lr_lora"],
            "steps": w["updates"],
            "batch_size": w["batch"],
            "minibatch_size": w["batch"] // w["minibatches"],
            "max_tokens_per_microbatch": 1024,
            "epochs": w["ppo_epochs"],
            "max_new_tokens": w["max_new_tokens"],
            "temperature": w["temperature"],
            "gamma": w["gamma"],
            "lam": w["lam"],
            "clip": w["cliprange"],
            "value_clip": w["cliprange_value"],
            "value_coef": w["vf_coef"],
            "kl": {"coef": w["kl_coef"]},
            "missing_eos": None if penalty is None else {"mode": "subtract", "value": penalty},
            "value": {"trunk": "policy" if "policy-trunk" in mode else "own"},
            "layout": "separate" if mode == "full" else "shared",
        }
    )


def resident_bytes(roles: Roles) -> dict[str, int]:
    """Return the bytes of the parameters of the base and of each role, every storage once."""
    names = ("policy", "reference", "reward", "value")
    sizes = dict.fromkeys(("base", *names), 0)
    seen: set[int] = set()
    for name, parameter in roles.named_parameters():
        storage = parameter.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        parts = name.split(".")
        role = next((r for r in names if r in parts), "base")
        sizes[role] += storage.nbytes()
    return sizes


def rss_mb() -> float:
    """Return the resident set in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def reset_peak() -> None:
    """Start a new high-water mark of the resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the highest resident set since ``reset_peak`` in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def train(loaded: LoadedRoles, section: Ppo, workload: Workload) -> list[dict[str, Any]]:
    """Run the updates; return what each took."""
    roles, renderer = loaded.roles, StoredPrompts(workload.prompts, loaded.tokenizer)

    def score(prompts: list[Chat], responses: list[str], sequences: Sequences) -> torch.Tensor:
        parts = [sequences.rows(rows) for rows in passes(sequences.lengths, section)]
        return torch.cat([roles.scores(part) for part in parts])

    steps = section.steps * section.epochs * (section.batch_size // section.minibatch_size)
    parameters = [roles.role_parameters("policy"), roles.role_parameters("value")]
    engine = Engine([(group, section.lr) for group in parameters], section, steps)
    tolerance = 1e-4 if roles.base.dtype == torch.float32 else 0.1
    updater = Updater(roles, engine, section, ptx=None, tolerance=tolerance)
    scaler = ScoreScaler(section.reward_scaling)
    seed, updates = workload.settings["seed"], []
    for step in range(section.steps):
        reset_peak()
        rows = range(step * section.batch_size, (step + 1) * section.batch_size)
        started = perf_counter()
        prompts = [renderer.record(row) for row in rows]
        rollout = collect(loaded, prompts, score, section, seed=seed + step)
        collected, peak_collect = perf_counter(), peak_mb()
        reset_peak()
        estimates = estimate(rollout, section, section.kl.coef, scaler)
        metrics = updater.update(rollout, estimates, seed=seed + step)
        ended, peak_update = perf_counter(), peak_mb()
        num_prompt, num_response = sum(len(workload.prompts[r]) for r in rows), rollout.mask.sum()
        updates.append(
            {
                "total_s": ended - started,
                "rollout_s": rollout.seconds["time/rollout"],
                "score_s": collected - started - rollout.seconds["time/rollout"],
                "update_s": ended - collected,
                "peak_rss_mb": {"rollout_and_score": peak_collect, "update": peak_update},
                "real_tokens": num_prompt + int(num_response),
                "prompt_tokens": num_prompt,
                "response_tokens": int(num_response),
                "episodes": len(rows),
                "metrics": rollout.metrics() | metrics,
            }
        )
    return updates


def summary(updates: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians and rates over the counted updates; memory over all."""
    counted = updates[1:] if len(updates) > 1 else updates
    seconds = sum(u["total_s"] for u in counted)
    tokens = sum(u["response_tokens"] for u in counted)
    return {
        "updates_counted": len(counted),
        "seconds_per_update": statistics.median(u["total_s"] for u in counted),
        "rollout_s": statistics.median(u["rollout_s"] for u in counted),
        "score_s": statistics.median(u["score_s"] for u in counted),
        "update_s": statistics.median(u["update_s"] for u in counted),
        "episodes_per_s": sum(u["episodes"] for u in counted) / seconds,
        "response_tokens_per_s": tokens / seconds,
        "rollout_tokens_per_s": tokens / sum(u["rollout_s"] for u in counted),
        "peak_rss_mb": max(max(u["peak_rss_mb"].values()) for u in updates),
    }


def main() -> None:
    """Parse the command line, run, print."""
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", type=Path, help="folder that workload.py has exported to")
    parser.add_argument("--mode", choices=MODES, default="lora")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base's weights")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rss_after_import = rss_mb()

    folder = options.workload
    workload = Workload(
        folder,
        json.loads((folder / "workload.json").read_text(encoding="utf-8")),
        json.loads((folder / "prompts.json").read_text(encoding="utf-8")),
    )
    section = ppo_section(options.mode, workload)
    started = perf_counter()
    loaded = build(options.mode, options.dtype, workload)
    rss_with_models = rss_mb()
    updates = train(loaded, section, workload)
    result = {
        "implementation": "align",
        "mode": options.mode,
        "dtype": options.dtype,
        "learning_rate": section.lr,
        "workload": workload.settings,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "parameters_trained": sum(p.numel() for p in loaded.roles.parameters() if p.requires_grad),
        "resident_bytes": resident_bytes(loaded.roles),
        "summary": summary(updates)
        | {
            "rss_after_import_mb": rss_after_import,
            "rss_with_models_mb": rss_with_models,
            "wall_s": perf_counter() - started,
        },
        "updates": updates,
    }
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
