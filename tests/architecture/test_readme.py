"""The README's file tree: every module once, with the first sentence of its own docstring."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("align", "data", "reward", "pipelines", "launch")


def first_sentence(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc, f"{path} has no docstring"
    return " ".join(doc.split("\n\n")[0].split()).replace("``", "").rstrip(".")


def tree() -> str:
    lines = []
    for package in PACKAGES:
        lines.append(f"    {package}/")
        for path in sorted((ROOT / package).glob("*.py")):
            if not path.name.startswith("__"):
                lines.append(f"      {path.name:<18} {first_sentence(path)}")
    return "\n".join(lines)


def test_the_file_tree_is_that_of_the_code() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = tree()
    assert len(expected.splitlines()) > 50
    assert expected in readme, f"README.md needs this file tree:\n{expected}"
