"""Recipes as files: find, read, override on the command line, and write back.

Every problem of a file is reported at once, as ``file:line: key=value: what is wrong; what is
allowed``; a problem of an override names the override instead of file and line.
"""

import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

import align
from align.errors import RecipeError
from align.recipe import Recipe
from align.recipe_schema import allowed, found, known_part, short, suggest, without_tags
from align.recipe_yaml import UNREADABLE, NotYamlError, parse
from align.recipe_yaml import Path as KeyPath

_MAX_BYTES = 1_000_000


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with Align, by the name that the command takes."""
    folder = Path(align.__file__).parent.parent / "pipelines" / "recipes"
    files = sorted(folder.rglob("*.yaml"))
    names = (file.relative_to(folder).with_suffix("").as_posix() for file in files)
    return {name.removesuffix("/default"): file for name, file in zip(names, files, strict=True)}


def find_recipe(name: str | Path) -> Path:
    """Return the recipe file: ``name`` itself if it is a file, else the shipped recipe so called.

    Raises:
        RecipeError: there is neither; the message lists the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_dir():
        raise RecipeError(f"{path}: is a directory; name a recipe file in it")
    near = difflib.get_close_matches(str(name), shipped, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "`align recipes` lists the shipped ones"
    )
    raise RecipeError(f"{name}: no such file and no shipped recipe of this name; {hint}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (or shipped recipe), apply ``section.key=value`` overrides, and check it.

    Raises:
        RecipeError: lists all problems, one per line.
    """
    file = find_recipe(path)
    source = _Source(file)
    for override in overrides:
        source.apply(override)
    try:
        recipe = Recipe.model_validate(source.value)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            source.report(details)
        raise RecipeError(source.message()) from None
    if source.problems:
        raise RecipeError(source.message())
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, defaults spelled out; it loads back equal."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 1_000_000
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    buffer = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), buffer)
    return buffer.getvalue()


class _Source:
    """A recipe's plain values, where each of them comes from, and the problems found so far."""

    def __init__(self, file: Path) -> None:
        try:
            tree = parse(_read(file))
        except NotYamlError as error:
            line = f":{error.line}" if error.line else ""
            raise RecipeError(f"{file}{line}: not YAML: {error.text}") from None
        if not tree.lines:
            raise RecipeError(f"{file}: the file is empty; `align recipes show NAME` prints one")
        if not isinstance(tree.value, dict):
            raise RecipeError(
                f"{file}:{tree.lines[()]}: found {found(tree.value)}; allowed: sections"
                " (`align recipes show NAME` prints a recipe)"
            )
        self.value = tree.value
        self.origins = {path: f"{file}:{line}" for path, line in tree.lines.items()}
        self.origins[()] = f"{file}:1"
        self.problems = [f"{file}:{line}: {problem}" for line, problem in tree.problems]
        self.given: set[str] = set()

    def apply(self, override: str) -> None:
        """Set the value that ``section.key=value`` names."""
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            self.problems.append(f"{override}: not an override; allowed: section.key=value")
            return
        if key in self.given:
            self.problems.append(f"{override}: {key} is given twice; keep one")
            return
        self.given.add(key)
        try:
            tree = parse(text)
        except NotYamlError as error:
            self.problems.append(f"{override}: the value is not YAML: {error.text}")
            return
        if not tree.lines:
            problem = "has no value; write null to leave it out"
            self.problems.append(f"{override}: {problem}")
            return
        self.problems += [f"{override}: {problem}" for _, problem in tree.problems]
        path = self._set(parts, tree.value)
        if path is None:
            self.problems.append(
                f"{override}: {key} is not inside a section; see the recipe's keys"
            )
            return
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}
        self.origins |= {(*path, *below): override for below in tree.lines}

    def _set(self, parts: list[str], value: object) -> KeyPath | None:
        """Put the value into the tree and return its path, or None if there is no such place."""
        path: list[str | int] = []
        here: Any = self.value
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            step: str | int = part
            if isinstance(here, list):
                if not part.isdecimal() or int(part) >= len(here):
                    return None
                step = int(part)
            elif not isinstance(here, dict):
                return None
            elif not last and here.get(part) is None:
                here[part] = {}
            path.append(step)
            if last:
                here[step] = value
            else:
                here = here[step]
        return tuple(path)

    def report(self, details: ErrorDetails) -> None:
        """Add the problems that one finding of the recipe model stands for."""
        kind, loc = details["type"], without_tags(details["loc"])
        if kind == "recipe":
            for key, problem in details["ctx"]["problems"]:
                self._add((*loc, *key.split(".")) if key else loc, problem)
        elif kind == "extra_forbidden":
            self._add(loc, f"unknown key; {suggest(loc)}")
        elif kind == "missing":
            self._add(loc, f"missing; needed: {allowed(loc)}")
        else:
            path = known_part(loc)
            value = self._get(path)
            only_its_items_are_wrong = kind == "too_short" and value
            if value is not UNREADABLE and not only_its_items_are_wrong:
                self._add(path, f"found {found(value)}; allowed: {allowed(path)}")

    def _add(self, path: KeyPath, problem: str) -> None:
        origin = next(
            self.origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.origins
        )
        value = self._get(path)
        key = ".".join(map(str, path))
        if isinstance(value, str | int | float):
            key += f"={short(value)}"
        text = f"{origin}: {problem}" if origin == key else f"{origin}: {key}: {problem}"
        if text not in self.problems:
            self.problems.append(text)

    def _get(self, path: KeyPath) -> Any:
        here = self.value
        for step in path:
            try:
                here = here[step]
            except (KeyError, IndexError, TypeError):
                return None
        return here

    def message(self) -> str:
        """Return all problems, one per line; an override may hold bytes that are no characters."""
        return "\n".join(self.problems).encode("utf-8", "backslashreplace").decode()


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{file}: larger than {_MAX_BYTES:,} bytes: not a recipe")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from None
