"""The methods and their settings, read from their source: no method is imported, and so neither is torch.

A method file holds one class with its name, `class ICaRL(Method, name="icarl")`, and, where the method has keys of its
own, a dataclass `Settings` at the top level whose fields are `utils.config.schema.setting`s.  Both are found here by
parsing the file; of its code only `Settings` and the imports that it may need are run.

    python -m models.catalogue > docs/config.md     writes the page of all config keys
"""

import ast
import dataclasses
import importlib
from collections import ChainMap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convs import BACKBONES, LIBRARIES
from utils.config.read import load_config
from utils.config.schema import Config, MethodInfo
from utils.config.show import markdown
from utils.errors import UserError

if TYPE_CHECKING:
    from models.training.method import Method

FOLDER = Path(__file__).parent
_LIGHT = {
    *("annotated_types", "dataclasses", "typing", "collections.abc"),
    *("utils.config.schema", "utils.config.types", "utils.errors"),
}
"""Modules that the code of a `Settings` may import from."""
_FACTS = MethodInfo._fields[3:]
"""Class variables of a method that the config must know; each is written as a literal."""


class _Class(NamedTuple):
    """A class statement at a file's top level.  paper: what its file's docstring begins with; settings: its file's;
    facts: those of `_FACTS` that it sets itself."""

    module: str
    paper: str
    settings: type | None
    bases: list[str]
    method: str | None
    facts: dict[str, Any]


@cache
def methods(folder: Path = FOLDER) -> dict[str, MethodInfo]:
    """What the config has to know of every method in a folder, by name, sorted.

    Raises UserError for a class variable of `_FACTS` that is no literal.
    """
    classes, infos = _classes(folder), {}
    for name, described in classes.items():
        if method := described.method:
            ancestors = _ancestors(name, classes)
            settings = list(dict.fromkeys(c.settings for c in ancestors if c.settings is not None))
            if len(settings) > 1:  # the keys of all of them, nearest first, as one dataclass
                settings = [dataclasses.dataclass(type("Settings", tuple(settings), {}))]
            facts = ChainMap(*(ancestor.facts for ancestor in ancestors))
            infos[method] = MethodInfo(method, described.paper, settings[0] if settings else None, **facts)
    return dict(sorted(infos.items()))


@cache
def _classes(folder: Path) -> dict[str, _Class]:
    classes = {}
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        nodes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        settings = _compiled(tree, nodes.pop("Settings"), file) if "Settings" in nodes else None
        paper = " ".join((ast.get_docstring(tree) or "").partition(".\n")[0].split())
        classes.update({name: _described(node, file, paper, settings) for name, node in nodes.items()})
    return classes


def load(name: str) -> "type[Method]":
    """The class of a method, imported now."""
    class_name, described = next((key, c) for key, c in _classes(FOLDER).items() if c.method == name)
    return getattr(importlib.import_module(f"models.{described.module}"), class_name)


def read_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a file with `key=value` overrides on top (`utils.config.read.load_config`)."""
    return load_config(file, overrides, methods=methods(), backbones=backbones())


def backbones() -> tuple[str, ...]:
    """The allowed values of convnet_type; "torchvision/NAME" stands for all that begin like it."""
    return (*BACKBONES, *(f"{library}NAME" for library in LIBRARIES))


def _described(node: ast.ClassDef, file: Path, paper: str, settings: type | None) -> _Class:
    facts = {}
    for statement in node.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and target.id in _FACTS and value is not None:
            if not isinstance(value, ast.Constant):
                raise UserError(
                    f"{file}, line {value.lineno}: {target.id} must be a literal, as it is read from source."
                )
            facts[target.id] = value.value
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    method = str(ast.literal_eval(keywords["name"])) if "name" in keywords else None
    return _Class(file.stem, paper, settings, [ast.unparse(base) for base in node.bases], method, facts)


def _ancestors(name: str, classes: dict[str, _Class]) -> list[_Class]:
    """A class and those it derives from, nearest first, as far as they are in the folder."""
    ancestors, waiting = [], [name]
    while waiting:
        described = classes.get(waiting.pop(0))
        if described is not None:
            ancestors.append(described)
            waiting += described.bases
    return ancestors


def _compiled(tree: ast.Module, node: ast.ClassDef, file: Path) -> type:
    """The class of a `Settings` statement, made from that statement and the file's light imports alone."""
    imports: list[ast.stmt] = []
    for statement in tree.body:
        modules = {alias.name for alias in statement.names} if isinstance(statement, ast.Import) else set()
        if isinstance(statement, ast.ImportFrom):
            modules = {statement.module or ""}
        if modules and modules <= _LIGHT:
            imports.append(statement)
    namespace: dict[str, Any] = {"__name__": f"models.{file.stem}"}
    exec(compile(ast.Module([*imports, node], []), str(file), "exec"), namespace)
    return namespace["Settings"]


if __name__ == "__main__":
    print(markdown(methods(), backbones()), end="")
