"""`python -m exps.reproduce`: rows of published tables, a run of one, and the page."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from exps.reproduce import __main__ as command
from exps.reproduce.__main__ import with_records
from exps.reproduce.rows import read_records, read_tables
from models import catalogue
from tests import pycil_reference
from tests.shapes import make_shapes
from utils.config.read import load_config
from utils.config.schema import as_dict
from utils.results.records import ResultsFile

ROOT = Path(__file__).parent.parent
ROWS = [row for table in read_tables() for row in table.rows]


def test_the_page_has_what_was_recorded():
    written = (ROOT / "docs" / "reproduced.md").read_text(encoding="utf-8")
    assert written == with_records(written, read_tables(), read_records())


def test_every_method_has_a_verdict():
    """The table says "yes" for the methods with figures of PyCIL's, and for no other."""
    written = (ROOT / "docs" / "reproduced.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in written.splitlines() if "| `" in line]
    verdicts = {cells[0]: cells[1] for cells in rows if len(cells) == 4}
    assert sorted(verdicts) == sorted(set(catalogue.methods()))
    files = [np.load(file) for file in sorted((ROOT / "tests" / "reference").glob("pycil_steps*.npz"))]
    compared = {
        pycil_reference.Reference(file, name).method for file in files for name in pycil_reference.runs_of(file)
    }
    assert {name for name, verdict in verdicts.items() if verdict.startswith("yes")} == compared & set(verdicts)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_config_of_a_row_loads(row):
    (_, base), (_, *overrides) = row.arguments()[:2], row.arguments()[1:]
    config = load_config(base, overrides, methods=catalogue.methods(), backbones=catalogue.backbones())
    assert config.output_dir == f"outputs/reproduce/{row.name}"
    assert config.seed == [1993]
    assert not [note for note in config.notes if "changes nothing" in note]
    for key, value in row.config.items():
        assert getattr(config, key, getattr(config.settings, key, None)) == value


def test_rows_say_where_their_numbers_are_from():
    for table in read_tables():
        assert table.url.startswith("https://")
        assert table.source
        assert table.note
        published = [row for row in table.rows if row.average is not None]
        assert not published or table.table
    by_name = {row.name: (row.average, row.last) for row in ROWS}
    assert by_name["survey-inc10-icarl"] == (64.42, 49.52)
    assert by_name["survey-memory-memo"] == (72.37, 61.98)
    assert by_name["acil-cifar100-5"] == (66.30, None)


def test_expected_figures_in_the_list_of_configs():
    """exps/README.md has the published figures of the rows that are a config as it is, of one where there are two."""
    text = (ROOT / "exps" / "README.md").read_text(encoding="utf-8")
    configs = {line.split("|")[1].strip(" `"): line.split("|")[3].strip() for line in text.splitlines() if "|" in line}
    expected: dict[str, list[str]] = {}
    for row in ROWS:
        plain = load_config(row.base, methods=catalogue.methods(), backbones=catalogue.backbones())
        same = all(getattr(plain, key, getattr(plain.settings, key, None)) == v for key, v in row.config.items())
        if same and row.average is not None:
            figures = " / ".join(f"{figure:.2f}" for figure in (row.average, row.last) if figure is not None)
            expected.setdefault(row.base.name, []).append(figures)
    assert len(expected) >= 11
    assert [name for name, figures in expected.items() if configs[name] not in figures] == []
    assert {name for name, cell in configs.items() if re.match(r"\d+\.\d\d\b", cell)} == set(expected)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_dry_run_prints_the_command(row, capsys, monkeypatch):
    monkeypatch.setattr(command, "follow", None)
    assert command.main(["--run", row.name, "--dry-run", "data_dir=my data"]) == 0
    said = capsys.readouterr().out
    typed = next(line for line in said.splitlines() if line.startswith("$ python main.py "))
    words = shlex.split(typed)[3:]
    assert words[:2] == ["--config", str(row.base.relative_to(ROOT))]
    assert words[2:] == [*row.overrides, f"output_dir=outputs/reproduce/{row.name}", "data_dir=my data"]
    assert "nothing was started" in said


@pytest.fixture
def reproduce(tmp_path, monkeypatch, capfd):
    """The command on rows of its own, in a folder of its own; -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    make_shapes(tmp_path / "data", train=4, test=2, copies=0)
    base = {"dataset": "Shapes", "init_cls": 3, "increment": 3, "model_name": "icarl", "convnet_type": "resnet8"}
    base |= {"init_epoch": 1, "epochs": 3, "memory_per_class": 2, "batch_size": 8, "num_workers": 0, "cache": "none"}
    (tmp_path / "base.json").write_text(json.dumps(base))
    rows = tmp_path / "rows"
    rows.mkdir()
    row = {"name": "shapes-icarl", "method": "iCaRL", "base": "../base.json", "average": 61.5, "last": 40}
    table = {"source": "A paper", "url": "https://example.org", "table": "Table 9", "note": "Six shapes."}
    table |= {"dataset": "Shapes", "protocol": "B0 Inc3", "config": {"epochs": 1}, "rows": [row]}
    (rows / "shapes.json").write_text(json.dumps(table))
    monkeypatch.setattr(command, "FOLDER", rows)
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("# What is checked\n\nBy hand.\n\n## Recorded runs\n\nold\n")

    def call(*words):
        code = command.main(words)
        return code, *capfd.readouterr()

    call.rows = rows
    call.where = ["device=cpu", f"data_dir={tmp_path / 'data'}"]
    return call


def write_results(path, config, seeds=(1993,), *, finished=True):
    """A results.json as main.py writes it, of two phases; the accuracies rise by one from a class order to the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for number, seed in enumerate(seeds):
        curves = {"cnn": [70.0 + number, 30.0 + number], "nme": [80.0 + number, 60.0 + number]}
        memory = {"units_total": 1, "bytes_total": 2}
        about = {"nme": None, "memory": memory, "training": {}, "seconds": {}, "parameters": 1}
        phases = [{"classes_seen": 3 + 3 * i, "cnn": {"top1": curves["cnn"][i]}, **about} for i in range(2)]
        run = {"seed": seed, "finished": finished, "class_names": list("abcdef"), "phases": phases, "memory": memory}
        for classifier, top1 in curves.items():
            run[classifier] = {"average_incremental_accuracy": sum(top1) / 2, "forgetting": 1.0, "top1": top1}
            run[classifier] |= {"forgetting_in_tens": 1.0, "backward_transfer": -1.0}
        runs.append({**run, "seconds": 1.0, "seconds_reused": 0.0})
    read = ResultsFile.model_validate({"config": config, "runs": runs, "summary": None})
    content = ResultsFile.of({**config, "seed": list(seeds)}, read.runs)
    path.write_text(json.dumps(content.to_json()))


@pytest.fixture
def config(reproduce):
    """The config of the row, as a results.json has it."""
    (table,) = read_tables(reproduce.rows)
    return as_dict(table.rows[0].load([*reproduce.where, "output_dir=elsewhere"]))


def test_a_finished_run_is_recorded(reproduce, config, tmp_path):
    write_results(tmp_path / "run" / "results.json", config, (1993, 1994))
    code, said, _ = reproduce("--record", str(tmp_path / "run" / "results.json"), "--note", "M. Curie, one T4")
    assert code == 0
    assert "shapes-icarl: published 61.50 / 40.00, recorded 50.50 / 30.50" in said
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# What is checked\n\nBy hand.\n\n## Recorded runs\n\n0 of 1 published rows wait")
    assert "\nold\n" not in page
    (line,) = [line for line in page.splitlines() if line.startswith("| `shapes-icarl`")]
    assert [cell.strip() for cell in line.split("|")[1:7]] == [
        "`shapes-icarl`", "iCaRL, Shapes, B0 Inc3", "61.50", "40.00",
        "50.50 ± 0.71 (NME 70.50)", "30.50 ± 0.71 (NME 60.50)",
    ]  # fmt: skip
    assert "class orders 1993, 1994; M. Curie, one T4. Published in [A paper, Table 9](https://example.org)." in page
    code, said, _ = reproduce("--list")
    assert code == 0
    assert said.splitlines()[-1].split() == ["shapes-icarl", "iCaRL", "61.50", "/", "40.00", "50.50", "/", "30.50"]
    assert max(map(len, said.splitlines())) <= 80

    # A later run takes its place; another case of the dataset's name is the same folder.
    write_results(tmp_path / "run" / "results.json", {**config, "dataset": "shapes", "batch_size": 8})
    assert reproduce("--record", str(tmp_path / "run"))[0] == 0
    assert json.loads((reproduce.rows / "recorded.json").read_text())["shapes-icarl"]["seeds"] == [1993]


def test_runs_that_reproduce_no_row(reproduce, config, tmp_path):
    for change, words in (
        ({"epochs": 2, "lrate": 0.5}, "reproduces no row. The nearest is shapes-icarl, from which it differs in"),
        ({"model_name": "der"}, "no row has model_name der"),
    ):
        write_results(tmp_path / "results.json", {**config, **change})
        code, _, said = reproduce("--record", str(tmp_path / "results.json"))
        assert code == 2
        assert words in said
    write_results(tmp_path / "results.json", {**config, "epochs": 2})
    assert "differs in epochs: 2 -> 1." in reproduce("--record", str(tmp_path))[2]
    write_results(tmp_path / "results.json", config, finished=False)
    code, _, said = reproduce("--record", str(tmp_path))
    assert code == 2
    assert "shapes-icarl is not finished" in said
    assert not (reproduce.rows / "recorded.json").exists()
    assert (tmp_path / "page.md").read_text().endswith("\nold\n")


@pytest.mark.long
def test_a_row_is_run_and_recorded(reproduce, tmp_path):
    code, said, _ = reproduce("--run", "shapes-icarl", *reproduce.where)
    assert code == 0
    file = "outputs/reproduce/shapes-icarl/results.json"
    assert said.splitlines()[-1] == f"to keep its numbers: python -m exps.reproduce --record {file}"
    done = json.loads((tmp_path / file).read_text())
    assert done["config"]["epochs"] == 1
    assert reproduce("--record", file)[0] == 0
    entry = json.loads((reproduce.rows / "recorded.json").read_text())["shapes-icarl"]
    cnn, nme = done["runs"][0]["cnn"], done["runs"][0]["nme"]
    assert entry["average"] == round(cnn["average_incremental_accuracy"], 2)
    assert entry["last"] == round(cnn["top1"][-1], 2)
    assert entry["nme_average"] == round(nme["average_incremental_accuracy"], 2)

    elsewhere = f"output_dir={tmp_path / 'other'}"
    assert reproduce("--run", "shapes-icarl", "epochs=2", elsewhere, *reproduce.where)[0] == 0
    code, _, said = reproduce("--record", str(tmp_path / "other" / "results.json"))
    assert code == 2
    assert "reproduces no row" in said


def test_mistakes(reproduce):
    assert reproduce("--run", "shape-icarl")[::2] == (
        2,
        "error: there is no row 'shape-icarl'. Did you mean shapes-icarl?\n",
    )
    code, _, said = reproduce("--run", "zzzz")
    assert (code, said) == (2, "error: there is no row 'zzzz'. python -m exps.reproduce --list shows all.\n")
    code, _, said = reproduce("--run", "shapes-icarl", "epochz=3")
    assert code == 2
    assert "did you mean 'epochs'" in said
    code, _, said = reproduce("--list", "--dry-run")
    assert (code, said) == (2, "error: key=value and --dry-run go with --run.\n")
    table = json.loads((reproduce.rows / "shapes.json").read_text())
    for change, words in (
        ({"rows": [{**table["rows"][0], "average": 640}]}, "average and last are accuracies in percent"),
        ({"rows": [{**table["rows"][0], "base": "../no.json"}]}, "there is no config"),
        ({"rows": [{**table["rows"][0], "mean": 3}]}, "shapes.json is no table of rows"),
        ({"rows": table["rows"] * 2}, "two rows are named 'shapes-icarl'"),
    ):
        (reproduce.rows / "shapes.json").write_text(json.dumps({**table, **change}))
        code, _, said = reproduce("--list")
        assert code == 2
        assert words in said
