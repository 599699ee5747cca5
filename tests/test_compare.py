"""`python -m exps.compare`, with a stand-in for main.py that writes results as it does."""

import json

import pytest

from exps import compare
from utils.results import report

STAND_IN = """
import json, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder, method = Path(words["output_dir"]), words["model_name"]
with open(folder.parent / "calls.txt", "a") as calls:
    calls.write(" ".join([folder.name, words.get("real_per_class", "-"), words.get("lrate", "-")]) + "\\n")
if method == "wa":
    sys.exit("Traceback\\nerror: lrate: wa diverged")
number = {"finetune": 10.0, "icarl": 20.0}[method] + (5.0 if folder.name.endswith("mix") else 0.0)
spread = lambda value: {"mean": value, "std": 1.0}
metrics = {"average_incremental_accuracy": spread(number), "forgetting": spread(number / 2), "top1": spread([number])}
summary = {
    "seeds": [1, 2], "classes_seen": [2], "cnn": metrics, "nme": metrics if method == "icarl" else None,
    "units": spread(0.0 if method == "finetune" else 4.0), "bytes": spread(1.0), "seconds": spread(1234.0),
}
folder.mkdir(parents=True, exist_ok=True)
(folder / "results.json").write_text(json.dumps({"config": {}, "summary": summary}))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Calls the command; -> (exit code, stdout, stderr, the runs of main.py that it made)."""
    (tmp_path / "main.py").write_text(STAND_IN)
    (tmp_path / "small.json").write_text(json.dumps({"memory_per_class": 4, "seed": [1, 2]}))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(compare, "MAIN", tmp_path / "main.py")

    def call(*arguments):
        calls = tmp_path / "out" / "calls.txt"
        calls.unlink(missing_ok=True)
        code = compare.main([str(tmp_path / "small.json"), "--output", str(tmp_path / "out"), *arguments])
        made = sorted(calls.read_text().splitlines()) if calls.exists() else []
        return code, *capsys.readouterr(), made

    return call


def test_real_exemplars_alone_and_the_mix(run, tmp_path):
    code, table, _, made = run("--methods", "icarl,finetune", "--jobs", "2", "lrate=0.2")
    assert code == 0
    # Without exemplars there is one run only; with real ones alone they take the whole budget.
    assert made == ["finetune-real 4 0.2", "icarl-mix - 0.2", "icarl-real 4 0.2"]
    assert table.splitlines() == [
        "| method | real: average | real: forgetting | real: s | mix: average | mix: forgetting | mix: s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| finetune | 10.0 ± 1.0 | 5.0 ± 1.0 | 1,234 |  |  |  |",
        "| icarl (CNN) | 20.0 ± 1.0 | 10.0 ± 1.0 | 1,234 | 25.0 ± 1.0 | 12.5 ± 1.0 | 1,234 |",
        "| icarl (NME) | 20.0 ± 1.0 | 10.0 ± 1.0 | 1,234 | 25.0 ± 1.0 | 12.5 ± 1.0 | 1,234 |",
    ]
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_what_is_finished_is_not_done_again(run, tmp_path):
    run("--methods", "icarl", "--only", "real")
    assert run("--methods", "icarl")[3] == ["icarl-mix - -"]
    assert run("--methods", "icarl")[3] == []
    half = report.load_results(tmp_path / "out" / "icarl-mix")
    half["summary"]["seeds"] = [1]
    report.write_json(tmp_path / "out" / "icarl-mix" / "results.json", half)
    assert run("--methods", "icarl")[3] == ["icarl-mix - -"]


def test_a_run_that_fails_leaves_the_others(run):
    code, table, said, made = run("--methods", "wa,icarl")
    assert code == 1
    assert "icarl" in table
    assert "wa" not in table
    assert made == ["icarl-mix - -", "icarl-real 4 -", "wa-mix - -", "wa-real 4 -"]
    assert said.splitlines()[-2:] == ["wa, real: error: lrate: wa diverged", "wa, mix: error: lrate: wa diverged"]


def test_mistakes(run, tmp_path):
    code, _, said, made = run("--methods", "icarl,lcarl")
    assert (code, made) == (2, [])
    assert "lcarl is not among" in said
    assert set(compare.all_methods()) >= {"der", "finetune", "simplecil"}
    assert compare.main([str(tmp_path / "none.json")]) == 2
