"""Compares the project's methods with PyCIL's, step by step, in float64.

    python tests/pycil_parity.py tests/reference/pycil_steps.npz [FILE ...] [--methods gem,bic]

The files hold what PyCIL's trainer computed on a small problem, whose pictures are in the first one: the loss and
gradient norm of every optimisation step, and after each phase the logits of the test images, the exemplars and the
class means.  Each run is repeated by the project's own method, through its real phase loop and epoch loop.  It is
given what is random or measured in PyCIL's run, and nothing else: pictures without augmentation, the initial weights of
backbones and heads, which pictures make a batch (and, for BiC and BEEF, which are held out), other random numbers, and
the number of epochs and the learning rate.  Everything else (weight decay, shape of the schedule, losses, memory) is
the method's own.

Prints a row a run with the worst relative differences.  Exit code 0: every run that both have is within 1e-9 (class
means 1e-7, PyCIL adds 1e-8 to norms) and keeps the same exemplars; 1: some run is not; 2: the command is wrong.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.methods import METHODS
from tests.pycil_reference import Pictures, Reference, runs_of
from tests.pycil_replay import Compared, Measured, Unlike, float64, train

TOLERANCE = 1e-9
MEANS_TOLERANCE = 1e-7


@dataclass
class Row:
    """The outcome of a run: worst relative difference by quantity (None where the file or the project has none)."""

    name: str
    differences: dict[str, float | None] = field(default_factory=dict)
    exemplars: str = "-"
    notes: list[str] = field(default_factory=list)
    first: str = ""

    @property
    def agrees(self) -> bool:
        return not self.first and bool(self.differences) and self.exemplars in ("-", "equal")


QUANTITIES = ("loss", "grad_norm", "logits", "snet_logits", "class_means", "gamma")


def relative(theirs: np.ndarray, ours: np.ndarray, *, each: bool) -> float:
    """The largest difference, in proportion to each number (losses), or to the largest number of the array."""
    if theirs.shape != ours.shape or not np.isfinite(ours).all():
        return np.inf
    scale = np.abs(theirs) if each else np.abs(theirs).max(initial=0.0)
    return float(np.max(np.abs(theirs - ours) / (scale + 1e-300), initial=0.0))


def compare_phase(row: Row, phase: int, reference: Reference, ours: Mapping[str, np.ndarray]) -> None:
    for name in QUANTITIES:
        theirs = reference.get(phase, name)
        if theirs is None or (name == "gamma" and reference.method == "foster"):
            continue
        if name not in ours:
            if name == "snet_logits":
                row.first = row.first or f"phase {phase}: no {name}"
                row.differences[name] = np.inf
            continue
        worst = relative(theirs, ours[name], each=name in ("loss", "grad_norm"))
        row.differences[name] = max(row.differences.get(name) or 0.0, worst)
        limit = MEANS_TOLERANCE if name == "class_means" else TOLERANCE
        if worst > limit and not row.first:
            row.first = f"phase {phase}: {name} {worst:.1e}"
            if theirs.shape != ours[name].shape:
                row.first = f"phase {phase}: {name} of shape {ours[name].shape}, PyCIL's {theirs.shape}"
            elif name in ("loss", "grad_norm"):
                at = np.flatnonzero(np.abs(theirs - ours[name]) > TOLERANCE * np.abs(theirs))[0]
                row.first += f", from step {at} on ({ours[name][at]:.6g}, PyCIL {theirs[at]:.6g})"
    theirs = reference.get(phase, "exemplars")
    if theirs is not None and "exemplars" in ours:
        same = theirs.tolist() == ours["exemplars"].tolist()
        row.exemplars = "equal" if same and row.exemplars != "differ" else "differ"
        if not same and not row.first:
            row.first = f"phase {phase}: exemplars differ"


def compare(arrays: Mapping[str, np.ndarray], name: str, pictures: Pictures, nb_phases: int | None = None) -> Row:
    """Repeat a run, or its first phases, and compare it."""
    reference, row, measured = Reference(arrays, name, nb_phases), Row(name), Measured()
    phases, reason = reference.compared
    if reason:
        row.notes.append(f"{reason}; {phases} of {len(reference.sizes)} phases compared")
    with float64(), tempfile.TemporaryDirectory() as scratch:
        hook = register_optimizer_step_pre_hook(measured.on_step)
        try:
            train(reference, pictures, measured, Path(scratch))
        except Compared:
            pass
        except Unlike as unlike:
            row.first = str(unlike)
        finally:
            hook.remove()
    first, row.first = row.first, ""
    for phase, ours in enumerate(measured.phases[:phases]):
        if ours:
            compare_phase(row, phase, reference, ours)
    row.first = row.first or (first if not reason else "")
    return row


def print_row(cells: Sequence[str], last: str) -> None:
    print("".join(f"{cell:<{width}}" for cell, width in zip(cells, (15, *[10] * 6, 11), strict=True)), last, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pycil_parity.py", description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.npz")
    parser.add_argument("--methods", default="", help="runs of the file, comma-separated; all where left out")
    asked = parser.parse_args(argv)
    arrays = {name: array for file in asked.files for name, array in np.load(file).items()}
    there = runs_of(arrays)
    names = [name for name in asked.methods.split(",") if name] or there
    if unknown := sorted(set(names) - set(there)):
        print(f"error: {asked.files[0]} has no {', '.join(unknown)}; it has {', '.join(there)}.", file=sys.stderr)
        return 2
    print_row(["run", "losses", "gradients", "logits", "student", "means", "gamma", "exemplars"], "")
    all_agree = True
    with tempfile.TemporaryDirectory() as folder:
        pictures = Pictures.write(arrays, Path(folder))
        for name in names:
            if Reference(arrays, name).method not in METHODS:
                print(f"{name:<15}not in the project")
                continue
            row = compare(arrays, name, pictures)
            all_agree &= row.agrees
            numbers = [row.differences.get(quantity) for quantity in QUANTITIES]
            cells = ["-" if number is None else f"{number:.1e}" for number in numbers]
            verdict = "; ".join(["agrees" if row.agrees else f"DIFFERS: {row.first}", *row.notes])
            print_row([name, *cells, row.exemplars], verdict)
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
