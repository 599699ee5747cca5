"""What an exemplar memory takes, in units and in bytes."""

from typing import Any

from utils.data.items import REAL


def report(memory) -> dict[str, Any]:
    """Of an `ExemplarMemory`, as a dict.

    units_per_class_mean, units_per_class_max, units_total (all None where a form has no such count), units_budget
    (per class at present, None for no limit), units_budget_total (of all classes in memory), bytes_per_class_max,
    bytes_budget (of a class, None for a budget in units); forms: for each form its name, number of exemplars,
    units, bytes of its part of the memory's file (index and payloads), and how many are missing on disk, which
    therefore add no bytes; bytes_names: of the classes' labels and texts; bytes_total: of both, which is the file
    without its header; bytes_if_all_real: were all kept as image files.  As sums over the forms: nb_real, bytes_real,
    and of all others nb_synthetic, bytes_prompts, edge_maps_missing.
    """
    kept = [(form, image) for target in memory.targets for form, image in memory.of(target)]
    counted = all(memory.cost(form, image) is not None for form, image in kept)
    units = [memory.units(target) for target in memory.targets] if counted else None
    shares = [memory.shares(target)[-1] for target in memory.targets if memory.of(target)]
    names = sum(share.names for share in shares)
    rows = [_row(memory, shares, form) for form in dict.fromkeys(form for form, _ in memory.quotas)]
    real, other = ([row for row in rows if (row["form"] == REAL) == is_real] for is_real in (True, False))

    def total(of_forms: list[dict[str, Any]], key: str) -> int:
        return sum(row[key] for row in of_forms)

    budget_total = memory.total
    if memory.total is None and memory.budget:
        budget_total = memory.budget * len(memory.targets)
    return {
        "units_per_class_mean": (sum(units) / len(units) if units else 0.0) if counted else None,
        "units_per_class_max": max(units, default=0.0) if counted else None,
        "units_total": float(sum(units)) if counted else None,
        "units_budget": memory.budget,
        "units_budget_total": budget_total,
        "bytes_per_class_max": max((memory.bytes(target) for target in memory.targets), default=0),
        "bytes_budget": memory.bytes_budget,
        "forms": rows,
        "nb_real": total(real, "exemplars"),
        "nb_synthetic": total(other, "exemplars"),
        "bytes_real": total(real, "bytes"),
        "bytes_prompts": total(other, "bytes"),
        "bytes_names": names,
        "bytes_total": total(rows, "bytes") + names,
        "bytes_if_all_real": sum(memory.file_bytes[image.parent.name, image.name] for _, image in kept),
        "edge_maps_missing": total(other, "missing"),
    }


def _row(memory, shares, form: str) -> dict[str, Any]:
    """A form's row."""
    images = [image for target in memory.targets for its_form, image in memory.of(target) if its_form == form]
    units = [memory.cost(form, image) for image in images]
    return {
        "form": form,
        "exemplars": len(images),
        "units": None if None in units else float(sum(units)),
        "bytes": sum(each.bytes for share in shares for each in share.forms if each.form == form),
        "missing": sum(each.missing for share in shares for each in share.forms if each.form == form),
    }
