"""PPO beside TRL 1.12 on the same work: seconds, tokens and memory, and their ratios.

    python -m tests.benchmarks.ppo_speed --trl-python ENV/bin/python --rounds 1 --json speed.json
    python -m tests.benchmarks.ppo_speed --make-venv ENV --size xs --modes lora --scenarios eos

Both programs run the workload of ``--bench`` in turn, each in a process of its own on one thread.
With fixed lengths every response has ``--max-new-tokens`` tokens, with ``eos`` they end by
themselves. Ratios above 1 in the columns called "faster" and below 1 in "memory" favour Align;
memory is the peak resident set above that of the bare imports. Every number is the median over the
counted updates of all rounds: the first update of a run is warm-up. Size s takes half an hour a
round with fixed lengths and as long again with eos. Linux only.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.command import KEEP_MEMORY
from tests.benchmarks import common

SCENARIOS = ("fixed", "eos")
# Our modes, and what TRL runs beside them: it has no counterpart of the last three.
TRL_MODE = {
    "full": (),
    "lora": ("--lora", "--value-lora"),
    "lora-policy-trunk": ("--lora", "--value-lora"),
    "lora-top-half": ("--lora", "--value-lora"),
    "lora-top-half-policy-trunk": ("--lora", "--value-lora"),
}
DTYPES = ("float32", "bfloat16")
PHASES = ("rollout_s", "score_s", "update_s")


@dataclass
class Runs:
    """The results of one program in one setting, one per round."""

    results: list[dict[str, Any]] = field(default_factory=list)

    def seconds(self, key: str = "total_s") -> float:
        """Return the median of a phase's seconds per update."""
        return statistics.median(float(update[key]) for update in self._counted())

    def tokens_per_second(self) -> float:
        """Return the median of response tokens per second."""
        rates = (u["response_tokens"] / u["total_s"] for u in self._counted())
        return float(statistics.median(rates))

    def phases(self) -> str:
        """Return the seconds of rollout, score and update."""
        return " / ".join(f"{self.seconds(key):.3g}" for key in PHASES)

    def memory_mb(self) -> float:
        """Return the median over the rounds of the peak above the bare imports."""
        peaks = (result["summary"] for result in self.results)
        return float(statistics.median(p["peak_rss_mb"] - p["rss_after_import_mb"] for p in peaks))

    def _counted(self) -> Iterable[dict[str, Any]]:
        for result in self.results:
            updates = result["updates"]
            yield from updates[1:] if len(updates) > 1 else updates


def measure(options: argparse.Namespace, trl_python: Path, folder: Path) -> dict[Any, Runs]:
    """Run everything in turn; return the runs by (program, scenario, setting)."""
    workload = common.load_workload(options.bench)
    shape = {
        "size": options.size,
        "seed": options.seed,
        "batch": options.batch,
        "updates": options.updates,
        "max_new_tokens": options.max_new_tokens,
    }
    for scenario in options.scenarios:
        exported = folder / scenario
        workload.export(workload.Workload(scenario=scenario, **shape), str(exported))
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
    runs: dict[Any, Runs] = {}
    for round_number in range(1, options.rounds + 1):
        for scenario in options.scenarios:
            seen: set[tuple[str, ...]] = set()
            for mode in options.modes:
                flags = TRL_MODE[mode]
                if flags not in seen:
                    script = options.bench / "trl_ppo.py"
                    command = [trl_python, script, *arguments, "--scenario", scenario, *flags]
                    command += ["--autocast", options.trl_autocast]
                    _run(runs, round_number, ("trl", scenario, flags), command, folder)
                    seen.add(flags)
                for dtype in options.dtypes:
                    module = [sys.executable, "-m", "tests.benchmarks.align_ppo"]
                    command = [*module, folder / scenario, "--mode", mode, "--dtype", dtype]
                    _run(runs, round_number, ("align", scenario, mode, dtype), command, folder)
    return runs


def _run(
    runs: dict[Any, Runs], number: int, key: Any, command: list[str | Path], folder: Path
) -> None:
    out, log = folder / "result.json", folder / "log"
    # Ours as the launcher starts it; the other program as its documentation does.
    settings = KEEP_MEMORY if key[0] == "align" else None
    common.run([*command, "--out", out], log, settings)
    result = json.loads(out.read_text(encoding="utf-8"))
    runs.setdefault(key, Runs()).results.append(result)
    words = " ".join(word if isinstance(word, str) else " ".join(word) for word in key)
    common.say(f"round {number}: {words}: {result['summary']['seconds_per_update']:.1f} s/update")


def compare(options: argparse.Namespace, runs: dict[Any, Runs]) -> list[dict[str, Any]]:
    """Return one row per scenario, mode and dtype."""
    rows = []
    for scenario in options.scenarios:
        for mode in options.modes:
            theirs = runs["trl", scenario, TRL_MODE[mode]]
            for dtype in options.dtypes:
                ours = runs["align", scenario, mode, dtype]
                rows.append(
                    {
                        "lengths": scenario,
                        "mode": mode,
                        "dtype": dtype,
                        "TRL s": theirs.seconds(),
                        "Align s": ours.seconds(),
                        "faster": theirs.seconds() / ours.seconds(),
                        "tokens/s faster": ours.tokens_per_second() / theirs.tokens_per_second(),
                        "TRL MB": theirs.memory_mb(),
                        "Align MB": ours.memory_mb(),
                        "memory": ours.memory_mb() / theirs.memory_mb(),
                        "TRL rollout / score / update": theirs.phases(),
                        "Align rollout / score / update": ours.phases(),
                    }
                )
    return rows


def parameter_table(runs: dict[Any, Runs]) -> str:
    """Return the MB of parameters of base and roles, each storage counted once."""
    rows = []
    for (program, scenario, *setting), run in runs.items():
        if program == "align":
            sizes = run.results[0]["resident_bytes"]
            mode = {"lengths": scenario, "mode": setting[0], "dtype": setting[1]}
            rows.append(mode | {f"{role} MB": size / 1e6 for role, size in sizes.items()})
    return common.table(rows)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_workload_options(parser)
    common.add_trl_options(parser, make_venv=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--modes", nargs="+", choices=TRL_MODE, default=tuple(TRL_MODE))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of Align")
    parser.add_argument("--trl-autocast", choices=("no", "bf16"), default="no")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    options = parser.parse_args()

    python = options.trl_python or common.make_venv(options.make_venv, options.bench)
    with tempfile.TemporaryDirectory() as temporary:
        runs = measure(options, python, Path(temporary))
    rows = compare(options, runs)
    print(common.table(rows))
    print(f"\nParameters in memory:\n\n{parameter_table(runs)}")
    if options.json is not None:
        results = [result for run in runs.values() for result in run.results]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"table": rows, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
