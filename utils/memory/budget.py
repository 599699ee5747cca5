"""What exemplars cost in units, and how many of them a budget holds."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from utils.data.images import image_bits
from utils.errors import UserError

ROUNDING = 1e-9  # of a sum of costs, in units


def share(units: float, real: int, synthetic: int, cost: float) -> tuple[int, int]:
    """How many (real, synthetic) exemplars `units` hold, in the ratio R : S and no more than whole ones.

    real: R; synthetic: S; cost: units of one synthetic exemplar.  With f = units / (R + S x cost) these are
    floor(R f) and floor(S f): 2,000 units over 100 classes are 20 each, for R = 18, S = 48 and 1/24 exactly 18 and 48;
    over 40 classes they are 50 each, 45 and 120.
    """
    factor = units / (real + synthetic * cost) if real or synthetic else 0.0
    return int(real * factor + ROUNDING), int(synthetic * factor + ROUNDING)


def prompt_cost(image: Path, edge_map: Path | None = None) -> float:
    """Units that an image's prompt costs: bits of its edge map over bits of the image, from the headers of both files.

    An edge map has one bit per pixel, also where an older file spends eight on it.  Without an edge map, the cost is
    that of one as large as the image.
    Raises UserError naming a file that can't be read.
    """
    try:
        width, height, depth = image_bits(image)
        if edge_map is None:
            return 1 / depth
        map_width, map_height, _ = image_bits(edge_map)
    except OSError as error:
        raise UserError(f"cannot read image {error}. Replace the file or take it away.") from error
    return map_width * map_height / (width * height * depth)


def check_budget(real: int, synthetic: int, budget: float | None, cost: float = 1 / 24) -> None:
    """Raises UserError, with the arithmetic, where R + S x cost > B.

    real: R; synthetic: S; budget: B in units per class, None for no limit; cost: units of one synthetic exemplar.
    """
    for name, number in (("real_per_class", real), ("syn_per_class", synthetic)):
        if number < 0:
            raise UserError(f"{name} is {number}: it can't be less than 0.")
    units = real + synthetic * cost
    if budget is None or units <= budget + ROUNDING:
        return
    asked = f"{real} real + {synthetic} synthetic x {Fraction(cost).limit_denominator(10_000)}"
    raise UserError(
        f"over the memory budget of a class: {asked} = {units:.2f} units > {budget:g}. "
        "Lower real_per_class or syn_per_class, or raise memory_per_class."
    )


def check_total(total: float, nb_classes: int, real: int, synthetic: int, cost: float = 1 / 24, least: int = 1) -> None:
    """Raises UserError where `total` units, shared by `nb_classes` classes, leave less than `least` exemplars each."""
    if sum(share(total / nb_classes, real, synthetic, cost)) < least:
        few = "not one exemplar" if least == 1 else f"less than {least} exemplars, which the method needs,"
        raise UserError(
            f"memory_size = {total:g} units are {total / nb_classes:.3g} for each of {nb_classes} classes: {few} "
            f"in the ratio of {real} real to {synthetic} synthetic. Raise memory_size."
        )


def check_class_sizes(sizes: Mapping[str, int], real: int, synthetic: int) -> None:
    """Raises UserError where a class has fewer than R + S train images, so that this shows before any training.

    sizes: number of train images by class label.
    """
    short = sorted((count, label) for label, count in sizes.items() if count < real + synthetic)
    if short:
        count, label = short[0]
        more = f" ({len(short)} classes are too small)" if len(short) > 1 else ""
        raise UserError(
            f"class {label!r} has {count} train images, fewer than {real} real + {synthetic} synthetic exemplars{more}."
            " Lower real_per_class or syn_per_class."
        )
