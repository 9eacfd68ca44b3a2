"""The report page as a whole: made by its entry point, and looked at in a real browser."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from align.recipe import StageName
from pipelines.report import render, write_report
from pipelines.run_facts import read_run
from tests.run_tree import write_rows, write_run, write_stage

ROOT = Path(__file__).parents[2]
PLANTED = '<script>document.title="planted"</script><img src=x onerror=alert(1)> $5 & {{ 7*7 }}'
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.mark.parametrize(
    ("stages", "gold"),
    [
        (["pretrain"], True),
        (["sft", "ppo"], True),
        (["pretrain", "sft", "ppo", "evaluate"], True),
        (["pretrain", "sft", "reward", "ppo", "evaluate"], False),
        (["pretrain", "sft", "reward", "evaluate"], True),
    ],
)
def test_any_finished_stages_make_a_page(
    stages: list[StageName], gold: bool, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "mini", stages, gold=gold)
    page = write_report(run).read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert ("Gold score" in page) == (gold and "evaluate" in stages)
    assert ('id="reward-model"' in page) == ("reward" in stages)
    assert ('id="overoptimisation"' in page) == ("ppo" in stages)


def test_the_headline_names_the_categories_that_got_worse(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mini")
    metrics = dict(read_run(run)["evaluate"].final())
    assert "It fell" not in render(read_run(run), run)
    before = {"helpful": 0.5, "format": 0.5, "honest": 0.5, "harmless": 0.81}
    after = {"helpful": 0.16, "format": 0.62, "honest": 0.46, "harmless": 0.7}
    for model, golds in (("sft", before), ("ppo", after)):
        metrics |= {f"{model}/gold/{name}": gold for name, gold in golds.items()}
    write_stage(run / "evaluate", "evaluate", [], metrics)
    page = render(read_run(run), run)
    assert "It fell in helpful (0.50 to 0.16) and harmless (0.81 to 0.70)." in page


def test_text_from_models_and_data_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mini", answer=PLANTED, category=PLANTED)
    (run / "recipe.yaml").write_text(PLANTED)
    samples = run / "evaluate" / "samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows[0]["prompt"] = [{"role": PLANTED, "content": PLANTED}]
    write_rows(samples, rows)
    page = render(read_run(run), run)
    assert not re.search(r"<(script|img)", page)
    assert page.count("&lt;script&gt;") >= 6  # role, prompt, category tag and axis, answer, recipe
    assert "{{ 7*7 }}" in page


def test_page_loads_nothing(tmp_path: Path) -> None:
    page = render(read_run(write_run(tmp_path / "mini")), tmp_path / "mini")
    assert not re.search(r"""(?:src|href|xlink:href)\s*=\s*["'](?!\#)""", page)
    assert not re.search(r"url\((?!#)|@import|https?://", page)


def test_every_chart_has_a_name_and_every_page_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mini")
    page = render(read_run(run), run)
    drawings = re.findall(r"<svg[^>]*>", page)
    assert len(drawings) > 15
    assert all(re.search(r'role="img" aria-label="[^"]+"', drawing) for drawing in drawings)
    assert page == render(read_run(run), run)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the report's entry point as the launcher does."""
    program = [sys.executable, "-m", "pipelines.report", *arguments]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_prints_the_path_and_refuses_with_exit_code_2(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mini", ["pretrain"])
    done = command(str(run))
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html"))
    refused = command(str(tmp_path / "absent"))
    assert refused.returncode == 2
    assert refused.stderr == f"report: {tmp_path / 'absent'}: no such run directory\n"
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    failed = command(str(run))
    assert (failed.returncode, failed.stderr[:17]) == (1, "report: [Errno 21")


# The page stands in a frame of the wanted width; the outer page's script measures it.
FRAME = """<!DOCTYPE html><title>frame</title><body>
<iframe style="border:0;width:{width}px;height:800px" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  page.querySelectorAll("details").forEach(part => part.open = true);
  const root = page.documentElement;
  const inside = (node, edge) => node.closest(".scroll, pre, svg") || node.matches("html, head *")
    || node.getBoundingClientRect().right <= edge + 0.5;
  const wide = [...page.querySelectorAll("*")].filter(node => !inside(node, root.clientWidth));
  document.body.dataset.measured = JSON.stringify({{
    width: root.clientWidth, content: root.scrollWidth, title: page.title,
    wide: wide.slice(0, 5).map(node => node.outerHTML.slice(0, 80)),
  }});
}}</script>"""


@pytest.mark.parametrize("width", [390, 1400])
def test_page_never_scrolls_sideways(width: int, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to look with: none of {', '.join(BROWSERS)} is installed")
    run = write_run(tmp_path / "mini", answer=PLANTED + "x" * 400)
    (run / "recipe.yaml").write_text("data: " + "y" * 400)
    page = html.escape(write_report(run).read_text(encoding="utf-8"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=page), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(
        [browser, *QUIET, profile, "--window-size=1500,900", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'data-measured="([^"]*)"', shown.stdout)
    assert found is not None, shown.stderr[-500:]
    measured = json.loads(html.unescape(found[1]))
    assert measured == {
        "width": width,
        "content": width,
        "title": "mini: alignment report",
        "wide": [],
    }
