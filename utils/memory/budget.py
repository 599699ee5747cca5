"""How many exemplars of each form a budget holds.

A quota is (form, exemplars of a class in that form); the quotas of a class, such as [("real", 18), ("edges", 48)], cut
its exemplars in order of choice: the first 18 stay real, the next 48 are kept as edge maps.
"""

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from utils.data.classes import REAL
from utils.errors import UserError
from utils.memory.forms import ExemplarForm
from utils.memory.packed import ClassShare, Row, row_of

log = logging.getLogger(__name__)

Quotas = Sequence[tuple[str, int]]

ROUNDING = 1e-9  # of a sum of costs, in units

FILL = 2**31
"""A quota's number that stands for "as many as the rest of the budget holds"."""


def counts_within(units: float, quotas: Quotas, costs: Mapping[str, float]) -> list[int]:
    """How many whole exemplars of each form `units` hold, in the ratio of the quotas.

    costs: units of one exemplar, by form.  With f = units / sum(n x cost) it is floor(n f) for each quota n: 2,000
    units over 100 classes are 20 each, for 18 real and 48 edges (1/24) exactly 18 and 48; over 40 classes they are 50
    each, 45 and 120.
    """
    whole = _units(quotas, costs)
    factor = units / whole if whole else 0.0
    return [int(number * factor + ROUNDING) for _, number in quotas]


def moved_boundaries(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The numbers of exemplars in each form when a class's share shrinks from `before` to `after`.

    Boundaries between forms only move towards the start: of 2 real exemplars and 6 edge maps, a share of 1 and 3 leaves
    1 and 3; of 2 and 1, a share of 1 and 4 leaves 1 and 2, as there are but three.
    """
    ends = np.minimum(np.cumsum(before), np.cumsum(after))
    return np.diff(ends, prepend=0).tolist()


def check_budget(quotas: Quotas, budget: float | None, costs: Mapping[str, float]) -> None:
    """Raises UserError, with the arithmetic, if the quotas cost more than the budget.

    budget: units per class, None for no limit; costs: units of one exemplar, by form.
    """
    for form, number in quotas:
        if number < 0:
            raise UserError(f"{number} exemplars of form {form!r}: the number can't be negative.")
    units = _units(quotas, costs)
    if budget is not None and units > budget + ROUNDING:
        raise UserError(
            f"over the memory budget of a class: {_in_words(quotas, costs)} = {units:.2f} units > {budget:g}. "
            "Lower real_per_class or syn_per_class, or raise memory_per_class."
        )


def check_bytes(quotas: Quotas, budget: int, sizes: Mapping[str, int], index: int, least: int = 1) -> None:
    """Raises UserError, with the arithmetic, if a typical class's exemplars take more bytes than its budget.

    quotas: a number may be FILL; sizes: typical bytes of an exemplar, by form; index: bytes of a class beside its
    exemplars; least: exemplars that the method needs.
    """
    wanted = [(form, number) for form, number in quotas if number]
    needed, rest = index, least
    for form, number in wanted:
        # of a form that fills the rest, only what the method needs
        count = min(number, max(rest, 0)) if number == FILL else number
        needed += count * sizes[form]
        rest -= number
    if needed > budget:
        words = [f"{f'at least {least}' if n == FILL else n} {form} x {sizes[form]:,}" for form, n in wanted]
        raise UserError(
            f"over the memory budget of a class: {' + '.join(words)} + {index:,} for the class's text and index = "
            f"{needed:,} bytes > {budget:,}, by the median of its exemplars. "
            "Lower real_per_class or syn_per_class, or raise memory_bytes_per_class."
        )


def check_smallest(images: Sequence[Sequence[Path]], budget: int, shares: Sequence[ClassShare]) -> None:
    """Raises UserError if there is a class of which not one image file has room in a budget in bytes.

    images, shares: of each class; shares without exemplars.
    """
    needed = {}  # folder of a class -> bytes with its smallest image
    for class_images, share in zip(images, shares, strict=True):
        size = min(image.stat().st_size for image in class_images)
        needed[class_images[0].parent] = share.plus(REAL, Row(size)).bytes
    if too_large := [folder for folder, size in needed.items() if size > budget]:
        raise UserError(
            f"{too_large[0]}: not one image fits in memory_bytes_per_class = {budget:,}. "
            f"Raise it to at least {max(needed.values())}, or take a form that needs fewer bytes (syn_form)."
        )


def fitting(
    images: Sequence[Path], quotas: Quotas, forms: Mapping[str, ExemplarForm], share: ClassShare, budget: int
) -> list[int]:
    """How many of a class's images, in order of choice, each quota holds within a budget in bytes.

    share: of the class without exemplars.  The first image that does not fit ends its quota: the rest of the budget
    goes to the next form.  Raises UserError if not one exemplar fits.
    """
    counts, first = [], 0
    for form, number in quotas:
        count = 0
        for image in images[first : first + number]:
            larger = share.plus(form, row_of(form, image, forms[form].expected_bytes(image)))
            if larger.bytes > budget:
                break
            share, count = larger, count + 1
        counts.append(count)
        first += count
    if images and not first:
        raise UserError(
            f"{images[0].parent}: not one exemplar fits in memory_bytes_per_class = {budget:,} bytes. Raise it, or "
            "take a form that needs fewer."
        )
    return counts


def check_total(total: float, nb_classes: int, quotas: Quotas, costs: Mapping[str, float], least: int = 1) -> None:
    """Raises UserError if `total` units, shared by `nb_classes` classes, hold less than `least` exemplars for each."""

    def is_enough(units: float) -> bool:
        return sum(counts_within(units / nb_classes, quotas, costs)) >= least

    if not is_enough(total):
        few = "not one exemplar" if least == 1 else f"less than the {least} exemplars that the method needs"
        ratio = " to ".join(f"{number} {form}" for form, number in quotas)
        enough = next(filter(is_enough, range(int(total) + 1, 100 * nb_classes * least)), None)
        raise UserError(
            f"memory_size = {total:g} units are {total / nb_classes:.3g} for each of {nb_classes} classes: {few} in "
            f"the ratio of {ratio}. Raise memory_size{'' if enough is None else f' to at least {enough}'}."
        )


def warn_of_small_classes(sizes: Mapping[str, int], quotas: Quotas) -> None:
    """Log a warning if classes have fewer train images than exemplars.  sizes: number of images by class label."""
    limited = [(form, number) for form, number in quotas if number != FILL]
    wanted = sum(number for _, number in limited)
    short = sorted((count, label) for label, count in sizes.items() if count < wanted)
    if short:
        more = f" ({len(short)} classes are smaller than that)" if len(short) > 1 else ""
        numbers = " + ".join(f"{number} {form}" for form, number in limited)
        log.warning(
            "class %r has %d train images, fewer than %s exemplars%s: it keeps what it has.",
            *(short[0][1], short[0][0], numbers, more),
        )


def _units(quotas: Quotas, costs: Mapping[str, float]) -> float:
    return sum(number * costs[form] for form, number in quotas if number)


def _in_words(quotas: Quotas, costs: Mapping[str, float]) -> str:
    """Such as "18 real + 48 edges x 1/24"."""
    cost = {form: Fraction(costs.get(form, 1)).limit_denominator(10_000) for form, _ in quotas}
    return " + ".join(f"{n} {form}" if cost[form] == 1 else f"{n} {form} x {cost[form]}" for form, n in quotas)
