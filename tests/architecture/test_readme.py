"""The README's file tree: every module once, with the first sentence of its own docstring, and
every other folder."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("align", "data", "reward", "pipelines", "launch")
FOLDERS = {
    "pipelines/recipes": "the shipped recipes, one folder a family",
    "pipelines/templates": "the report's page",
}


def first_sentence(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc, f"{path} has no docstring"
    return " ".join(doc.split("\n\n")[0].split()).replace("``", "").rstrip(".")


def tree() -> str:
    lines = []
    for package in PACKAGES:
        lines.append(f"    {package}/")
        for path in sorted((ROOT / package).glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"      {path.name:<18} {first_sentence(path)}")
        for folder in sorted((ROOT / package).iterdir()):
            if folder.is_dir() and folder.name != "__pycache__":
                name = f"{folder.name}/"
                lines.append(f"      {name:<18} {FOLDERS[f'{package}/{folder.name}']}")
    return "\n".join(lines)


def test_the_file_tree_is_that_of_the_code() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = tree()
    assert len(expected.splitlines()) > 50
    assert expected in readme, f"README.md needs this file tree:\n{expected}"
