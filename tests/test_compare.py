"""`python -m exps.compare` and class orders in one folder, with the real main.py on a tiny dataset."""

import json
from pathlib import Path

import pytest

from exps import compare
from models import catalogue
from tests import forks
from tests.little_config import KEYS
from tests.shapes import make_shapes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config with a seed that is no list and without memory_per_class."""
    folder = tmp_path_factory.mktemp("compare")
    make_shapes(folder / "data", train=4, test=1, copies=1)
    values = {
        **{**KEYS, "data_dir": str(folder / "data"), "init_cls": 3, "increment": 3, "seed": 1993, "batch_size": 16},
        **{"real_per_class": 1, "syn_per_class": 2, "augmentations_per_image": 1},
    }
    (folder / "small.json").write_text(json.dumps(values))
    return folder / "small.json"


@pytest.fixture(scope="module")
def run(config):
    """Calls the command as a user does; -> the finished process."""

    def call(*arguments):
        return forks.run(["-m", "exps.compare", config, "--output", config.parent / "out", *arguments])

    return call


def when_written(config):
    return {path: path.stat().st_mtime_ns for path in config.parent.glob("out/*/seed*/checkpoints/*.pt")}


def used(config, folder):
    return json.loads((config.parent / "out" / folder / "config.json").read_text())


@pytest.mark.long
def test_one_budget_for_both_then_reused_named_or_extended(run, config):
    everything = ("--methods", "finetune,replay", "--jobs", "2", "memory_per_class=3")
    first = run(*everything)
    assert first.returncode == 0, first.stderr
    rows = (config.parent / "out" / "table.md").read_text().splitlines()
    assert (
        rows[0] == "| method | real: average | real: forgetting | real: s | mix: average | mix: forgetting | mix: s |"
    )
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| finetune", "| replay (CNN)", "| replay (NME)"]
    assert "|  |  |  |" in rows[2], "finetune keeps no exemplars: one run"
    assert [line.split("  ")[0] for line in first.stdout.splitlines()[2:5]] == [
        "finetune",
        "replay (CNN)",
        "replay (NME)",
    ]
    real, mix = used(config, "replay-real"), used(config, "replay-mix")
    assert (real["memory_per_class"], real["real_per_class"], real["syn_per_class"]) == (3, 3, 0)
    assert (mix["memory_per_class"], mix["real_per_class"], mix["syn_per_class"]) == (3, 1, 2)

    before = when_written(config)
    again = run(*everything)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert when_written(config) == before, "what is finished is reused"

    finetune = ("--methods", "finetune", "--only", "real", "memory_per_class=3")
    other = run(*finetune, "--epochs", "2")
    assert other.returncode == 1
    assert other.stdout == ""
    assert "finetune, real: " in other.stderr
    assert "epochs: 1 -> 2" in other.stderr
    assert when_written(config) == before

    run(*finetune, "seed=5")
    assert (config.parent / "out" / "table.md").read_text().count("\n") == 3
    results = json.loads((config.parent / "out" / "finetune-real" / "results.json").read_text())
    assert results["summary"]["seeds"] == [5, 1993]


@pytest.mark.long
def test_a_table_has_methods_with_keys_of_their_own(config, run, tmp_path):
    methods = {"finetune": {"epochs": 2, "milestones": [1]}, "replay": {}, "rmm-icarl": {}}
    file = config.parent / "table.json"
    file.write_text(json.dumps({"config": config.name, "methods": methods}))
    words = ["-m", "exps.compare", file, "--output", tmp_path, "--only", "real", "memory_per_class=2"]
    done = forks.run(words)
    assert done.returncode == 1
    assert "rmm-icarl, real: memory_size must be given" in done.stderr.replace("model_name=rmm-icarl: ", "")
    assert [row.split(" | ")[0] for row in (tmp_path / "table.md").read_text().splitlines()[2:]] == [
        "| finetune",
        "| replay (CNN)",
        "| replay (NME)",
    ]
    of = {name: json.loads((tmp_path / f"{name}-real" / "config.json").read_text()) for name in ("finetune", "replay")}
    assert (of["finetune"]["epochs"], of["finetune"]["milestones"], of["replay"]["epochs"]) == (2, [1], 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert forks.run([*words, "--methods", "finetune"]).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == before


def test_the_table_of_cifar10_has_every_method():
    config, methods = compare.read(ROOT / "exps" / "compare_cifar10.json")
    assert set(methods) == set(catalogue.methods())
    for name, own in methods.items():
        for overrides in compare.MEMORIES.values():
            keys = [*own, *overrides, f"model_name={name}"]
            assert catalogue.read_config(config, keys).model_name == name


def test_a_table_that_is_none(tmp_path, capsys):
    file = tmp_path / "table.json"
    for content, said in (
        ({"methods": {"icarl": {}}}, "a table has two keys: config, the path of a config, and methods, an object"),
        ({"config": "a.json", "methods": ["icarl"]}, "a table has two keys"),
        ({"config": "a.json", "methods": {"icarl": 3}}, "icarl must have an object of main.py's keys"),
    ):
        file.write_text(json.dumps(content))
        assert compare.main([str(file)]) == 2
        assert said in capsys.readouterr().err


def test_class_orders_side_by_side(config, tmp_path):
    words = ["main.py", "--config", config, f"output_dir={tmp_path}", "syn_per_class=0"]
    for order in [forks.Command([*words, f"seed={seed}"]) for seed in (3, 4)]:
        assert order.wait(300) == 0, order.communicate()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == results["summary"]["seeds"] == [3, 4]
    assert (tmp_path / "phases.csv").read_text().count("\n") == 5


def test_mistakes(run, capsys):
    wrong = run("--methods", "replay,lcarl")
    assert wrong.returncode == 2
    assert "lcarl is not among" in wrong.stderr
    wrong = run("--methods", "replay", "epochs=ten")
    assert wrong.returncode == 2
    assert "epochs must be a valid integer, not ten" in wrong.stderr
    assert compare.main(["/nowhere/none.json", "--methods", "replay"]) == 2
    assert "no config file /nowhere/none.json" in capsys.readouterr().err
