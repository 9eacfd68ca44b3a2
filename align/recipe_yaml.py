"""YAML 1.2 text as plain values, with the line that every value comes from.

Stricter than a YAML loader: repeated keys, empty values, object tags and documents that grow out
of bounds through aliases are refused. Values are text, numbers, true/false, null, lists and dicts.
"""

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

Path = tuple[str | int, ...]

_CORE = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}
# What else ruamel.yaml recognises by its looks; in YAML 1.2's core schema all of it is text.
_TEXT = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "value", "merge")}
# Stands in for a value that was reported as a problem of the document.
UNREADABLE = object()
_HALF = re.compile("[\\ud800-\\udfff]")  # what "\\ud83d" spells; no file takes it
_MAX_NODES, _MAX_DEPTH = 20_000, 20


class NotYamlError(Exception):
    """The text cannot be read at all. ``line`` counts from 1; None where it is not known."""

    def __init__(self, text: str, line: int | None) -> None:
        super().__init__(text)
        self.text = text
        self.line = line


@dataclass
class Tree:
    """A document: its value, the line of every path in it, and what is wrong in it."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    nodes: int = 0


def parse(text: str) -> Tree:
    """Read one YAML document; an empty one has the value None and no lines.

    Raises:
        NotYamlError: the text is not YAML, holds several documents, or is too large or too deep.
    """
    yaml = YAML(typ="safe", pure=True)
    tree = Tree()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReusedAnchorWarning)
            node = yaml.compose(text)
        if node is not None:
            tree.value = _value(yaml, node, (), tree)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NotYamlError(_explain(error), mark.line + 1 if mark else None) from None
    except YAMLError as error:
        raise NotYamlError(" ".join(str(error).split()), None) from None
    except ReusedAnchorWarning as warning:
        anchor = str(warning).partition("'")[2].partition("'")[0]
        raise NotYamlError(f"the anchor &{anchor} is given twice", None) from None
    except RecursionError:
        raise NotYamlError("nested too deeply", None) from None
    return tree


def _explain(error: MarkedYAMLError) -> str:
    problem = " ".join(str(error.problem or error.context).split())
    if "\\t" in problem or "'\t'" in problem:
        return "a tab; YAML is indented with spaces"
    if "but found another document" in problem:
        return "a second document; a recipe is one document"
    context = f" {error.context}" if error.context and error.problem else ""
    return f"{problem}{context}"


def _value(yaml: Any, node: Node, path: Path, tree: Tree) -> Any:
    tree.nodes += 1
    line = node.start_mark.line + 1
    tree.lines.setdefault(path, line)  # a key's line, where there is one, was entered before
    if tree.nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
        raise NotYamlError("too large or nested too deeply for a recipe (aliases?)", line)
    if isinstance(node, ScalarNode):
        return _scalar(yaml, node, path, tree)
    if isinstance(node, MappingNode):
        if node.tag != "tag:yaml.org,2002:map":
            return _refuse_tag(node, tree)
        return _mapping(yaml, node, path, tree)
    if node.tag != "tag:yaml.org,2002:seq":
        return _refuse_tag(node, tree)
    return [_value(yaml, item, (*path, i), tree) for i, item in enumerate(node.value)]


def _mapping(yaml: Any, node: Node, path: Path, tree: Tree) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode) or _HALF.search(key_node.value):
            tree.problems.append((line, "a key that is not text"))
            continue
        key = str(key_node.value)
        name = ".".join(map(str, (*path, key)))
        if key in result:
            first = tree.lines[(*path, key)]
            tree.problems.append((line, f"{name}: given twice, first in line {first}; keep one"))
            continue
        tree.lines[(*path, key)] = line
        result[key] = _value(yaml, value_node, (*path, key), tree)
    return result


def _scalar(yaml: Any, node: ScalarNode, path: Path, tree: Tree) -> Any:
    if _HALF.search(node.value):
        problem = "half of a surrogate pair; write whole characters"
        tree.problems.append(
            (tree.lines[path], f"{'.'.join(map(str, path)) or 'value'}: {problem}")
        )
        return UNREADABLE
    if node.tag in _TEXT and node.style is None:
        return str(node.value)
    if node.tag not in _CORE:
        return _refuse_tag(node, tree)
    line = tree.lines[path]
    name = ".".join(map(str, path)) or "value"
    if node.value == "" and node.tag.endswith(":null"):
        problem = (
            f"{name}: has no value; write null to leave it out, {{}} for a section of defaults"
        )
        tree.problems.append((line, problem))
        return UNREADABLE
    try:
        return yaml.constructor.construct_object(node)
    except (ValueError, YAMLError):
        tree.problems.append((line, f"{name}: cannot be read as {node.tag.rpartition(':')[2]}"))
        return UNREADABLE


def _refuse_tag(node: Node, tree: Tree) -> object:
    tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
    problem = f"the tag {tag} is not allowed: a recipe holds plain values only"
    tree.problems.append((node.start_mark.line + 1, problem))
    return UNREADABLE
