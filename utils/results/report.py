"""What a run leaves: results.json, phases.csv, confusion matrices, accuracy.png; and tables that compare runs.

    python -m utils.results.report FOLDER [NAME=FOLDER ...] [--plot accuracy.png] [--html page.html]

results.json (accuracies in percent, seconds, bytes):
    config     the configuration as used
    runs       one entry a seed:
        seed, finished, class_names (in the order in which the classes came)
        phases     one entry a phase: phase, classes_seen; cnn and nme (null where unused), each with top1, top5, old,
                   new, per_class {label: accuracy}, per_phase [accuracy on the classes of phase 0, 1, ...],
                   per_ten [accuracy on each ten classes]; student (FOSTER's, from phase 1 on), svm (FeTrIL's), as cnn;
                   memory (`utils.memory.ExemplarMemory.report`); parameters (all of the network); training (epochs,
                   loss, accuracy of the first stage, seconds of all, reused, stages: stage, epochs, loss, accuracy);
                   copies_on_demand (number made, null where all were made ahead); copies (what made those in use:
                   made_by {settings, ...}, generator (the model's name or file), files, digest; null where none is
                   used);
                   seconds {train, exemplars, evaluate, total}
        cnn, nme, student, svm
                   average_incremental_accuracy; forgetting, forgetting_in_tens (PyCIL's) and backward_transfer
                   (null after one phase); top1 (a list, by phase); per_class {label: [accuracy by phase, null before
                   the class was learnt]}; or null
        memory     of the last phase
        seconds    of all phases; seconds_reused: what training the reused network of phase 0 had taken, not in it
    summary    over the finished seeds, null where there is none: seeds, classes_seen; cnn and nme (null where unused)
               with average_incremental_accuracy, both kinds of forgetting, backward_transfer and top1 by phase; units,
               bytes, seconds.  Each figure is a mean and a std (standard deviation, n - 1; 0 for one seed).
It is written anew after each phase; phases that are not done yet are not in it.

phases.csv has the same figures for a spreadsheet, a row a phase: PHASE_COLUMNS below; empty where there is none.
epochs.csv and TensorBoard's event files: `utils.results.history`.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from pydantic import BaseModel, ValidationError

from utils import cli, json_files
from utils.data.images import write_atomically
from utils.errors import UserError
from utils.results.history import write_csv
from utils.results.metrics import average_incremental_accuracy, backward_transfer, forgetting, forgetting_in_tens
from utils.results.show import CLASSIFIERS, plot, printable, table

PHASE_COLUMNS = (
    *("seed", "phase", "classes_seen"),
    *(f"{classifier}_{key}" for classifier in ("cnn", "nme") for key in ("top1", "top5", "old", "new")),
    *("units", "bytes", "parameters", "loss", "train_accuracy", "train_seconds", "seconds"),
)
"""Accuracies in percent; units and bytes of the exemplar memory; loss and train_accuracy of the last training epoch;
seconds of training and of the whole phase."""


def run_entry(seed: int, class_names: Sequence[str], records: Sequence[Mapping], nb_phases: int) -> dict[str, Any]:
    """One seed's part of results.json, from the records of its learner."""
    phases = []
    for record in records:
        entry = dict(record)
        for classifier in CLASSIFIERS:
            if (metrics := record.get(classifier)) is not None:
                named = dict(zip(class_names, metrics["per_class"], strict=False))
                entry[classifier] = {**metrics, "per_class": named}
                del entry[classifier]["confusion"]
        phases.append(entry)
    trainings = [record["training"] for record in records]
    return {
        "seed": seed,
        "finished": len(records) == nb_phases,
        "class_names": list(class_names),
        "phases": phases,
        "cnn": _over_phases(records, "cnn", class_names),
        "nme": _over_phases(records, "nme", class_names),
        **_further(records, class_names),
        "memory": records[-1]["memory"],
        "seconds": sum(record["seconds"]["total"] for record in records),
        "seconds_reused": sum(training["seconds"] for training in trainings if training["reused"]),
    }


