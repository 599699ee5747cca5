"""What a run writes down while it learns, read as a user would: the CSV files, and the event files byte by byte."""

import csv
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from models.training.checkpoint import Checkpoints
from tests.test_main import results, train  # noqa: F401  (a fixture)
from utils.results import history
from utils.results.history import History
from utils.results.records import Record

SHORT = {
    "init_epoch": 2,
    "epochs": 3,
    "model_name": "foster",
    "compression_epochs": 2,
    "scheduler": "steps",
    "milestones": [2],
}


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def curves(folder):
    """tag -> [(step, value)] as they stand in a folder's event files: records of length, checksum, event, checksum."""
    found = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.suffix):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def check(out, phases=3, epochs=(2, 5, 5)):
    """The three accounts of a run agree, and none says a thing twice."""
    (run,) = results(out)["runs"]
    rows = table(out / "seed1993" / "epochs.csv")
    assert [(int(row["phase"]), int(row["epoch"])) for row in rows] == [
        (phase, 1 + epoch) for phase in range(phases) for epoch in range(epochs[phase])
    ]
    tags = curves(out / "seed1993")
    assert [step for step, _ in tags["train/loss"]] == list(range(1, 1 + sum(epochs)))
    for key in ("loss", "train_accuracy", "learning_rate"):
        assert [value for _, value in tags[f"train/{key}"]] == pytest.approx([float(row[key]) for row in rows])
    top1 = [phase["cnn"]["top1"] for phase in run["phases"]]
    assert [step for step, _ in tags["cnn/top1"]] == list(range(phases))
    assert [value for _, value in tags["cnn/top1"]] == pytest.approx(top1)
    assert [step for step, _ in tags["cnn/old"]] == [1, 2]  # phase 0 has no old classes
    per_phase = table(out / "phases.csv")
    assert [row["phase"] for row in per_phase] == ["0", "1", "2"]
    for row, phase in zip(per_phase, run["phases"], strict=True):
        assert row["seed"] == "1993"
        assert float(row["cnn_top1"]) == pytest.approx(phase["cnn"]["top1"])
        assert int(row["bytes"]) == phase["memory"]["bytes_total"]
        assert float(row["seconds"]) == phase["seconds"]["total"]
        assert float(row["nme_top1"]) == pytest.approx(phase["nme"]["top1"])
        last = [row for row in rows if int(row["phase"]) == phase["phase"]]
        stages = phase["training"]["stages"]
        assert list(dict.fromkeys(row["stage"] for row in last)) == [stage["stage"] for stage in stages]
        assert float(last[stages[0]["epochs"] - 1]["loss"]) == pytest.approx(stages[0]["loss"], rel=1e-5)
    return run, rows


def keys(content):
    """Every key of a JSON object's objects, but those of the config and of what is by class or the memory's."""
    if isinstance(content, list):
        return set().union(*map(keys, content))
    if not isinstance(content, dict):
        return set()
    inner = (value for key, value in content.items() if key not in ("config", "per_class", "memory"))
    return set(content).union(*map(keys, inner))


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def fields(record):
    """Of a record's class and of all that derive from it."""
    return {*record.model_fields, *(field for each in record.__subclasses__() for field in fields(each))}


@pytest.mark.long
def test_a_run_and_one_that_was_killed_in_an_epoch_tell_the_same(train, tmp_path, monkeypatch):  # noqa: F811
    assert train(**SHORT, output_dir=str(tmp_path / "whole")) == 0
    run, whole = check(tmp_path / "whole")
    assert [float(row["learning_rate"]) for row in whole[2:5]] == pytest.approx([0.05, 0.05, 0.005])
    assert all(float(row["seconds"]) > 0 for row in whole)

    # Each key of results.json is a field of a record.
    found = keys(results(tmp_path / "whole"))
    assert found <= fields(Record)
    assert {"backward_transfer", "forgetting", "per_class", "per_phase", "parameters", "seconds_reused"} <= found

    # The curves of a class, and the transfer that goes with forgetting, from the figures of each phase.
    for name in run["class_names"]:
        curve = [phase["cnn"]["per_class"].get(name) for phase in run["phases"]]
        assert run["cnn"]["per_class"][name] == curve
    assert run["cnn"]["per_class"][run["class_names"][4]][:2] == [None, None]
    per_phase = [phase["cnn"]["per_phase"] for phase in run["phases"]]
    by_hand = sum(per_phase[2][phase] - per_phase[phase][phase] for phase in range(2)) / 2
    assert run["cnn"]["backward_transfer"] == pytest.approx(by_hand)

    written = History.add_epoch

    def killed(history, phase, stage, epoch, *figures):
        written(history, phase, stage, epoch, *figures)
        if (phase, epoch) == (1, 4):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(History, "add_epoch", killed)
        assert train(**SHORT) == 130
    left = results(tmp_path / "out")
    assert left["summary"] is None
    assert [phase["phase"] for phase in left["runs"][0]["phases"]] == [0]
    assert not left["runs"][0]["finished"]
    assert [row["epoch"] for row in table(tmp_path / "out" / "seed1993" / "epochs.csv")] == list("121234")
    assert train(**SHORT) == 0
    _, resumed = check(tmp_path / "out")
    assert without_seconds(resumed) == without_seconds(whole)


