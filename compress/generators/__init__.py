"""What turns requests for copies into pictures.

One file each, found by being in this folder.  ControlNet's has the models that `build` loads.  Another generator's
module has a table GENERATORS: the NAME of `--model NAME` or `--model NAME:WHAT_IT_LOADS` -> a class that follows
`Generator`.
"""

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np

from compress.forms import Request
from utils.errors import UserError

T = TypeVar("T")


class NoPicture(OSError):
    """In place of a picture that could not be made; the message says why."""


class Generator(Protocol):
    """What makes copies, batch_size requests at a time.

    A class in GENERATORS is called with (preset, machine, device), where the machine's precision is the one to compute
    in, and has a `fingerprint`, a string or a static method that returns one for a machine: copies are recorded under
    it, so it must change when the pictures do.  It may have a method `close`, which is called when all copies are made,
    and one that can also encode pictures `encode`, as `PictureGenerator` has.
    """

    batch_size: int

    def __call__(self, batch: Sequence[Request], steps: int | None = None) -> list[np.ndarray | NoPicture]:
        """Pictures of requests that share their `group`: HxWx3 uint8 each, of the condition's size.

        steps: of the sampler, None for the preset's.  Raises UserError, which ends the run; a NoPicture in the list
        fails one image.
        """


class Direct:
    """For forms without a model: the condition's picture is the copy."""

    batch_size = 1

    def __call__(self, batch: Sequence[Request], steps: int | None = None) -> list[np.ndarray | NoPicture]:
        return [request.condition.start for request in batch if request.condition.start is not None]


@cache
def generators() -> dict[str, type[Any]]:
    """The generators beside ControlNet, by the names that `--model` gives them."""
    modules = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
    return {name: made for module in modules for name, made in getattr(module, "GENERATORS", {}).items()}


def generator_named(model: str) -> type[Any] | None:
    """The class that `--model` names by NAME or NAME:WHAT_IT_LOADS; None for ControlNet's weights."""
    return generators().get(model.partition(":")[0])


def check_encodes(form_name: str, model: str, method: str | None = None) -> None:
    """Raises UserError unless `--model` names ControlNet's weights or, where a method is given, a class that has it."""
    kind = generator_named(model)
    if kind is not None and not (method and hasattr(kind, method)):
        raise UserError(f"the form {form_name} needs a --model that encodes: sd15, tiny or a ControlNet's weights.")


def group(request: Request) -> Hashable:
    """Requests of one group may share a batch: one generated size, alike in having a text, edge map, start and code."""
    condition = request.condition
    return condition.size, bool(request.text), condition.hint is None, condition.start is None, condition.code is None


def batches(items: Iterable[T], batch_size: int, key: Callable[[Any], Hashable] = group) -> Iterator[list[T]]:
    """Items of one key in batches of batch_size; what is left over comes at the end."""
    waiting: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        batch = waiting[key(item)]
        batch.append(item)
        if len(batch) == batch_size:
            yield list(batch)
            batch.clear()
    yield from (batch for batch in waiting.values() if batch)
