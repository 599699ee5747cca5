"""What a run records: results.json, as typed records.  Accuracies in percent, times in seconds, sizes in bytes.

A field that is not set is not written, and keys that this version does not know are kept, so that files of earlier and
later versions are read and written again as they are.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from utils.errors import UserError
from utils.files import load_json
from utils.results.metrics import average_incremental_accuracy, backward_transfer, forgetting, forgetting_in_tens

Classifier = Literal["cnn", "nme", "student", "svm"]
CLASSIFIERS: dict[Classifier, str] = {"cnn": "CNN", "nme": "NME", "student": "student", "svm": "SVM"}
"""Keys of classifiers -> their names in tables.  cnn: the head; nme: nearest means of exemplars; student: FOSTER's
compressed network, from phase 1 on; svm: FeTrIL's second classifier."""


class Record(BaseModel):
    model_config = ConfigDict(extra="allow")

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


Figures = TypeVar("Figures")


class ByClassifier(Record, Generic[Figures]):
    """Something of each classifier; None, or not set, where it is not used."""

    cnn: Figures
    nme: Figures | None = None
    student: Figures | None = None
    svm: Figures | None = None

    @property
    def classifiers(self) -> dict[Classifier, Figures]:
        """Those that are used."""
        return {name: figures for name in CLASSIFIERS if (figures := getattr(self, name)) is not None}


class Metrics(Record):
    """A classifier after a phase, on the test images of all C classes seen.

    top1, top5 (100 where C <= 5), old, new: over all images, over those of earlier phases (None in phase 0), and over
    the newest phase's; per_class: by label, in the order of learning; per_phase: over the images of each phase's
    classes; per_ten: over those of each ten classes in this order; confusion: C x C counts, rows are the true classes;
    in checkpoints and files of its own, not in results.json.
    """

    top1: float
    top5: float | None = None
    old: float | None = None
    new: float | None = None
    per_class: dict[str, float] = {}
    per_phase: list[float] = []
    per_ten: list[float] = []
    confusion: Any = Field(default=None, exclude=True)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], class_names: Sequence[str]) -> "Metrics":
        """state: with the accuracies per class as a list, as in checkpoints."""
        return cls.model_validate({**state, "per_class": dict(zip(class_names, state["per_class"], strict=False))})


class FormMemory(Record):
    """What the exemplars of one form take.  units: None where the paper does not count the form."""

    form: str
    exemplars: int
    units: float | None
    bytes: int


class Memory(Record):
    """The exemplar memory (`ExemplarMemory.report`); units: raw bits over the raw bits of a real image."""

    units_total: float | None
    bytes_total: int
    bytes_per_class_max: int | None = None
    nb_real: int = 0
    nb_synthetic: int = 0
    forms: list[FormMemory] = []


class Stage(Record):
    """One stage of a phase's training, such as FOSTER's compression; loss and accuracy: of its last epoch."""

    stage: str
    epochs: int
    loss: float | None
    accuracy: float | None


class Training(Record):
    """epochs, loss, accuracy: of the first stage; seconds: of all; reused: whether phase 0 is another run's network."""

    epochs: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    stages: list[Stage] = []
    seconds: float = 0.0
    reused: bool = False


class MadeBy(Record):
    """settings: those recorded beside the copies of `classes` classes, None where there are none."""

    classes: int | None = None
    settings: dict[str, Any] | None


class Copies(Record):
    """What made the copies in use.  generator: the model's name or file; digest: of all copies."""

    made_by: list[MadeBy]
    generator: str | None = None
    files: int
    digest: str


class Seconds(Record):
    train: float = 0.0
    exemplars: float = 0.0
    evaluate: float = 0.0
    total: float = 0.0


class Phase(ByClassifier[Metrics]):
    """One phase.  parameters: of all of the network; copies_on_demand: number made, None where all were made ahead."""

    phase: int = 0
    classes_seen: int
    memory: Memory
    parameters: int
    training: Training
    copies_on_demand: int | None = None
    copies: Copies | None = None
    seconds: Seconds

    @classmethod
    def from_state(cls, state: Mapping[str, Any], class_names: Sequence[str]) -> "Phase":
        """state: what `state` returned."""
        classifiers = {name: Metrics.from_state(state[name], class_names) for name in CLASSIFIERS if state.get(name)}
        return cls.model_validate({**state, **classifiers})

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values, and confusion matrices as tensors."""
        state = self.to_json()
        for name, metrics in self.classifiers.items():
            state[name] |= {"per_class": list(metrics.per_class.values()), "confusion": metrics.confusion}
        return state


class OverPhases(Record):
    """A classifier over the phases of a class order.  top1: by phase; per_class: label -> accuracy by phase, None
    before the class was learnt; forgetting and the like: None after one phase."""

    average_incremental_accuracy: float
    forgetting: float | None
    forgetting_in_tens: float | None = None
    backward_transfer: float | None = None
    top1: list[float]
    per_class: dict[str, list[float | None]] = {}


class ClassOrder(ByClassifier[OverPhases]):
    """One class order.  class_names: in the order of learning; memory: after the last phase; seconds_reused: what the
    training of the reused network of phase 0 had taken, not in seconds."""

    seed: int
    finished: bool
    class_names: list[str]
    phases: Annotated[list[Phase], MinLen(1)]
    memory: Memory
    seconds: float
    seconds_reused: float

    @classmethod
    def of(cls, seed: int, class_names: Sequence[str], phases: Sequence[Phase], nb_phases: int) -> "ClassOrder":
        """phases: those that are done; nb_phases: of all."""
        used = {"cnn", "nme", *(name for phase in phases for name in phase.classifiers)}
        return cls.model_validate(
            {
                "seed": seed,
                "finished": len(phases) == nb_phases,
                "class_names": list(class_names),
                "phases": list(phases),
                **{name: _over_phases(phases, name, class_names) for name in CLASSIFIERS if name in used},
                "memory": phases[-1].memory,
                "seconds": sum(phase.seconds.total for phase in phases),
                "seconds_reused": sum(phase.training.seconds for phase in phases if phase.training.reused),
            }
        )


def _over_phases(phases: Sequence[Phase], classifier: Classifier, class_names: Sequence[str]) -> OverPhases | None:
    """None where nearest means are not used; where another classifier is not, the head stands in, as in phase 0 for
    FOSTER's student."""
    if classifier == "nme" and any(phase.nme is None for phase in phases):
        return None
    by_phase = [phase.classifiers.get(classifier, phase.cnn) for phase in phases]
    top1 = [metrics.top1 for metrics in by_phase]
    per_phase = [metrics.per_phase for metrics in by_phase]
    curves = itertools.zip_longest(*(metrics.per_class.values() for metrics in by_phase))
    return OverPhases(
        average_incremental_accuracy=average_incremental_accuracy(top1),
        forgetting=forgetting(per_phase),
        forgetting_in_tens=forgetting_in_tens([metrics.per_ten for metrics in by_phase]),
        backward_transfer=backward_transfer(per_phase),
        top1=top1,
        per_class={name: list(curve) for name, curve in zip(class_names, curves, strict=False)},
    )


