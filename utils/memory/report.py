"""What an exemplar memory takes, in units and in bytes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from utils.data.items import REAL
from utils.memory.share import ClassShare


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

    @classmethod
    def of(cls, form: str, costs: Sequence[float | None], shares: Sequence[ClassShare]) -> "FormReport":
        """costs: units of each exemplar; shares: what each class takes in the memory's file."""
        known = [cost for cost in costs if cost is not None]
        units = float(sum(known)) if len(known) == len(costs) else None
        parts = [part for share in shares for part in share.forms if part.form == form]
        return cls(form, len(costs), units, sum(part.bytes for part in parts), sum(part.missing for part in parts))


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