def _further(records: Sequence[Mapping], class_names: Sequence[str]) -> dict[str, Any]:
    """The figures of the classifiers that a method has beside head and nearest means.

    Where a phase has none, it is the head: in phase 0 FOSTER's student is the network itself.
    """
    figures = {}
    for name in CLASSIFIERS:
        if name not in ("cnn", "nme") and any(name in record for record in records):
            filled = [{name: record.get(name, record["cnn"])} for record in records]
            figures[name] = _over_phases(filled, name, class_names)
    return figures


def _over_phases(records: Sequence[Mapping], classifier: str, class_names: Sequence[str]) -> dict[str, Any] | None:
    if any(record[classifier] is None for record in records):
        return None
    metrics = [record[classifier] for record in records]
    top1 = [of_phase["top1"] for of_phase in metrics]
    per_phase = [of_phase["per_phase"] for of_phase in metrics]
    curves = itertools.zip_longest(*(of_phase["per_class"] for of_phase in metrics))
    return {
        "average_incremental_accuracy": average_incremental_accuracy(top1),
        "forgetting": forgetting(per_phase),
        "forgetting_in_tens": forgetting_in_tens([of_phase.get("per_ten", []) for of_phase in metrics]),
        "backward_transfer": backward_transfer(per_phase),
        "top1": top1,
        "per_class": {name: list(curve) for name, curve in zip(class_names, curves, strict=False)},
    }


def results(config: Mapping[str, Any], runs: Sequence[Mapping]) -> dict[str, Any]:
    """The whole of results.json."""
    return {"config": dict(config), "runs": list(runs), "summary": summary([run for run in runs if run["finished"]])}


def summary(runs: Sequence[Mapping]) -> dict[str, Any] | None:
    """Mean and spread over seeds, or None where no seed is finished."""
    if not runs:
        return None
    out: dict[str, Any] = {
        "seeds": [run["seed"] for run in runs],
        "classes_seen": [phase["classes_seen"] for phase in runs[0]["phases"]],
    }
    for classifier in CLASSIFIERS:
        if not all(classifier in run for run in runs):
            continue
        entries = [run[classifier] for run in runs]
        out[classifier] = None
        if None not in entries:
            keys = ("average_incremental_accuracy", "forgetting", "forgetting_in_tens", "backward_transfer", "top1")
            out[classifier] = {key: _mean_std([entry.get(key) for entry in entries]) for key in keys}
    out["units"] = _mean_std([run["memory"]["units_total"] for run in runs])
    out["bytes"] = _mean_std([run["memory"]["bytes_total"] for run in runs])
    out["seconds"] = _mean_std([run["seconds"] + run["seconds_reused"] for run in runs])
    return out


def _mean_std(values: Sequence) -> dict[str, Any] | None:
    if any(value is None for value in values):
        return None
    array = np.asarray(values, dtype=float)
    std = array.std(axis=0, ddof=1) if len(array) > 1 else np.zeros(array.shape[1:])
    return {"mean": array.mean(axis=0).tolist(), "std": std.tolist()}


def write_json(path: Path, content: Any) -> None:
    """Indented, readable in UTF-8, in one piece or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """UTF-8, in one piece or not at all."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_confusion(path: Path, confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
    """A confusion matrix as CSV: a row a true class, a column a predicted one, counts of test images."""
    names, rows = list(class_names[: len(confusion)]), np.asarray(confusion).tolist()
    write_csv(path, ["true \\ predicted", *names], [[name, *row] for name, row in zip(names, rows, strict=True)])


def write_phases(path: Path, runs: Sequence[Mapping]) -> None:
    """phases.csv, from the runs of results.json."""
    rows = []
    for run in runs:
        for phase in run["phases"]:
            row = {key: phase[key] for key in ("phase", "classes_seen", "parameters")}
            for classifier in ("cnn", "nme"):
                for key in ("top1", "top5", "old", "new"):
                    row[f"{classifier}_{key}"] = (phase[classifier] or {}).get(key)
            row |= {"seed": run["seed"], "units": phase["memory"]["units_total"]}
            row |= {"bytes": phase["memory"]["bytes_total"], "seconds": phase["seconds"]["total"]}
            row |= {"loss": phase["training"]["loss"], "train_accuracy": phase["training"]["accuracy"]}
            row["train_seconds"] = phase["seconds"]["train"]
            rows.append([row[column] for column in PHASE_COLUMNS])
    write_csv(path, PHASE_COLUMNS, rows)


