"""Metrics worked out by hand."""

import json

import pytest
import torch

from exps.report import __main__ as command
from utils.files import write_json
from utils.results.metrics import (
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_in_tens,
    nearest_mean_scores,
    phase_metrics,
)
from utils.results.output import write_confusion
from utils.results.records import ClassOrder, Phase, ResultsFile

# Three classes, the last one new; images of class 0: 2, class 1: 1, class 2: 3.
TARGETS = torch.tensor([0, 0, 1, 2, 2, 2])
SCORES = torch.tensor(
    [[3.0, 2, 1], [1, 2, 3], [1, 3, 2], [1, 2, 3], [3, 2, 1], [0, 1, 5]],
)  # predictions: 0, 2, 1, 2, 0, 2


def test_one_phase_by_hand():
    metrics = phase_metrics(SCORES, TARGETS, [2, 3])
    assert metrics["top1"] == pytest.approx(100 * 4 / 6)
    assert metrics["top5"] == 100  # three classes: any guess is among the first three
    assert metrics["old"] == pytest.approx(100 * 2 / 3)
    assert metrics["new"] == pytest.approx(100 * 2 / 3)
    assert metrics["per_class"] == pytest.approx([50, 100, 100 * 2 / 3])
    assert metrics["per_phase"] == pytest.approx([100 * 2 / 3, 100 * 2 / 3])
    assert metrics["confusion"].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 2]]
    json.dumps({key: value for key, value in metrics.items() if key != "confusion"})


def test_top_5_of_more_classes():
    scores = torch.arange(7.0).repeat(7, 1)  # class 6 first, then 5, 4, 3, 2
    metrics = phase_metrics(scores, torch.arange(7), [7])
    assert metrics["top1"] == pytest.approx(100 / 7)
    assert metrics["top5"] == pytest.approx(100 * 5 / 7)
    assert metrics["old"] is None
    assert metrics["new"] == pytest.approx(100 / 7)


def test_over_phases_by_hand():
    assert average_incremental_accuracy([90, 60, 30]) == 60
    # Phase 0's classes: 90, 95, 70: forgets 25.  Phase 1's: 80, 60: forgets 20.  Phase 2's are new.
    assert forgetting([[90], [95, 80], [70, 60, 50]]) == pytest.approx(22.5)
    assert forgetting([[90]]) is None
    assert forgetting([[50], [80, 60]]) == pytest.approx(-30)  # learnt on: negative
    # Phase 0's classes: 90, then 70 in the end; phase 1's: 80, then 60.  The 95 in between does not count.
    assert backward_transfer([[90], [95, 80], [70, 60, 50]]) == pytest.approx(-20)
    assert backward_transfer([[90]]) is None


def test_pycil_s_forgetting_by_hand():
    """Phases of 10 classes: the best of all phases, the last one included, against the last."""
    assert forgetting_in_tens([[90], [95, 80], [70, 85, 50]]) == pytest.approx((25 + 0) / 2)
    assert forgetting_in_tens([[90]]) is None
    # Phases of 6: the second ten begin in the second of three phases.
    assert forgetting_in_tens([[90], [80, 70], [60, 40]]) == pytest.approx(30)
    scores, targets = torch.eye(12).repeat(2, 1), torch.arange(12).repeat(2)
    scores[11] = torch.eye(12)[0]
    metrics = phase_metrics(scores, targets, [6, 12])
    assert metrics["per_ten"] == [100, 75]


def test_nearest_mean():
    means = torch.eye(2)
    scores = nearest_mean_scores(torch.tensor([[2.0, 0], [3, 4]]), means)
    assert scores[0].tolist() == pytest.approx([0, -2], abs=1e-5)
    assert scores[1].tolist() == pytest.approx([-(0.4**2 + 0.8**2), -(0.6**2 + 0.2**2)], abs=1e-5)


