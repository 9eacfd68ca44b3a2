"""What a recipe's keys may hold, in words: read off the recipe model for error messages."""

import difflib
import json
from functools import cache
from typing import Any

from align.recipe import Recipe
from align.recipe_yaml import Path

Schema = dict[str, Any]


def known_part(loc: Path) -> Path:
    """Return the beginning of ``loc`` that consists of keys and list positions.

    What pydantic appends to it (the member of a union, for one) means nothing to a user.
    """
    for n in range(1, len(loc) + 1):
        if not _at(loc[:n]):
            return loc[: n - 1]
    return loc


def without_tags(loc: Path) -> Path:
    """Return ``loc`` without the names by which pydantic tells the members of a union apart."""
    path: Path = ()
    for n, step in enumerate(loc, 1):
        if n == len(loc) or _at((*path, step)):
            path = (*path, step)
    return path


def allowed(path: Path) -> str:
    """Say what may stand at ``path``: ``a whole number greater than 0``, ``text, or null``."""
    return ", or ".join(dict.fromkeys(_describe(schema) for schema in _at(path)))


def found(value: object) -> str:
    """Say what a value is: ``'abc' (text)``, ``1.5``, ``a list``."""
    match value:
        case None | bool() | int() | float():
            return short(value)
        case str():
            return f"{short(value)!r} (text)"
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "a section"


def short(value: object) -> str:
    """Write a scalar as a recipe does, cut to a readable length."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def suggest(path: Path) -> str:
    """Name the valid key nearest to the unknown one at the end of ``path``, else all valid ones."""
    *section, unknown = path
    keys = [key for schema in _at(tuple(section)) for key in schema.get("properties", {})]
    near = difflib.get_close_matches(str(unknown), keys, n=1, cutoff=0.6)
    if near:
        return f"did you mean {'.'.join(map(str, (*section, near[0])))}?"
    elsewhere = [
        f"{name}.{unknown}"
        for name in _schema()["properties"]
        for schema in _at((name,))
        if unknown in schema.get("properties", {})
    ]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"allowed: {', '.join(keys)}"


@cache
def _schema() -> Schema:
    return Recipe.model_json_schema()


def _alternatives(schema: Schema) -> list[Schema]:
    """Return what a schema may stand for, references followed and unions taken apart."""
    if "$ref" in schema:
        return _alternatives(_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    members = schema.get("anyOf") or schema.get("oneOf")
    if members:
        return [part for one in members for part in _alternatives(one)]
    return [schema]


def _at(path: Path) -> list[Schema]:
    """Return the schemas that a value at ``path`` may follow; none if there is no such place."""
    here = [_schema()]
    for step in path:
        there: list[Schema] = []
        for schema in here:
            if isinstance(step, int):
                part = schema.get("items")
            else:
                part = schema.get("properties", {}).get(step, schema.get("additionalProperties"))
            if isinstance(part, dict):
                there += _alternatives(part)
        here = there
    return here


def _describe(schema: Schema) -> str:
    if "const" in schema:
        return short(schema["const"])
    if "enum" in schema:
        *most, last = (short(value) for value in schema["enum"])
        return f"{', '.join(most)} or {last}"
    match schema.get("type"):
        case "object":
            return "a section"
        case "array":
            items = {_describe(item) for item in _alternatives(schema["items"])}
            length = "at least one item" if schema.get("minItems") else "any number of items"
            return f"a list of {length}, each {' or '.join(sorted(items))}"
        case "integer":
            return f"a whole number{_bounds(schema)}"
        case "number":
            return f"a number{_bounds(schema)}"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case _:
            return str(schema.get("description", "text"))


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        return f" greater than {schema['exclusiveMinimum']:g}"
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    return f" of at least {low:g}" if low is not None else ""