@pytest.mark.long
def test_a_phase_that_was_done_but_not_saved_is_told_once(train, tmp_path, monkeypatch):  # noqa: F811
    def killed(checkpoints, state):
        if state["phase"] == 2:
            raise KeyboardInterrupt
        save(checkpoints, state)

    save = Checkpoints.save_phase
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_phase", killed)
        assert train(**SHORT) == 130
    assert train(**SHORT) == 0
    check(tmp_path / "out")


def test_going_on_in_the_middle_of_a_phase(tmp_path):
    """Rows from there on give way, those before stay, in the event files too."""
    figures = {"learning_rate": 0.1, "train_accuracy": 50.0, "seconds": 1.0}
    history = History(tmp_path)
    for epoch in (1, 2, 3):
        history.add_epoch(1, "training", epoch, 10 + epoch, {**figures, "loss": float(epoch)})
    later = History(tmp_path)
    later.add_epoch(1, "training", 2, 12, {**figures, "loss": 7.0})
    later.close()
    assert [(row["epoch"], row["loss"]) for row in table(tmp_path / "epochs.csv")] == [("1", "1"), ("2", "7")]
    assert curves(tmp_path)["train/loss"] == [(11, 1.0), (12, 7.0)]


def test_tensorboard_can_be_left_out(train, tmp_path):  # noqa: F811
    assert train("logger=csv", init_epoch=1, epochs=1, init_cls=6) == 0
    assert len(table(tmp_path / "out" / "seed1993" / "epochs.csv")) == 1
    assert not list(tmp_path.rglob("*tfevents*"))


def test_an_epochs_csv_of_another_kind_is_refused(train, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "out" / "seed1993" / "epochs.csv"
    path.parent.mkdir(parents=True)
    for content in ("a,b\n1,2\n", "phase,stage,epoch,learning_rate,loss,train_accuracy,seconds\n0,training\n"):
        path.write_text(content)
        assert train(init_epoch=1, epochs=1, init_cls=6) == 2
        said = capsys.readouterr().err
        assert str(path) in said
        assert "delete" in said
        assert path.read_text() == content


def test_wandb_gets_the_curves_through_lightning_s_logger(tmp_path, monkeypatch):
    import pytorch_lightning.loggers

    made = []

    class Recorder:
        def __init__(self, **options):
            made.append(options)

        def log_metrics(self, metrics, step):
            made.append((step, metrics))

    monkeypatch.setattr(history.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(pytorch_lightning.loggers, "WandbLogger", Recorder)
    written = history.History(tmp_path, loggers=["wandb"])
    figures = {"learning_rate": 0.1, "loss": 2.0, "train_accuracy": 50.0, "seconds": 1.0}
    written.add_epoch(0, "training", 1, 1, figures)
    options, (step, metrics) = made
    assert options["resume"] == "allow"
    assert (step, metrics["train/loss"], metrics["train/train_accuracy"]) == (1, 2.0, 50.0)
    assert not list(tmp_path.glob("*tfevents*"))


def test_a_logger_whose_package_is_missing(train, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(history.importlib.util, "find_spec", lambda name: None)
    assert train("logger=[csv, wandb]") == 2
    assert "logger: wandb needs the package wandb: pip install wandb" in capsys.readouterr().err
    assert train("logger=[csv, mlflow]") == 2
    assert "logger[1] must be 'tensorboard', 'csv' or 'wandb', not \"mlflow\"" in capsys.readouterr().err