class Spread(Record):
    """Mean and standard deviation (n - 1; 0 for one) over class orders."""

    mean: float
    std: float


class Curve(Record):
    """The same by phase."""

    mean: list[float]
    std: list[float]


def _spread(values: Sequence[Any]) -> dict[str, Any] | None:
    """Of numbers, or of curves of equal length; None where one is None."""
    if any(value is None for value in values):
        return None
    array = np.asarray(values, dtype=float)
    std = array.std(axis=0, ddof=1) if len(array) > 1 else np.zeros(array.shape[1:])
    return {"mean": array.mean(axis=0).tolist(), "std": std.tolist()}


class Averages(Record):
    """A classifier over class orders; figures as in OverPhases."""

    average_incremental_accuracy: Spread
    forgetting: Spread | None
    forgetting_in_tens: Spread | None
    backward_transfer: Spread | None
    top1: Curve

    @classmethod
    def of(cls, orders: Sequence[OverPhases | None]) -> "Averages | None":
        if None in orders:
            return None
        return cls.model_validate({key: _spread([getattr(order, key) for order in orders]) for key in cls.model_fields})


class Summary(ByClassifier[Averages]):
    """Over class orders (seeds).  seconds: with the training of phase 0 also where a network was reused."""

    seeds: list[int]
    classes_seen: list[int]
    units: Spread | None
    bytes: Spread
    seconds: Spread

    @classmethod
    def of(cls, orders: Sequence[ClassOrder]) -> "Summary":
        """orders: at least one, all with the same number of phases."""
        names = [name for name in CLASSIFIERS if all(name in order.model_fields_set for order in orders)]
        return cls.model_validate(
            {
                "seeds": [order.seed for order in orders],
                "classes_seen": [phase.classes_seen for phase in orders[0].phases],
                **{name: Averages.of([getattr(order, name) for order in orders]) for name in names},
                "units": _spread([order.memory.units_total for order in orders]),
                "bytes": _spread([order.memory.bytes_total for order in orders]),
                "seconds": _spread([order.seconds + order.seconds_reused for order in orders]),
            }
        )


class ResultsFile(Record):
    """results.json.  It is written anew after each phase; phases that are not done yet are not in it.

    config: as used; runs: the class orders; summary: over those that are finished, None where none is.
    """

    config: dict[str, Any]
    runs: list[ClassOrder]
    summary: Summary | None

    @classmethod
    def of(cls, config: Mapping[str, Any], orders: Sequence[ClassOrder]) -> "ResultsFile":
        finished = [order for order in orders if order.finished]
        return cls(config=dict(config), runs=list(orders), summary=Summary.of(finished) if finished else None)

    def compared(self) -> "Results":
        """With a summary also where no class order is finished.  Raises ValueError where there is none to be had."""
        finished = [order for order in self.runs if order.finished]
        phases = max((len(order.phases) for order in self.runs), default=0)
        farthest = finished or [order for order in self.runs if len(order.phases) == phases]
        if not farthest:
            raise ValueError("has no finished phase yet.")
        if len({len(order.phases) for order in farthest}) > 1:
            raise ValueError("its class orders have different numbers of phases; they are of several experiments.")
        summary, unfinished = Summary.of(farthest), 0 if finished else phases
        return Results(config=self.config, runs=self.runs, summary=summary, unfinished=unfinished)


class Results(ResultsFile):
    """Results that can be compared.  unfinished: 0, or, where no class order is finished, the number of phases of those
    that are farthest, which the summary is over."""

    summary: Summary
    unfinished: int = Field(default=0, exclude=True)

    @property
    def orders(self) -> list[ClassOrder]:
        """The class orders that the summary covers."""
        return [order for order in self.runs if order.seed in self.summary.seeds]


def read_results(file: Path) -> ResultsFile:
    """The content of a results.json.  Raises UserError for a file that is none."""
    content = load_json(file)
    try:  # without the summary, which is worked out anew: earlier versions had less in it
        return ResultsFile.model_validate({**content, "summary": None} if isinstance(content, dict) else content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise UserError(f"{file} is no results.json of this program ({where}: {fault['msg']}).") from None


def load_results(folder: Path) -> Results:
    """results.json of an output folder (or the file itself).  Raises UserError where no phase is finished."""
    path = folder / "results.json" if folder.is_dir() else folder
    content = read_results(path)
    try:
        return content.compared()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
