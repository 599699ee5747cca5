"""The forms in which exemplars are kept: what is stored of an image, and what pictures come back from it.

A form's module, found by being in this folder, has a table FORMS: the head of its name ("edges" in "edges@64"; "edges+"
in "edges+webp:10@32", which has another form's name behind the "+") -> a function of (Spec, Preset) that returns the
form; and, where other names than these heads are to be listed, EXAMPLES.  Everything else (plan, resume, verify,
repair, copies on demand, records, budget) works through the contract of `Form`, in form.py.
"""

import difflib
import importlib
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from compress.forms.form import OTHERWISE, WRONG_SIZE, Condition, Form, Request, decoded, pixels, resize_back, resized
from compress.presets import Preset
from utils.data.codecs import reduced
from utils.errors import UserError

__all__ = [
    "OTHERWISE", "WRONG_SIZE", "Condition", "Form", "Request", "Spec", "decoded", "examples", "form_named", "pixels",
    "reduced", "resize_back", "resized",
]  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A form's name in parts: "webp:10@64" is head "webp", argument "10" and side 64; "codebook:6@20/10" has part 10;
    plus: what is behind "+"."""

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
    forms = {head: form for module in _modules() for head, form in module.FORMS.items()}
    if head not in forms:
        near = difflib.get_close_matches(head, forms, n=1)
        hint = f" Did you mean {near[0] + name[len(head) :]!r}?" if near else ""
        raise UserError(f"no form {head!r}: choose one of {', '.join(examples())}.{hint}")
    if spec.part is not None and not any(example.startswith(head) and "/" in example for example in examples()):
        raise UserError(f"the form {head!r} takes no part: {name!r} ends in /{spec.part}.")
    return forms[head](spec, preset)


def examples() -> list[str]:
    """Names of the forms, as --help lists them."""
    return [name for module in _modules() for name in getattr(module, "EXAMPLES", module.FORMS)]


@cache
def _modules() -> list[ModuleType]:
    """The modules of this folder that have a form."""
    names = [f"{__name__}.{entry.name}" for entry in pkgutil.iter_modules(__path__)]
    return [module for module in map(importlib.import_module, names) if hasattr(module, "FORMS")]
