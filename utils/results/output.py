"""The output folder of an experiment: whose it is, and the results of its class orders, whichever process made them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.config.read import read_json
from utils.config.schema import Config, as_dict, differences
from utils.errors import UserError
from utils.results import report


class Output:
    """The folder of one experiment's results.  Several processes may work in it, each on class orders of its own.

    config: the checked config; folder: its output_dir.  Raises UserError where the folder holds results of another
    experiment or can't be written to.
    """

    def __init__(self, config: Config, folder: Path):
        self.config = config
        self.folder = folder
        self._check_whose_it_is()

    def seed_folder(self, seed: int) -> Path:
        """Where a class order's history and checkpoints are."""
        return seed_folder(self.folder, seed)

    def claim(self) -> None:
        """Make the folder, with the config as used."""
        try:
            report.write_json(self.folder / "config.json", as_dict(self.config))
        except OSError as error:
            raise UserError(f"output_dir: {self.folder} can't be written to ({error.strerror}).") from None

    @contextmanager
    def working_on(self, seed: int, *, alone: bool = True) -> Iterator[None]:
        """Keep other runs from working on the same class order.  Raises UserError where one does already.

        alone: false for the processes of a run but the first, which does it for all.
        """
        if not alone:
            yield
            return
        folder = self.seed_folder(seed)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / ".lock").acquire(blocking=False)
        except Timeout:
            raise UserError(f"another process is working on seed {seed} in {self.folder}.") from None
        with lock:
            yield

    def write(self, run: Mapping[str, Any], confusions: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
        """Put a class order's entry of results.json in its place beside those of other class orders.

        The figure and the page are drawn when all class orders of this run's config are finished.

        run: `report.run_entry`; confusions: a matrix a phase.  Returns the new content of results.json.
        """
        for phase, confusion in enumerate(confusions):
            path = self.seed_folder(run["seed"]) / f"confusion_phase{phase:02d}.csv"
            report.write_confusion(path, confusion, run["class_names"])
        with FileLock(self.folder / ".results.lock"):
            others = [other for other in self._runs() if other["seed"] != run["seed"]]
            runs = sorted([*others, run], key=lambda entry: entry["seed"])
            config = {**as_dict(self.config), "seed": [entry["seed"] for entry in runs]}
            content = report.results(config, runs)
            report.write_json(self.folder / "results.json", content)
            report.write_phases(self.folder / "phases.csv", runs)
            finished = {entry["seed"] for entry in runs if entry["finished"]}
            if finished >= set(self.config.seed):  # once: drawing takes a second
                report.plot({self.config.model_name: content}, self.folder / "accuracy.png")
                report.write_page({self.config.model_name: self.folder}, self.folder / "report.html")
        return content

    def _runs(self) -> list[Mapping[str, Any]]:
        """The entries of results.json.  Raises UserError where they are of another experiment."""
        file = self.folder / "results.json"
        content = _known(report.read_results, file) if file.is_file() else None
        if not content or not content["runs"]:
            return []
        self._refuse_another(content["config"])
        return content["runs"]

    def _check_whose_it_is(self) -> None:
        file = self.folder / "config.json"
        before = _known(read_json, file) if file.is_file() else None
        if before is not None and any(self.folder.glob("seed*/checkpoints/*.pt")):  # else nothing would be lost
            self._refuse_another(before)
        self._runs()  # which remain where the checkpoints have been deleted

    def _refuse_another(self, before: Mapping[str, Any]) -> None:
        """Raises UserError where the config of what is in the folder differs from this experiment's."""
        if differing := differences(self.config, before):
            more = f"; {len(differing) - 4} more" if len(differing) > 4 else ""
            raise UserError(
                f"{self.folder} holds another experiment ({'; '.join(differing[:4])}{more}). "
                f"Choose another output_dir, such as {self._free_name()}."
            )

    def _free_name(self) -> Path:
        folder = self.folder if self.folder.name not in ("", "..") else self.folder.resolve()
        number = 2
        while (name := folder.parent / f"{folder.name}-{number}").exists():
            number += 1
        return name


def _known(read: Callable[[Path], Any], file: Path) -> Any:
    """What a file holds that a run has written."""
    try:
        return read(file)
    except UserError as error:
        raise UserError(f"{error} Choose another output_dir, or delete that file.") from None


def check_is_run(folder: Path) -> None:
    """Raises UserError for what is no run's output folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run's output folder: it has no config.json.")


def seed_folder(folder: Path, seed: int) -> Path:
    """Where a class order's history and checkpoints are, in its experiment's folder."""
    return folder / f"seed{seed}"
