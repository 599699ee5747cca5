"""What an exemplar memory takes, in units and in bytes."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from utils.data.items import REAL

if TYPE_CHECKING:
    from utils.memory.exemplars import ExemplarMemory


@dataclass(frozen=True)
class FormReport:
    """The exemplars of one form.

    units: None where the form has no such count; bytes: of their part of the memory's file, index and payloads;
    missing: exemplars of which no file is on disk, which therefore add no bytes.
    """

    form: str
    exemplars: int
    units: float | None
    bytes: int
    missing: int


@dataclass(frozen=True)
class MemoryReport:
    """units: of each class, None where a form has no such count; units_budget: of a class at present, None for no
    limit; units_budget_total: of all classes in memory; class_bytes: of each class; bytes_budget: of a class, None for
    a budget in units; bytes_names: of the classes' labels and texts; bytes_if_all_real: were all kept as image files.
    """

    units: list[float] | None
    units_budget: float | None
    units_budget_total: float | None
    class_bytes: list[int]
    bytes_budget: int | None
    forms: list[FormReport]
    bytes_names: int
    bytes_if_all_real: int

    def to_json(self) -> dict[str, Any]:
        """The keys of results.json.  bytes_total is the memory's file without its header."""
        real = [form for form in self.forms if form.form == REAL]
        others = [form for form in self.forms if form.form != REAL]
        units = self.units
        return {
            "units_per_class_mean": None if units is None else sum(units) / max(len(units), 1),
            "units_per_class_max": None if units is None else max(units, default=0.0),
            "units_total": None if units is None else float(sum(units)),
            "units_budget": self.units_budget,
            "units_budget_total": self.units_budget_total,
            "bytes_per_class_max": max(self.class_bytes, default=0),
            "bytes_budget": self.bytes_budget,
            "forms": [asdict(form) for form in self.forms],
            "nb_real": sum(form.exemplars for form in real),
            "nb_synthetic": sum(form.exemplars for form in others),
            "bytes_real": sum(form.bytes for form in real),
            "bytes_prompts": sum(form.bytes for form in others),
            "bytes_names": self.bytes_names,
            "bytes_total": sum(form.bytes for form in self.forms) + self.bytes_names,
            "bytes_if_all_real": self.bytes_if_all_real,
            "edge_maps_missing": sum(form.missing for form in others),
        }


def measure(memory: "ExemplarMemory") -> MemoryReport:
    """What a memory takes."""
    exemplars = [exemplar for target in memory.targets for exemplar in memory.of(target)]
    shares = [memory.shares(target)[-1] for target in memory.targets if memory.of(target)]
    forms = []
    for form in dict.fromkeys(form for form, _ in memory.quotas):
        costs = [memory.cost(form, image) for other, image in exemplars if other == form]
        in_file = [part for share in shares for part in share.forms if part.form == form]
        known = [cost for cost in costs if cost is not None]
        forms.append(
            FormReport(
                form,
                exemplars=len(costs),
                units=float(sum(known)) if len(known) == len(costs) else None,
                bytes=sum(part.bytes for part in in_file),
                missing=sum(part.missing for part in in_file),
            )
        )
    counted = all(form.units is not None for form in forms)
    total = memory.total
    if total is None and memory.budget:
        total = memory.budget * len(memory.targets)
    return MemoryReport(
        units=[memory.units(target) for target in memory.targets] if counted else None,
        units_budget=memory.budget,
        units_budget_total=total,
        class_bytes=[memory.bytes(target) for target in memory.targets],
        bytes_budget=memory.bytes_budget,
        forms=forms,
        bytes_names=sum(share.names for share in shares),
        bytes_if_all_real=sum(memory.file_bytes[image.parent.name, image.name] for _, image in exemplars),
    )