def entry(seed, first, second, nme=None):
    def metrics(top1, per_phase):
        width = len(per_phase) + 1
        confusion = [[1] * width] * width
        return {
            "top1": top1,
            "top5": 100.0,
            "per_class": [top1] * width,
            "per_phase": per_phase,
            "per_ten": per_phase,
            "confusion": torch.tensor(confusion),
        }

    records = [
        {
            "phase": phase,
            "classes_seen": 2 + phase,
            "cnn": metrics(top1, per_phase),
            "nme": metrics(nme, per_phase) if nme else None,
            "memory": {"units_total": 10.0, "bytes_total": 1000},
            "training": {"epochs": 1, "loss": 1.0, "accuracy": 50.0, "seconds": 3.0, "reused": phase == 0},
            "seconds": {"total": 5.0},
            "parameters": 1,
        }
        for phase, (top1, per_phase) in enumerate([(first, [first]), (second, [second - 10, second + 10])])
    ]
    names = ["a", "b", "c"]
    return ClassOrder.of(seed, names, [Phase.from_state(record, names) for record in records], 2)


def test_results_over_seeds():
    config = {"dataset": "D", "model_name": "der", "convnet_type": "resnet8"}
    results = ResultsFile.of(config, [entry(1, 80.0, 60.0), entry(2, 90.0, 66.0)]).to_json()
    summary = results["summary"]
    assert summary["seeds"] == [1, 2]
    assert summary["classes_seen"] == [2, 3]
    assert summary["nme"] is None
    assert summary["cnn"]["average_incremental_accuracy"]["mean"] == pytest.approx(74)
    assert summary["cnn"]["average_incremental_accuracy"]["std"] == pytest.approx(8 / 2**0.5)
    assert summary["cnn"]["top1"]["mean"] == pytest.approx([85, 63])
    assert summary["cnn"]["forgetting"]["mean"] == pytest.approx((30 + 34) / 2)
    assert summary["cnn"]["backward_transfer"] == pytest.approx({"mean": -32, "std": 4 / 2**0.5})
    assert summary["seconds"]["mean"] == pytest.approx(13)  # 10 of its own, 3 that the reused phase 0 had taken
    run = results["runs"][0]
    assert run["phases"][1]["cnn"]["per_class"] == {"a": 60.0, "b": 60.0, "c": 60.0}
    assert "confusion" not in run["phases"][1]["cnn"]
    json.dumps(results)


def test_table_plot_and_command(tmp_path, capsys):
    config = {"dataset": "D", "model_name": "icarl", "convnet_type": "resnet8"}
    one = ResultsFile.of(config, [entry(1, 80.0, 60.0)])
    two = ResultsFile.of(config, [entry(1, 80.0, 64.0, nme=50.0), entry(2, 90.0, 68.0, nme=52.0)])
    for name, results in (("real", one), ("escort", two)):
        write_json(tmp_path / name / "results.json", results.to_json())
    png = tmp_path / "accuracy.png"
    assert command.main([str(tmp_path / "real"), f"ours={tmp_path / 'escort'}", "--plot", str(png)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0] for row in rows[2 : rows.index("")]] == ["real", "ours (CNN)", "ours (NME)"]
    assert "60.0" in rows[2]
    assert "66.0±2.8" in rows[3]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert command.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_confusion_csv(tmp_path):
    write_confusion(tmp_path / "c.csv", [[1, 2], [3, 4]], ["a,b", "c", "later"])
    assert (tmp_path / "c.csv").read_text() == 'true \\ predicted,"a,b",c\n"a,b",1,2\nc,3,4\n'


def test_a_first_phase_of_one_class():
    metrics = phase_metrics(torch.tensor([[0.3], [-2.0]]), torch.tensor([0, 0]), [1])
    assert metrics["confusion"].tolist() == [[2]]
    assert (metrics["top1"], metrics["top5"], metrics["old"], metrics["new"]) == (100.0, 100.0, None, 100.0)
    assert metrics["per_class"] == metrics["per_phase"] == [100.0]
