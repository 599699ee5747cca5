"""The methods and their settings, read from their source: no method is imported, and so neither is torch.

A method file holds one class with its name, `class ICaRL(Method, name="icarl")`, and, where the method has keys of its
own, a dataclass `Settings` at the top level whose fields are `utils.config.schema.setting`s.  Both are found here by
parsing the file; of its code only `Settings` and the imports that it may need are run.

    python -m models.catalogue > docs/config.md     writes the page of all config keys
"""

import ast
import dataclasses
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convs import BACKBONES, LIBRARIES
from utils.config.schema import MethodInfo
from utils.config.show import markdown

if TYPE_CHECKING:
    from models.training.method import Method

FOLDER = Path(__file__).parent
_LIGHT = (
    "annotated_types",
    "dataclasses",
    "typing",
    "collections.abc",
    "utils.config.schema",
    "utils.config.types",
    "utils.errors",
)
"""Modules that the code of a `Settings` may import from."""


class _Class(NamedTuple):
    """A class statement at a file's top level.  facts: those of its attributes that a `MethodInfo` has."""

    module: str
    bases: tuple[str, ...]
    method: str | None
    facts: dict[str, Any]


@cache
def methods(folder: Path = FOLDER) -> dict[str, MethodInfo]:
    """What the config has to know of every method in a folder, by name, sorted."""
    classes: dict[str, _Class] = {}
    settings: dict[str, type] = {}
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "Settings":
                settings[file.stem] = _compiled(tree, node, file)
            elif isinstance(node, ast.ClassDef):
                classes[node.name] = _described(node, file.stem)
    infos = {}
    for name, described in classes.items():
        if described.method:
            line = _ancestors(name, classes)
            own = _joined(list(dict.fromkeys(settings[each.module] for each in line if each.module in settings)))
            facts = {key: value for each in reversed(line) for key, value in each.facts.items()}
            infos[described.method] = MethodInfo(described.method, own, **facts)
    return dict(sorted(infos.items()))


@cache
def class_names(folder: Path = FOLDER) -> dict[str, tuple[str, str]]:
    """Method name -> (module, class)."""
    places = {}
    for file in sorted(folder.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (method := _described(node, file.stem).method):
                places[method] = (file.stem, node.name)
    return places


def load(name: str) -> "type[Method]":
    """The class of a method, imported now."""
    module, class_name = class_names()[name]
    return getattr(importlib.import_module(f"models.{module}"), class_name)


def backbones() -> tuple[str, ...]:
    """The allowed values of convnet_type; "torchvision/NAME" stands for all that begin like it."""
    return (*BACKBONES, *(f"{library}NAME" for library in LIBRARIES))


def _described(node: ast.ClassDef, module: str) -> _Class:
    """Raises ValueError for a fact that is no plain value."""
    facts = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            continue
        if isinstance(target, ast.Name) and target.id in MethodInfo._field_defaults:
            facts[target.id] = ast.literal_eval(value)
    names = [keyword.value for keyword in node.keywords if keyword.arg == "name"]
    name = ast.literal_eval(names[0]) if names else None
    return _Class(module, tuple(ast.unparse(base) for base in node.bases), name, facts)


def _ancestors(name: str, classes: dict[str, _Class]) -> list[_Class]:
    """A class and those it derives from, nearest first, as far as they are in the folder."""
    line: list[_Class] = []
    waiting = [name]
    while waiting:
        described = classes.get(waiting.pop(0))
        if described is not None:
            line.append(described)
            waiting += described.bases
    return line


def _joined(settings: list[type]) -> type | None:
    """The keys of a method and of those that it derives from, nearest first, as one dataclass."""
    if len(settings) < 2:
        return settings[0] if settings else None
    return dataclasses.dataclass(type("Settings", tuple(settings), {}))


def _compiled(tree: ast.Module, node: ast.ClassDef, file: Path) -> type:
    """The class of a `Settings` statement, made from that statement and the file's light imports alone."""
    imports: list[ast.stmt] = []
    for statement in tree.body:
        modules = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
        if isinstance(statement, ast.ImportFrom):
            modules = [statement.module or ""]
        if modules and all(module in _LIGHT for module in modules):
            imports.append(statement)
    namespace: dict[str, Any] = {"__name__": f"models.{file.stem}"}
    code = compile(ast.Module([*imports, node], []), str(file), "exec")
    exec(code, namespace)
    return namespace["Settings"]


if __name__ == "__main__":
    print(markdown(methods(), backbones()), end="")
