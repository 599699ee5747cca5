"""Names of exemplar forms ("edges@64", "webp:10@32", "edges+colour@16"), and the forms that they stand for."""

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import compress.forms
from compress.forms.form import Form
from compress.presets import Preset
from utils.data.paths import FormFiles
from utils.errors import UserError


@dataclass(frozen=True)
class Spec:
    """A form's name in parts: "webp:10@64" is head "webp", argument "10" and side 64; "codebook:6@20/10" has part 10.

    plus: the Spec behind "+".
    """

    head: str
    argument: str | None = None
    side: int | None = None
    plus: "Spec | None" = None
    part: int | None = None

    @property
    def name(self) -> str:
        """As users write it."""
        argument = "" if self.argument is None else f":{self.argument}"
        side = "" if self.side is None else f"@{self.side}"
        part = "" if self.part is None else f"/{self.part}"
        return f"{self.head}{argument}{side}{part}" + (f"+{self.plus.name}" if self.plus else "")


def files_named(name: str, kept_endings: tuple[str, ...], copy_ending: str) -> FormFiles:
    """Where the files of a form of this name lie."""
    folder = re.sub("[:/]", "-", name)  # which are not allowed in names on all systems
    return FormFiles(folder, f"{folder}-copies", kept_endings, copy_ending)


def parsed(name: str) -> Spec:
    """Raises UserError for what is no form's name."""
    first, _, rest = name.partition("+")
    match = re.fullmatch(r"([a-z0-9]+)(?::([\w.]+))?(?:@([1-9]\d{0,3}))?(?:/(\d{1,4}))?", first)
    if not match or "+" in rest or name.endswith("+"):
        raise UserError(f"{name!r} is no form's name; such as {', '.join(examples())}.")
    side, part = (None if number is None else int(number) for number in match.group(3, 4))
    return Spec(match[1], match[2], side, parsed(rest) if rest else None, part)


def form_named(name: str, preset: Preset) -> Form:
    """The form that a user names, with a preset's settings.  Raises UserError for an unknown or impossible one."""
    spec = parsed(name)
    head = f"{spec.head}+" if spec.plus else spec.head
    if head not in _table():
        near = difflib.get_close_matches(head, _table(), n=1)
        hint = f" Did you mean {near[0] + name[len(head) :]!r}?" if near else ""
        raise UserError(f"no form {head!r}: choose one of {', '.join(examples())}.{hint}")
    if spec.part is not None and not any(example.startswith(head) and "/" in example for example in examples()):
        raise UserError(f"the form {head!r} takes no part: {name!r} ends in /{spec.part}.")
    return _table()[head](spec, preset)


def examples() -> list[str]:
    """Names of the forms, as --help lists them."""
    return [name for module in _modules() for name in getattr(module, "EXAMPLES", module.FORMS)]


def _table() -> Mapping[str, Callable[[Spec, Preset], Form]]:
    return {head: make for module in _modules() for head, make in module.FORMS.items()}


@cache
def _modules() -> list[ModuleType]:
    """The modules of this folder that have a form."""
    names = [f"compress.forms.{entry.name}" for entry in pkgutil.iter_modules(compress.forms.__path__)]
    return [module for module in map(importlib.import_module, names) if hasattr(module, "FORMS")]