class _Memory(BaseModel):
    units_total: float | None
    bytes_total: float


class _Phase(BaseModel):
    classes_seen: int
    cnn: dict[str, Any]
    nme: dict[str, Any] | None
    memory: _Memory
    training: dict[str, Any]
    seconds: dict[str, Any]
    parameters: int


class _OverPhases(BaseModel):
    average_incremental_accuracy: float
    forgetting: float | None
    top1: list[float]


class _Run(BaseModel):
    seed: int
    finished: bool
    class_names: list[str]
    phases: Annotated[list[_Phase], MinLen(1)]
    cnn: _OverPhases
    nme: _OverPhases | None
    student: _OverPhases | None = None
    memory: _Memory
    seconds: float
    seconds_reused: float


class _Results(BaseModel):
    """What tables and pages read of results.json, without the keys that earlier versions did not write."""

    config: dict[str, Any]
    runs: list[_Run]


def read_results(file: Path) -> dict[str, Any]:
    """The content of a results.json.  Raises UserError for a file that is none."""
    content = json_files.read(file)
    try:
        _Results.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise UserError(f"{file} is no results.json of this program ({where}: {fault['msg']}).") from None
    return content


def load_results(folder: Path) -> dict[str, Any]:
    """results.json of an output folder (or the file itself).

    Where no class order is finished, `summary` is over those that are farthest, and `unfinished` is the number of their
    phases.  Raises UserError where no phase is finished.
    """
    path = folder / "results.json" if folder.is_dir() else folder
    content = read_results(path)
    runs = content["runs"]
    if not runs:
        raise UserError(f"{path} has no finished phase yet.")
    finished = [run for run in runs if run["finished"]]
    phases = max(len(run["phases"]) for run in runs)
    farthest = finished or [run for run in runs if len(run["phases"]) == phases]
    if len({len(run["phases"]) for run in farthest}) > 1:
        raise UserError(f"{path}: its class orders have different numbers of phases; they are of several experiments.")
    content = {**content, "summary": summary(farthest)}
    return content if finished else {**content, "unfinished": phases}


def write_page(folders: Mapping[str, Path], file: Path, title: str = "", notes: Sequence[str] = ()) -> None:
    """One HTML page of some output folders, by name.

    notes: paragraphs below the title.  Raises UserError for a folder without a finished phase.
    """
    from utils.results.page import page  # imports Jinja2 and, for figures, matplotlib

    runs = {printable(name): (at if at.is_dir() else at.parent, load_results(at)) for name, at in folders.items()}
    write_text(file, page(runs, title, notes, file=file))


def named_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """The output folders by the names that a table gives them.

    [NAME=]FOLDER each; without a name it is the folder's, with as many of the folders above as make it unique.
    """
    folders = []
    for text in arguments:
        name, equals, path = text.partition("=")
        named = equals and not Path(text).expanduser().exists()
        folders.append((name if named else None, Path(path if named else text).expanduser()))
    named: dict[str, Path] = {}
    for given, folder in folders:
        alike = [other for name, other in folders if name is None and other.resolve().name == folder.resolve().name]
        parts, depth = folder.resolve().parts, 1
        while len({other.resolve().parts[-depth:] for other in alike}) < len(set(map(Path.resolve, alike))):
            depth += 1
        name = base = given or "/".join(parts[-depth:])
        number = 1
        while name in named:
            number += 1
            name = f"{base} ({number})"
        named[name] = folder
    return named


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the results of several output folders.  Returns the exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv))


def command(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.results.report", description="Compare runs of main.py.")
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER", help="an output folder of main.py")
    parser.add_argument("--plot", type=cli.output_file, metavar="FILE.png", help="also draw the accuracy curves")
    parser.add_argument(
        "--html", type=cli.output_file, metavar="FILE.html", help="also write one page with all that is known"
    )
    arguments = parser.parse_args(argv)
    folders = named_folders(arguments.runs)
    runs = {name: load_results(folder) for name, folder in folders.items()}
    print(cli.visible(table(runs)))
    if arguments.plot:
        plot(runs, arguments.plot)
    if arguments.html:
        write_page(folders, arguments.html)


if __name__ == "__main__":
    sys.exit(main())
