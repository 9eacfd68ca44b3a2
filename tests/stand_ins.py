"""Stand-ins for the stages, which leave what a finished stage leaves, under the real launcher."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STAGE = """
import json, os, sys, time
from pathlib import Path
import align
from align import inputs, places, stages
from align.manifest import BaseFacts, DataFacts, Manifest, ParentFacts
from align.manifest import sha256_outputs, write_manifest
from align.recipe_io import dump_recipe, load_recipe
from pipelines.process import Stopped, signals_as_exceptions

stage, file, *rest = sys.argv[1:]
recipe = load_recipe(file, [word for word in rest if "=" in word])
print("noise on standard output")
if os.environ.get("FAIL") in (stage, recipe.name):
    print(f"{stage}: no more rows", file=sys.stderr)
    sys.exit(2)
if os.environ.get("HANG") == stage:
    with signals_as_exceptions():
        try:
            print("hanging", file=sys.stderr, flush=True)
            time.sleep(60)
        except Stopped as stopped:
            time.sleep(float(os.environ.get("UPLOAD", 0)))
            print(f"{stage}: stopped by {stopped.signum}", file=sys.stderr)
            sys.exit(128 + stopped.signum)
folder = places.stage_directory(recipe, stage)
(folder / "model").mkdir(parents=True, exist_ok=True)
weights = stages.recipe_sha256(recipe, stage) + os.environ.get("OTHER", "")
(folder / "model" / "w").write_text(weights)
line = {"step": 1, "loss": 2.0, "time/update": time.time()}
(folder / "metrics.jsonl").write_text(json.dumps(line))
for place in (folder, folder.parent):
    (place / "recipe.yaml").write_text(dump_recipe(recipe))
sources = [s for d in inputs.stage_data(recipe, stage).values() for s in (*d.train, *d.heldout)]
prints = [inputs.source_fingerprint(recipe, source) for source in sources]
parents = stages.read_parents(recipe, stage)
metrics = {"loss": float("nan")}
if stage == "evaluate":
    metrics = {"base/perplexity": 3.0, "ppo/gold/mean": 0.5, "ppo/kl/mean": 1.5}
write_manifest(folder, Manifest(
    stage=stage, name=recipe.name, seed=recipe.seed,
    recipe_sha256=stages.recipe_sha256(recipe, stage),
    inputs_sha256=stages.inputs_sha256(recipe, stage, parents),
    code_version=align.__version__, versions={},
    base=BaseFacts(id="b", revision=None, sha256="b"),
    tokenizer_sha256="t", template_sha256="t", pad_id=0, eos_ids=(1,),
    parents=tuple(
        ParentFacts(stage=name, sha256=p.outputs_sha256(),
                    path=os.path.relpath(places.stage_directory(recipe, name), folder))
        for name, p in parents.items()),
    data=tuple(DataFacts(rows=1, kept=1, dropped={}, **print) for print in prints),
    files=inputs.named_sha256(recipe, stage), metrics=metrics,
    outputs=sha256_outputs(folder, ("model",)),
    wandb_id=None, started="", finished=""))
"""

CHECK_DATA = """
import os, sys
with open("checked", "a") as file:
    print(*sys.argv[1:], file=file)
sys.exit(2 if os.environ.get("FAIL") == "data" else 0)
"""

REPORT = """
import sys
from pathlib import Path
print("noise on standard output")
(Path(sys.argv[1]) / "report.html").write_text("<html>")
"""

EXPORT = """
import json, os, sys
from pathlib import Path
print("noise on standard output")
if "FAIL" in os.environ:
    print("error: the exported model is not the trained one", file=sys.stderr)
    sys.exit(1)
folder = Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir(parents=True)
(folder / "export.json").write_text(json.dumps({"argv": sys.argv[1:], "drift": {"kl/mean": 0.1}}))
"""

RECIPE = """
name: x
base: {id: some/model}
data:
  sft: {train: [{world: demonstrations}]}
  prompts: {train: [{world: prompts}]}
sft: {lr: 1e-3, batch_size: 2}
ppo: {lr: 1e-3, batch_size: 2, minibatch_size: 2, steps: 1, max_new_tokens: 2, reward: m:f}
evaluate: {}
"""

# The real command, with the started modules taken from the folder "house".
ALIGN = """
import sys
from pathlib import Path
from launch import cli, opened
opened.ROOT = Path("house").absolute()
sys.argv[0] = "align"
cli.main()
"""


def build(place: Path) -> None:
    """Put the stand-ins and a recipe, ``r.yaml``, into a folder."""
    package = place / "house" / "pipelines"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "pipelines" / "process.py", package)
    (package / "stage.py").write_text(STAGE)
    (package / "check_data.py").write_text(CHECK_DATA)
    (package / "report.py").write_text(REPORT)
    (package / "export.py").write_text(EXPORT)
    (place / "r.yaml").write_text(RECIPE)


def start(place: Path, *words: str, **environ: str) -> subprocess.Popen[str]:
    """Start the real command in ``place``."""
    return subprocess.Popen(
        [sys.executable, "-c", ALIGN, *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def align(place: Path, *words: str, code: int = 0, **environ: str) -> tuple[str, str]:
    """Run the real command in ``place``; return what it printed, and what it said of errors."""
    process = start(place, *words, **environ)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, output + errors
    return output, errors
