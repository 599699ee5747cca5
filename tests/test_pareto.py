"""`python -m exps.pareto` with the real commands on a tiny dataset, and what its files ask for."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exps import demo, pareto
from exps.grid import finished
from exps.sweep import Plan, read
from tests.conftest import long_but
from tests.grid_stub import entry, write
from tests.little_config import KEYS
from tests.shapes import make_shapes

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "exps").glob("pareto_*.json"))
FORMS = ["real", "webp:10@8", "nosuch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pareto")
    make_shapes(folder / "data", train=4, test=1, copies=1)
    return folder


def sweep_file(folder, **changes):
    config = {
        **{**KEYS, "data_dir": str(folder / "data"), "init_cls": 3, "increment": 3, "batch_size": 16},
        **{"augmentations_per_image": 1, "init_milestones": [], "milestones": []},
    }
    del config["model_name"]
    content = {
        **{"config": config, "methods": ["der"], "seeds": [1], "budgets": [2600], "forms": FORMS},
        **{"settings": "--resolution low", **changes},
    }
    file = folder / "sweep.json"
    file.write_text(json.dumps(content))
    return file


def checkpoints(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("runs/*/seed*/checkpoints/*.pt")}


@pytest.mark.long
def test_killed_then_run_again_by_three_then_nothing_to_do(folder):
    """The page of three processes that share the runs is, byte for byte, that of one which finds them done."""
    command = [sys.executable, "-m", "exps.pareto", str(sweep_file(folder)), "--output", str(folder / "out")]
    output, real = folder / "out", folder / "out" / "runs" / "der-real-2600" / "results.json"
    sweep = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 900
    while not real.is_file() and sweep.poll() is None and time.monotonic() < limit:
        time.sleep(0.1)
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert real.is_file()
    assert not (output / "report.html").exists()

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    sweeps = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(3)]
    printed, errors = zip(*(sweep.communicate() for sweep in sweeps), strict=True)
    assert [sweep.returncode for sweep in sweeps] == [1, 1, 1], errors
    assert all("nosuch: no form 'nosuch'" in error for error in errors), "what can't be made is listed"
    before, page = checkpoints(output), (output / "report.html").read_bytes()
    with (output / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["classifier"] == "cnn"]
    assert [(row["form"], row["budget_bytes_per_class"]) for row in rows] == [("real", "2600"), ("webp:10@8", "2600")]
    assert int(rows[1]["synthetic_exemplars"]) > 0 == int(rows[0]["synthetic_exemplars"])
    assert all(0 < int(row["memory_bytes"]) <= 6 * 2600 for row in rows)
    assert "| der | webp:10@8 | 0.4 | 2,600 |" in (output / "table.md").read_text()
    assert b"nosuch" in page
    assert b"webp:10@8: comes back" in page
    assert (output / "runs" / "der-real-2600" / "report.html").is_file()

    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "one class order, so no standard error" in third.stdout
    assert "± 0.0" not in third.stdout
    assert third.stdout in printed
    assert (checkpoints(output), (output / "report.html").read_bytes()) == (before, page)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"dataset": "Shapes", "memory_bytes_per_class": 5}}, "memory_bytes_per_class itself"),
        ({"config": {"data_dir": "x"}}, "config must be"),
        ({"budgets": [0]}, "budgets.0: must be greater than 0"),
        ({"forms": [3]}, "forms.0: must be"),
        ({"budgets": "100"}, "budgets: must be a valid list"),
        ({"forms": [{"form": "edges", "memory_per_class": 3}]}, "unknown key 'memory_per_class'"),
        ({"budget": [100]}, "unknown key 'budget'"),
        ({"copies": "later"}, "copies: must be 'ahead' or 'on_demand'"),
    ],
)
def test_unequal_budgets_and_mistakes_are_refused(folder, capsys, changes, words):
    assert pareto.main([str(sweep_file(folder, **changes)), "--output", str(folder / "refused")]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_copies_that_a_model_decodes_are_made_on_demand_even_where_all_are_equal(folder):
    """Those of new pictures, too, are wanted where p is above 0: then a sweep makes them once, for all its runs."""
    forms = [{"form": form, "augmentation_prob": [0, 0.4]} for form in ("webp:10", "codebook:6@20")]
    sweep = read(sweep_file(folder, forms=["real", *forms], budgets=[300]), folder / "o")
    measures = {"forms": {form: {"deterministic": True, "needs_model": form != "webp:10"} for form in sweep.kept}}
    measures["forms"]["real"] = {"deterministic": True}
    found, _ = Plan(sweep, measures).known()
    on_demand = {
        (point.config["syn_form"], point.config["augmentation_prob"])
        for point in found
        if point.config["regenerate"] == "on_demand"
    }
    assert on_demand == {("codebook:6@20", 0)}


def test_every_run_of_a_budget_has_the_same_bytes(folder):
    forms = ["real", "webp:10", {"form": "text", "syn_per_class": 3}, {"form": "text", "real_per_class": 0}]
    sweep = read(sweep_file(folder, forms=forms, budgets=[300, 100], methods=["der", "icarl"]), folder / "o")
    measures = {"forms": {form: {"deterministic": form != "text"} for form in ("real", "webp:10", "text")}}
    found, more = Plan(sweep, measures).known()
    assert not more
    assert len(found) == 2 * 4 * 2 == len({point.folder for point in found})
    for point in found:
        assert point.keys["budget_in"] == "bytes"
        assert point.keys["fixed_memory"] is True
        assert point.keys["augmentation_prob"] == (0.4 if "syn_form" in point.keys else 0)
        assert "memory_per_class" not in point.keys
    assert {point.keys["memory_bytes_per_class"] for point in found} == {100, 300}


def test_a_part_of_a_sweep(folder, capsys):
    file = sweep_file(folder, forms=["real", "webp:10", {"form": "text", "syn_per_class": 3}])
    sweep = read(file, folder / "o", seeds=[7], budgets=[900], forms=["text", "real"])
    names = [row.name for row in sweep.rows]
    assert (names, sweep.budgets, sweep.seeds) == (["real", "text, syn_per_class=3, p = 0.4"], [900], [7])
    assert pareto.main([str(file), "--output", str(folder / "refused"), "--forms", "real,edges"]) == 2
    assert "no form 'edges'; it has real, webp:10, text." in capsys.readouterr().err


SMALL = [file for file in SWEEPS if file.stem in ("pareto_demo", "pareto_digits_tuned")]


@pytest.mark.parametrize("file", long_but(SWEEPS, *SMALL), ids=lambda file: file.name)
def test_every_sweep_in_exps_can_be_read(file, tmp_path):
    sweep = read(file, tmp_path)
    measures = {"forms": {form: {"deterministic": True} for form in ("real", *sweep.kept)}}
    points, more = Plan(sweep, measures).known()
    cells = len(sweep.budgets) * len(sweep.methods)
    tuned = [row for row in sweep.rows if len(row.candidates) > 1]
    assert more == bool(tuned)
    assert len(points) == sum(len(row.candidates) for row in sweep.rows) * cells


def test_a_list_of_p_is_a_row_of_each(folder):
    forms = ["real", {"form": ["webp:10", "webp:5"], "augmentation_prob": [0, 0.4]}, {"form": "edges", "name": "maps"}]
    sweep = read(sweep_file(folder, forms=forms, augmentation_prob=0.2), folder / "o")
    assert [(str(c), c.probability) for c in sweep.candidates] == [
        ("real", 0),
        ("webp:10", 0),
        ("webp:10, p = 0.4", 0.4),
        ("webp:5", 0),
        ("webp:5, p = 0.4", 0.4),
        ("maps, p = 0.2", 0.2),
    ]


def test_copies_of_new_pictures_are_made_ahead_for_all_runs(folder):
    """Others of the chosen exemplars on demand, but those that take no model."""
    forms = [{"form": name, "augmentation_prob": [0, 0.4]} for name in ("webp:10", "edges", "codebook")]
    sweep = read(sweep_file(folder, forms=forms[:2]), folder / "o")
    measures = {"forms": {"webp:10": {"deterministic": True, "needs_model": False}}}
    measures["forms"]["edges"] = {"deterministic": False, "needs_model": True}
    points, _ = Plan(sweep, measures).known()
    assert [(p.name.split(", ")[1], p.config["augmentation_prob"], p.config["regenerate"]) for p in points] == [
        ("webp:10", 0, "ahead"),
        ("webp:10", 0.4, "ahead"),
        ("edges", 0, "on_demand"),
        ("edges", 0.4, "ahead"),
    ]
    phase0 = [point.phase0 for point in points]
    assert phase0[0] == phase0[2], "without copies phase 0 is the same for all forms"
    assert len(set(phase0)) == 3


def test_real_exemplars_with_copies_and_random_exemplars_are_controls(folder, capsys):
    forms = [
        {"form": "real", "augmentation_prob": 0.4, "copies_of": "edges"},
        {"form": "edges", "exemplar_selection": "random"},
    ]
    real, other = read(sweep_file(folder, forms=forms), folder / "o").candidates
    assert str(real) == "real, copies of edges, p = 0.4"
    assert (real.keys["syn_form"], real.keys["syn_per_class"]) == ("edges", 0)
    assert other.keys["exemplar_selection"] == "random"
    file = sweep_file(folder, forms=[{"form": "real", "augmentation_prob": 0.4}])
    assert pareto.main([str(file), "--output", str(folder / "refused")]) == 2
    assert "copies_of" in capsys.readouterr().err


def test_what_is_chosen_on_validation_pictures_alone_is_tested(folder, tmp_path, capsys):
    webp = {"form": ["webp:5", "webp:10"], "augmentation_prob": [0, 0.4]}
    changes = {"forms": ["real", webp], "tune": True, "val_per_class": 2, "tune_seeds": [3, 4], "seeds": [1, 2]}
    sweep = read(sweep_file(folder, **changes), tmp_path)
    plan = Plan(sweep, {"forms": {form: {"deterministic": True} for form in ("real", "webp:5", "webp:10")}})
    points, more = plan.known()
    assert more
    candidates = [point for point in points if point.config["val_per_class"]]
    assert [point.name.split(", 2,600")[0] for point in candidates] == [
        "der, webp:5",
        "der, webp:5, p = 0.4",
        "der, webp:10",
        "der, webp:10, p = 0.4",
    ]
    assert all(point.config["val_per_class"] == 2 and point.seeds == [3, 4] for point in candidates)
    assert [point.name for point in plan.tested()] == ["der, real, 2,600 bytes"]
    # On each order another one is the best; the mean decides.
    for point, (first, second) in zip(candidates[:3], [(90, 10), (60, 61), (10, 90)], strict=True):
        write(point, entry(3, float(first)), entry(4, float(second)))
    assert plan.known()[1], "one has not finished"
    assert not plan.known({candidates[3].name})[1], "a candidate that failed is left out"
    write(candidates[3], entry(3, 50.0), entry(4, 50.0))
    points, more = plan.known()
    assert not more
    tested = plan.tested()
    assert [point.name for point in tested] == ["der, real, 2,600 bytes", "der, webp (webp:5, p = 0.4), 2,600 bytes"]
    assert all(point.config["val_per_class"] == 0 and point.seeds == [1, 2] for point in tested)
    for point in tested:
        write(point, entry(1), entry(2, 70.0))
    assert all(finished(point) for point in tested)
    capsys.readouterr()
    pareto.write(plan, tested, [])
    assert "webp: webp:5" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "Chosen on 2 train pictures of each class" in page
    assert "webp at 2,600 bytes (der): webp:5, p = 0.4" in page
    assert 'href="runs/der-real-2600/results.json"' in page


def test_a_refused_config_shows_all_lines(folder, capsys):
    file = sweep_file(folder, methods=["nosuch"], config={"dataset": "S", "init_cls": 0})
    assert pareto.main([str(file), "--output", str(folder / "refused")]) == 2
    said = capsys.readouterr().err
    for words in ("problems in the config", "model_name must be one of", "increment is not given", "init_cls"):
        assert words in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": True}, "tune needs val_per_class"),
        ({"tune": True, "val_per_class": 2, "tune_by": "test"}, "tune_by: must be 'cnn' or 'nme'"),
        ({"augmentation_prob": 2}, "a probability, 0 to 1"),
        ({"forms": ["webp:10", "webp:10"]}, "two rows are called 'webp:10, p = 0.4'"),
    ],
)
def test_mistakes_of_rows(folder, capsys, changes, words):
    assert pareto.main([str(sweep_file(folder, **changes)), "--output", str(folder / "refused")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.long
def test_main_with_another_seed_beside_a_sweep(folder, tmp_path):
    """It takes the sweep's phase 0, and its class order does not enter the sweep's table."""
    file = sweep_file(folder, forms=["real"], methods=["replay"])
    command = [sys.executable, "-m", "exps.pareto", str(file), "--output", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    run = tmp_path / "runs" / "replay-real-2600"
    words = [sys.executable, "main.py", "--config", str(run / "point.json"), "seed=5"]
    subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    assert len(json.loads((run / "results.json").read_text())["runs"]) == 2
    assert not (run / "phase0_cache").exists()
    assert len(list((tmp_path / "phase0_cache").glob("*.pt"))) == 2
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == first.stdout


@pytest.mark.long
def test_what_a_budget_holds_by_the_arithmetic(folder, capsys, monkeypatch):
    monkeypatch.setenv("ESCORT_DATA_DIR", str(folder / "data"))
    words = ["--dry-run", "--dataset", "Shapes", "--budgets", "5000", "--settings=--resolution high"]
    assert pareto.main([*words, "--forms", "webp:10@8,edges,text,nosuch"]) == 1
    out, err = capsys.readouterr()
    assert "nosuch" in err
    assert "6 classes of at least 4 train images" in out
    rows = {line.split()[0]: re.split(r"\s{2,}", line) for line in out.splitlines() if re.search(r"  \d+ \+ \d+", line)}
    sizes = [file.stat().st_size for file in (folder / "data" / "Shapes" / "train").rglob("*.*")]
    real = sum(sizes) / len(sizes)
    assert rows["real"][2:5] == [f"{real:,.0f}", "5,000", f"{int(5000 // real)} + 0"]
    assert rows["edges"][4] == "1 + 3", "three of four images are left"
    assert rows["edges"][6] == "1.1", "1 + 3 / 24 units"
    assert rows["edges"][7] == str(3 * 5 * 6), "copies"
    assert rows["webp:10@8"][7] == "24", "one copy of each image: all would be equal"
    assert rows["text"][4].startswith(rows["real"][4].split()[0])


@pytest.mark.long
def test_the_time_of_a_sweep_whose_budgets_hold_no_real_image(folder, capsys):
    forms = [{"form": "webp:10@8", "real_per_class": 0}]
    file = sweep_file(folder, forms=forms, budgets=[200, 300], methods=["replay"])
    assert pareto.main([str(file), "--output", str(folder / "none"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"  0 \+ [1-4]  ", said), said
    assert re.search(r"training: about 0\.\d\d hours", said), said
    assert not (folder / "none").exists()


def test_the_demo_says_what_one_class_order_can_say_and_has_a_folder_of_its_own():
    assert "One class order" in demo.what_it_says(1)
    assert "3 class orders" in demo.what_it_says(3)
    config = json.loads((ROOT / "exps" / "demo.json").read_text())
    assert not Path(config["output_dir"]).is_relative_to(demo.OUTPUT)


def test_the_demo_fails_where_it_learns_less_than_recorded(tmp_path, monkeypatch, capsys):
    """Each accuracy: as recorded it passes, 20 points below it is named, in one line.  Other class orders are free."""
    expected = json.loads((ROOT / demo.SWEEP).read_text())["expected"]
    recorded = {(form, of): value for form, values in expected["accuracies"].items() for of, value in values.items()}
    assert {form for form, _ in recorded} == {row.name.partition(",")[0] for row in read(ROOT / demo.SWEEP, None).rows}
    monkeypatch.setattr(demo, "run", lambda command: None)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.chdir(ROOT)

    def run_demo(seed, values):
        header = "form,classifier,seed,average_incremental_accuracy\n"
        rows = [f"{form},{classifier},{seed},{value}\n" for (form, classifier), value in values.items()]
        (tmp_path / "table.csv").write_text(header + "".join(rows))
        return demo.main(), capsys.readouterr().err

    assert run_demo(1993, recorded) == (0, "")
    for (form, classifier), value in recorded.items():
        code, said = run_demo(1993, {**recorded, (form, classifier): value - 20})
        assert (code, said.count("\n")) == (2, 1)
        assert f"learns less than recorded in exps/pareto_demo.json: {form} ({classifier})" in said
        assert run_demo(1994, {**recorded, (form, classifier): value - 20}) == (0, "")
