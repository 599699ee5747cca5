"""Class lists that the field has fixed, as text files: `published/NAME.txt`.

Comments, which begin with "# ", say what the list is, how many classes it has and where it comes from.  Then a line a
class, in the published order: its label, and after a tab its text for prompts.
"""

import re
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "published"


FETCHED = {"CIFAR10": "CIFAR10", "CIFAR100": "CIFAR100", "Food101": "Food101", "Caltech256": "Caltech256"}
FETCHED |= {"MNIST": "digits"}
"""Datasets that `python -m utils.curate WHAT` makes from what it downloads or brings, and WHAT."""


def curate_command(name: str) -> str | None:
    """The command that makes a dataset of this name, in any case of letters; None where there is none."""
    if what := {dataset.lower(): what for dataset, what in FETCHED.items()}.get(name.lower()):
        return f"python -m utils.curate {what}"
    listed = find_list(name)
    return f"python -m utils.curate {listed.stem} --source DIR" if listed else None


def class_lists() -> list[str]:
    """The names of the lists."""
    return sorted(file.stem for file in FOLDER.glob("*.txt"))


def find_list(name: str) -> Path | None:
    """The file of a list by its name, in any case and with or without hyphens; None for an unknown one."""
    plain = {_plain(listed): listed for listed in class_lists()}
    return FOLDER / f"{plain[_plain(name)]}.txt" if _plain(name) in plain else None


def without_comments(lines: Iterable[str]) -> list[str]:
    """The lines of a list of classes, stripped, without empty ones and comments ("# ...")."""
    stripped = (line.strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("# ")]


def labels(name: str) -> list[str] | None:
    """The labels of a list in the published order; None for an unknown name."""
    file = find_list(name)
    if file is None:
        return None
    return [line.partition("\t")[0] for line in without_comments(file.read_text(encoding="utf-8").splitlines())]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()
