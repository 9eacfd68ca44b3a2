"""What tests of exports share: a recipe, the command, and a process with transformers alone."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.recipe import TokenizerSection
from data.tokenizer import prepare_tokenizer
from pipelines import export
from tests import tiny
from tests.finished import TEMPLATE

RECIPE = """
name: x
base: {{id: {base}, quantization: {kind}}}
adapter: {{r: 4, alpha: 8.0}}
data:
  max_prompt_tokens: 96
  max_response_tokens: 64
  sft: {{train: [{{world: demonstrations}}]}}
  reward: {{train: [{{world: rankings}}]}}
  prompts: {{train: [{{world: prompts}}]}}
sft: {{lr: 1.0e-3, batch_size: 2}}
reward: {{lr: 1.0e-3, batch_size: 2}}
ppo: {{lr: 1.0e-3, batch_size: 2, minibatch_size: 2, steps: 1, max_new_tokens: 8}}
tracking: {{mode: disabled}}
run: {{root: {root}, threads: 1}}
"""
TEXTS = [("Say hello to Mira.", "Hello, Mira!"), ("Who has a kite?", "Tom."), ("Boats?", "")]
ROWS = [[5, 6, 7, 8, 9, 10, 1], [11, 12, 1], [13, 14, 15, 16, 1]]

# Loads folders by transformers alone; prints what they say to rows of ids, one by one and padded.
PLAIN = """
import json, sys, torch, transformers
folders, rows = json.loads(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for key, (kind, folder) in folders.items():
    model = getattr(transformers, kind).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    generation = getattr(model, "generation_config", None)
    found[key] = {
        "alone": [model(torch.tensor([row])).logits[0].float().flatten().tolist() for row in rows],
        "batch": model(**batch).logits.float().tolist(),
        "dtype": str(model.dtype), "class": type(model).__name__, "labels": model.config.num_labels,
        "padding": tokenizer.padding_side, "template": tokenizer.chat_template,
        "stops": getattr(generation, "eos_token_id", None),
        "pad": [model.config.pad_token_id, tokenizer.pad_token_id],
        "config": model.config.to_dict(),
    }
found["ours"] = [n for n in sys.modules if n.split(".")[0] in ("align", "peft", "reward")]
print(json.dumps(found, default=str))
"""


def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    return prepare_tokenizer(made, TokenizerSection())


def sampled() -> str:
    """Return the lines of a stage's samples.jsonl, of two looks at ``TEXTS``."""
    rows = [
        {"step": step, "prompt": [{"role": "user", "content": q}], "response": f"{a}{step}"}
        for step in (0, 4)
        for q, a in TEXTS
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def run_export(run: Path, stage: str, out: Path, *options: str) -> int:
    place = [f"run.root={run.parent}", f"name={run.name}"]
    return export.main([stage, str(run / "recipe.yaml"), *place, "--out", str(out), *options])


def said_by_transformers(folders: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Load exports in a fresh process; return what each says to ``ROWS``.

    Args:
        folders: the auto class and the folder of each.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(folders), json.dumps(ROWS)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("ours") == []
    return found
