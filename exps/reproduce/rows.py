"""The rows of published tables, and the recorded runs of them."""

import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exps.runs import ROOT, as_overrides
from models import catalogue
from utils.config.read import read_json
from utils.config.schema import Config, differences
from utils.errors import UserError
from utils.results.records import CLASSIFIERS, Classifier, Results

FOLDER = Path(__file__).parent
RECORDED = "recorded.json"


@dataclass(frozen=True)
class Row:
    """One published figure.  `exps.reproduce` says what the fields are; base: the config's whole path."""

    name: str
    method: str
    base: Path
    average: float | None
    last: float | None
    dataset: str
    protocol: str
    config: Mapping[str, Any] = field(default_factory=dict)
    classifier: Classifier = "cnn"
    note: str = ""

    @property
    def overrides(self) -> list[str]:
        """The row's keys as main.py takes them on the command line."""
        return as_overrides(self.config)

    def arguments(self, more: Sequence[str] = ()) -> list[str]:
        """main.py's arguments; more: the user's key=value."""
        return ["--config", str(self.base), *self.overrides, f"output_dir=outputs/reproduce/{self.name}", *more]

    def load(self, more: Sequence[str] = ()) -> Config:
        """The checked config of a run.  Raises UserError."""
        return catalogue.read_config(self.base, self.arguments(more)[2:])


@dataclass(frozen=True)
class Table:
    """One published table, or the part of it with one protocol."""

    source: str
    url: str
    table: str
    note: str
    rows: tuple[Row, ...]

    @property
    def protocols(self) -> list[str]:
        """What the rows' datasets and protocols are, each once."""
        return list(dict.fromkeys(f"{row.dataset}, {row.protocol}" for row in self.rows))

    @property
    def title(self) -> str:
        protocol = f" ({self.protocols[0]})" if len(self.protocols) == 1 else ""
        return f"{self.source}: {self.table or 'no table'}{protocol}"


def read_tables(folder: Path = FOLDER) -> list[Table]:
    """The tables of a folder, by file name.  Raises UserError for a file that is none, or a name that comes twice."""
    tables = [_table(file) for file in sorted(folder.glob("*.json")) if file.name != RECORDED]
    names = Counter(row.name for table in tables for row in table.rows)
    if twice := [name for name, number in names.items() if number > 1]:
        raise UserError(f"{folder}: two rows are named {twice[0]!r}.")
    return tables


def _table(file: Path) -> Table:
    content = read_json(file)
    shared = {key: content.get(key, "") for key in ("dataset", "protocol")}
    try:
        rows = []
        for row in content["rows"]:
            config = {**content.get("config", {}), **row.get("config", {})}
            base = Path(os.path.normpath(file.parent.absolute() / row["base"]))
            if not base.is_file():
                raise UserError(f"{file}: there is no config {base}.")
            rows.append(Row(**{**shared, **row, "base": base, "config": config}))
        table = Table(content["source"], content["url"], content["table"], content["note"], tuple(rows))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no table of rows: {error}. python -m exps.reproduce --help says what it has."
        ) from None
    for row in rows:
        figures = [figure for figure in (row.average, row.last) if figure is not None]
        if not all(isinstance(figure, int | float) and 0 <= figure <= 100 for figure in figures):
            raise UserError(f"{file}: row {row.name!r}: average and last are accuracies in percent, or null.")
        if row.classifier not in CLASSIFIERS:
            raise UserError(f"{file}: row {row.name!r}: classifier is one of {', '.join(CLASSIFIERS)}.")
    return table


def find_row(tables: Sequence[Table], name: str) -> tuple[Table, Row]:
    """A row by its name.  Raises UserError, with near names."""
    rows = {row.name: (table, row) for table in tables for row in table.rows}
    if name in rows:
        return rows[name]
    near = difflib.get_close_matches(name, rows, 3, 0.4) or sorted(row for row in rows if name in row)[:3]
    hint = f"Did you mean {', '.join(near)}?" if near else "python -m exps.reproduce --list shows all."
    raise UserError(f"there is no row {name!r}. {hint}")


def user_path(path: Path) -> str:
    """A path as a user of the repository types it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def rows_of(tables: Sequence[Table], config: Mapping[str, Any]) -> list[Row]:
    """The rows that a run with this config reproduces.

    config: of a results.json.  Its class orders may be others than the row's.  Raises UserError, with the row of the
    same method that is nearest, where there is none.
    """
    same_method = []  # rows with what differs
    for row in (row for table in tables for row in table.rows):
        own = row.load()
        if own.model_name == config.get("model_name"):
            same_method.append((row, differences(own, {**config, "seed": own.seed})))
    if same := [row for row, differing in same_method if not differing]:
        return same
    if not same_method:
        raise UserError(f"no row has model_name {config.get('model_name')}. python -m exps.reproduce --list shows all.")
    row, differing = min(same_method, key=lambda pair: len(pair[1]))
    more = f"; {len(differing) - 4} more" if len(differing) > 4 else ""
    words = f"{'; '.join(differing[:4])}{more}"
    raise UserError(f"this run reproduces no row. The nearest is {row.name}, from which it differs in {words}.")


def read_records(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The recorded numbers of each row that has any."""
    file = folder / RECORDED
    return read_json(file) if file.exists() else {}


def figures(results: Results, row: Row) -> dict[str, Any]:
    """Average and last accuracy in percent of a row's classifier, and of nearest means, means over class orders.

    Raises UserError where no class order is finished, or the method has no such classifier.
    """
    if results.unfinished:
        raise UserError(f"{row.name} is not finished. The command that started it goes on where it stopped.")
    classifiers = results.summary.classifiers
    if row.classifier not in classifiers:
        raise UserError(f"{row.name}: {row.method} has no accuracy of {row.classifier!r}.")
    seeds = results.summary.seeds
    entry: dict[str, Any] = {"seeds": seeds}
    for classifier in dict.fromkeys((row.classifier, "nme")):
        if averages := classifiers.get(classifier):
            prefix = "" if classifier == row.classifier else f"{classifier}_"
            average, last = averages.average_incremental_accuracy, averages.top1
            entry |= {f"{prefix}average": round(average.mean, 2), f"{prefix}last": round(last.mean[-1], 2)}
            if len(seeds) > 1:
                entry |= {f"{prefix}average_std": round(average.std, 2), f"{prefix}last_std": round(last.std[-1], 2)}
    return entry
