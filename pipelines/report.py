"""One page about one run: what came of it, how training went, and what it was made from.

    python -m pipelines.report RUN

writes ``RUN/report.html``: a single file without scripts that loads nothing from anywhere. It is
made from what the stages have written, finished or not, and holds text from models and data sets
only escaped.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import align
from align.manifest import find_manifest
from align.recipe import StageName
from pipelines import charts, results
from pipelines.charts import COLORS, MODEL_NAMES, Line
from pipelines.curves import CURVES, Curve
from pipelines.process import exit_code
from pipelines.results import decimal
from pipelines.reward_card import reward_card
from pipelines.run_facts import Run, StageFacts, read_run
from pipelines.samples import examples

FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"

_LINE_COLORS = (COLORS["sft"], COLORS["ppo"], COLORS["base"])

TITLES: dict[StageName, str] = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
}


def write_report(directory: Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Raises:
        InputError: there is no run there.
        ParentError: a manifest in it cannot be read.
        AlignError: matplotlib is missing.
    """
    page = render(read_run(directory), directory)
    path = directory / FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def render(run: Run, directory: Path) -> str:
    """Return the page."""
    metrics = results.evaluation(run)
    samples = run["evaluate"].samples if "evaluate" in run else []
    finished = [facts.manifest for facts in run.values() if facts.manifest]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    recipe = directory / "recipe.yaml"
    return environment.get_template(FILE).render(
        name=finished[-1].name if finished else directory.resolve().name,
        manifest=finished[-1] if finished else None,
        headline=results.headline(run, len(samples)),
        stages=[_stage_line(facts) for facts in run.values()],
        total=duration(sum(facts.seconds() or 0.0 for facts in run.values())),
        models=[MODEL_NAMES[model] for model in results.models_in(metrics)],
        table=results.results_table(metrics),
        num_prompts=len(samples),
        categories=_category_section(metrics, samples),
        probes=_probe_section(run),
        reward=_reward_section(run),
        examples=examples(run),
        curves=_curve_sections(run),
        chain=[_chain_line(facts) for facts in run.values() if facts.manifest],
        data=_data_lines(run),
        versions=_versions(run),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        align_version=align.__version__,
    )


def duration(seconds: float) -> str:
    """Write a duration in its two largest units: ``1 h 04 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _stage_line(facts: StageFacts) -> dict[str, Any]:
    seconds = facts.seconds()
    last = facts.rows[-1]["step"] if facts.rows else 0
    return {
        "title": TITLES[facts.stage],
        "id": facts.stage,
        "finished": facts.manifest is not None,
        "took": duration(seconds) if seconds is not None else "",
        "result": results.stage_result(facts)
        if facts.manifest
        else f"not finished; last step {last:g}",
    }


def _category_section(
    metrics: dict[str, float], samples: list[dict[str, Any]]
) -> dict[str, Any] | None:
    given = [row["category"] for row in samples if "category" in row]
    names, counts, values = results.gold_by_category(metrics, given)
    if not names:
        return None
    # A longer name would leave the chart no room.
    labels = [
        f"{textwrap.shorten(name, 28, placeholder='...')} ({count})"
        for name, count in zip(names, counts, strict=True)
    ]
    rows = [
        (label, [decimal(v) if v is not None else "" for v in column])
        for label, column in zip(labels, zip(*values.values(), strict=True), strict=True)
    ]
    chart = charts.category_chart(labels, values, name="Mean gold score by category and model")
    return {"chart": Markup(chart), "rows": rows}


def _probe_section(run: Run) -> dict[str, Any] | None:
    looks = results.probes(run)
    if len(looks) < 2:
        return None
    chart = charts.overoptimisation_chart(looks, name="Proxy and gold score over root KL")
    return {
        "chart": Markup(chart),
        "finding": results.overoptimisation_finding(looks),
        "has_gold": any(look.gold is not None for look in looks),
    }


def _reward_section(run: Run) -> dict[str, Any] | None:
    card = reward_card(run)
    if card is None:
        return None
    chart = charts.interval_chart(card.bars, chance=0.5, name="Agreement on held-out pairs")
    diagram = None
    if card.reliability:
        diagram = Markup(charts.reliability_chart(card.reliability, name="Reliability diagram"))
    return {"card": card, "chart": Markup(chart), "diagram": diagram}


def _curve_sections(run: Run) -> list[dict[str, Any]]:
    sections = []
    for stage, curves in CURVES.items():
        if stage not in run:
            continue
        drawn = [(curve, _draw(curve, run[stage])) for curve in curves]
        figures = [
            {"title": curve.title, "chart": Markup(chart), "look_for": curve.look_for}
            for curve, chart in drawn
            if chart is not None
        ]
        if figures:
            sections.append({"title": TITLES[stage], "id": stage, "figures": figures})
    return sections


def _draw(curve: Curve, facts: StageFacts) -> str | None:
    """Draw a curve, or return None where there are not two points to connect."""
    lines = []
    for (key, label), color in zip(curve.keys, _LINE_COLORS, strict=False):
        steps, values = facts.series(key)
        if len(steps) > 1 and (len(set(values)) > 1 or not curve.only_if_it_varies):
            lines.append(Line(label, steps, values, color))
    if not lines:
        return None
    name = f"{TITLES[facts.stage]}: {curve.title} by step"
    x = "rollout" if facts.stage == "ppo" else "step"
    return charts.line_chart(lines, name=name, x=x, share=curve.share)


def _chain_line(facts: StageFacts) -> dict[str, Any]:
    manifest = facts.manifest
    assert manifest is not None
    parents = []
    for parent in manifest.parents:
        there = find_manifest(facts.directory / parent.path)
        if there is None:
            state = "not found"
        else:
            state = "same" if there.outputs_sha256() == parent.sha256 else "changed since"
        parents.append({"stage": parent.stage, "sha256": parent.sha256[:12], "state": state})
    return {
        "stage": facts.stage,
        "outputs": manifest.outputs_sha256()[:12],
        "num_outputs": len(manifest.outputs),
        "parents": parents,
        "recipe": manifest.recipe_sha256[:12],
        "tokenizer": manifest.tokenizer_sha256[:12],
        "template": manifest.template_sha256[:12],
        "base": manifest.base,
        "seed": manifest.seed,
        "code": manifest.code_version,
        "finished": manifest.finished,
    }


def _data_lines(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "stage": facts.stage,
            "id": source.id,
            "rows": source.rows,
            "kept": source.kept,
            "dropped": ", ".join(f"{why} {n}" for why, n in sorted(source.dropped.items())),
            "sha256": source.sha256[:12],
        }
        for facts in run.values()
        if facts.manifest
        for source in facts.manifest.data
    ]


def _versions(run: Run) -> list[tuple[str, str]]:
    """Return each library's version; several where stages ran under different ones."""
    found: dict[str, dict[str, None]] = {}
    for facts in run.values():
        for library, version in (facts.manifest.versions if facts.manifest else {}).items():
            found.setdefault(library, {})[version] = None
    return [(library, ", ".join(versions)) for library, versions in found.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of one run and print its path; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.report", description="Write RUN/report.html."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    options = parser.parse_args(arguments)
    return exit_code("report", lambda: print(write_report(options.run)), debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
