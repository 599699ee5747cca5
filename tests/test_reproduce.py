"""`python -m exps.reproduce`: rows of published tables, a run of one, and the page."""

import json
import re
from pathlib import Path

import pytest

from exps.reproduce import command
from exps.reproduce.page import page
from exps.reproduce.rows import read_results, read_tables
from models import catalogue
from tests.shapes import make_shapes
from utils.config.read import load_config

ROOT = Path(__file__).parent.parent
ROWS = [row for table in read_tables() for row in table.rows]


def test_the_page_is_what_the_rows_say():
    written = (ROOT / "docs" / "reproduced.md").read_text(encoding="utf-8")
    assert written == page(read_tables(), read_results()), "run: python -m exps.reproduce --write"


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

    def call(*words):
        code = command.main([*words, "--rows", str(rows), "--page", str(tmp_path / "page.md")])
        return code, *capfd.readouterr()

    call.rows = rows
    call.where = ["device=cpu", f"data_dir={tmp_path / 'data'}"]
    return call


@pytest.mark.long
def test_a_row_is_run_and_written_down(reproduce, tmp_path):
    code, said, _ = reproduce("--run", "shapes-icarl", *reproduce.where)
    assert code == 0
    done = json.loads((tmp_path / "outputs" / "reproduce" / "shapes-icarl" / "results.json").read_text())
    assert done["config"]["epochs"] == 1
    cnn, nme = done["runs"][0]["cnn"], done["runs"][0]["nme"]
    average, last = round(cnn["average_incremental_accuracy"], 2), round(cnn["top1"][-1], 2)
    assert f"ours: average {average:.2f}, last {last:.2f}; in " in said
    assert "published: average 61.50, last 40.00" in said

    kept = json.loads((reproduce.rows / "results.json").read_text())
    entry = kept["runs"]["shapes-icarl"]
    assert (entry["average"], entry["last"], entry["seeds"]) == (average, last, [1993])
    assert entry["nme_average"] == round(nme["average_incremental_accuracy"], 2)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
    assert "cores" in entry["machine"]
    assert re.fullmatch(r"([0-9a-f]{7,}\+?)?", entry["commit"])

    written = (tmp_path / "page.md").read_text()
    assert f"| `shapes-icarl` | iCaRL | 61.50 | 40.00 | {average:.2f} (NME " in written
    assert f"{entry['date']}, {entry['machine']}, commit" in written
    assert reproduce("--write")[0] == 0
    assert (tmp_path / "page.md").read_text() == written

    code, said, _ = reproduce("--list")
    assert code == 0
    assert f"  shapes-icarl  iCaRL   61.50 / 40.00  {average:.2f} / {last:.2f}".split() == said.splitlines()[-1].split()
    assert max(map(len, said.splitlines())) <= 80

    # With other keys it is no reproduction, and what stands in the table stays.
    elsewhere = f"output_dir={tmp_path / 'other'}"
    code, said, _ = reproduce("--run", "shapes-icarl", "epochs=2", "init_epoch=1", elsewhere, *reproduce.where)
    assert code == 0
    assert "no reproduction, as these keys are not the row's: epochs" in said
    changed = json.loads((reproduce.rows / "results.json").read_text())
    assert changed["runs"] == kept["runs"]
    assert changed["changed"]["shapes-icarl"]["changed"] == ["epochs=2"]
    assert "`shapes-icarl`, ours with epochs=2: " in (tmp_path / "page.md").read_text()


@pytest.mark.long
def test_a_dry_run_keeps_nothing(reproduce, tmp_path):
    code, said, _ = reproduce("--run", "shapes-icarl", "--dry-run", *reproduce.where)
    assert code == 0
    assert (
        f"$ python main.py --config {tmp_path / 'base.json'} epochs=1 output_dir=outputs/reproduce/shapes-icarl" in said
    )
    assert re.search(r"about \d\.\d minutes a class order on .+ cores, from two epochs of each kind", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json", "data", "rows"]
    assert [path.name for path in reproduce.rows.iterdir()] == ["shapes.json"]


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
    assert not (reproduce.rows / "results.json").exists()
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
