"""`python -m exps.pareto` and `exps.plan` with the real commands on a tiny dataset."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exps import pareto, plan
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
        **{"dataset": "Shapes", "data_dir": str(folder / "data"), "init_cls": 3, "increment": 3},
        **{
            "convnet_type": "resnet8",
            "device": "cpu",
            "num_workers": 0,
            "batch_size": 16,
            "augmentations_per_image": 1,
        },
        **{"init_epoch": 1, "epochs": 1, "init_milestones": [], "milestones": []},
    }
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
def test_killed_then_run_again_then_nothing_to_do(folder):
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

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1, again.stderr
    assert "nosuch: no form 'nosuch'" in again.stderr, "what can't be made is listed"
    before, page = checkpoints(output), (output / "report.html").read_bytes()
    with (output / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "der (CNN)"]
    assert [(row["form"], row["budget_bytes_per_class"]) for row in rows] == [("real", "2600"), ("webp:10@8", "2600")]
    assert int(rows[1]["synthetic_exemplars"]) > 0 == int(rows[0]["synthetic_exemplars"])
    assert all(0 < int(row["memory_bytes"]) <= 6 * 2600 for row in rows)
    assert "| der (CNN) | webp:10@8 | 2,600 |" in (output / "table.md").read_text()
    assert b"nosuch" in page
    assert b"webp:10@8: comes back" in page
    assert (output / "runs" / "der-real-2600" / "report.html").is_file()

    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert third.stdout == again.stdout
    assert (checkpoints(output), (output / "report.html").read_bytes()) == (before, page)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"dataset": "Shapes", "memory_bytes_per_class": 5}}, "memory_bytes_per_class itself"),
        ({"config": {"data_dir": "x"}}, "config must be"),
        ({"budgets": [0]}, "above 0"),
        ({"budgets": "100"}, "budgets must be a list"),
        ({"forms": [{"form": "edges", "memory_per_class": 3}]}, "unknown key 'memory_per_class'"),
        ({"budget": [100]}, "unknown key 'budget'"),
        ({"copies": "later"}, "copies is"),
    ],
)
def test_unequal_budgets_and_mistakes_are_refused(folder, capsys, changes, words):
    assert pareto.main([str(sweep_file(folder, **changes)), "--output", str(folder / "refused")]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "refused").exists()


def measured(form):
    return {"deterministic": form != "text", "needs_model": form not in ("real", "webp:10")}


def test_copies_that_a_model_decodes_are_made_on_demand_even_where_all_are_equal(folder):
    sweep = pareto.read(sweep_file(folder, forms=["real", "webp:10", "codebook:6@20"], budgets=[300]), folder / "o")
    measures = {"forms": {form: measured(form) for form in ("real", "webp:10", "codebook:6@20")}}
    assert measures["forms"]["codebook:6@20"] == {"deterministic": True, "needs_model": True}
    how = {point.form: point.keys.get("regenerate") for point in pareto.points(sweep, measures)}
    assert how == {"real": None, "webp:10": None, "codebook:6@20": "on_demand"}


def test_every_run_of_a_budget_has_the_same_bytes(folder):
    forms = ["real", "webp:10", {"form": "text", "syn_per_class": 3}, {"form": "text", "real_per_class": 0}]
    sweep = pareto.read(sweep_file(folder, forms=forms, budgets=[300, 100], methods=["der", "icarl"]), folder / "o")
    measures = {"forms": {form: measured(form) for form in ("real", "webp:10", "text")}}
    found = pareto.points(sweep, measures)
    assert len(found) == 2 * 4 * 2 == len({point.folder for point in found})
    for point in found:
        assert (point.keys["budget_in"], point.keys["memory_bytes_per_class"]) == ("bytes", point.budget)
        assert point.keys["fixed_memory"] is True
        assert point.keys["augmentation_prob"] == 0
        assert "memory_per_class" not in point.keys
    assert {point.budget for point in found} == {100, 300}


def test_a_part_of_a_sweep(folder, capsys):
    file = sweep_file(folder, forms=["real", "webp:10", {"form": "text", "syn_per_class": 3}])
    sweep = pareto.read(file, folder / "o", seeds=[7], budgets=[900], forms=["text", "real"])
    assert (list(sweep.forms), sweep.budgets, sweep.seeds) == (["real", "text, syn_per_class=3"], [900], [7])
    assert pareto.main([str(file), "--output", str(folder / "refused"), "--forms", "real,edges"]) == 2
    assert "no form 'edges'; it has real, webp:10, text." in capsys.readouterr().err


@pytest.mark.parametrize("file", SWEEPS, ids=[file.name for file in SWEEPS])
def test_every_sweep_in_exps_can_be_read(file, tmp_path):
    sweep = pareto.read(file, tmp_path)
    measures = {"forms": {form: measured(form) for form in ("real", *sweep.kept)}}
    assert len(pareto.points(sweep, measures)) == len(sweep.forms) * len(sweep.budgets) * len(sweep.methods)


@pytest.mark.long
@pytest.mark.parametrize("option", ["--real=-1", "--real=x", "--copies=0", "--sample=0"])
def test_numbers_that_plan_refuses(option, capsys):
    assert plan.main(["--dataset", "Shapes", "--bytes", "30000", option]) == 2
    assert "is not a whole number of at least" in capsys.readouterr().err


def test_plan_by_the_arithmetic(folder, capsys):
    where = ["--data-dir", str(folder / "data"), "--dataset", "Shapes"]
    code = plan.main(
        [
            *where,
            "--bytes",
            "30,000",
            "--settings=--resolution high",
            "--forms",
            "webp:10@8,edges,text,nosuch",
            "--copies",
            "3",
        ]
    )
    out, err = capsys.readouterr()
    assert code == 1
    assert "nosuch" in err
    assert "6 classes of at least 4 train images; 5,000 bytes a class" in out
    rows = {
        line.split()[0]: line.split()
        for line in out.splitlines()
        if line and line.split()[0] in (*FORMS, "edges", "text")
    }
    sizes = [file.stat().st_size for file in (folder / "data" / "Shapes" / "train").rglob("*.*")]
    real = sum(sizes) / len(sizes)
    assert rows["real"][1:4] == [f"{real:,.0f}", str(int(5000 // real)), "0"]
    assert rows["edges"][2:5] == ["1", "3", "3"], "three of four images are left"
    assert rows["edges"][6] == "1.1", "1 + 3 / 24 units"
    assert rows["edges"][7] == str(3 * 3 * 6), "copies"
    assert rows["webp:10@8"][4] == "1", "all copies would be equal"
    assert rows["text"][2] == rows["real"][2]
