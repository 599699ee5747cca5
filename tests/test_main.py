"""The trainer from end to end, as a user calls it, on a tiny dataset of coloured shapes."""

import csv
import gc
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import main
from compress.coding.edge_maps import encode
from compress.options import parse_settings
from compress.training import on_demand
from compress.training.exemplars import Cost
from models.training import trainer
from models.training.epochs import warn_of_rising_loss
from models.training.trainer import Trainer
from tests.conftest import long_but
from tests.little_config import results, train_little
from tests.shapes import SHAPES, make_shapes
from utils.data.classes import DataManager
from utils.errors import Stopped, UserError
from utils.results.records import Metrics, Phase


@pytest.fixture
def own_data_dir(shapes, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(shapes, tmp_path / "data"))


@pytest.fixture
def train(tmp_path, shapes):
    """Calls main.py with a small config; returns its exit code."""
    values = {"model_name": "wa", "memory_per_class": 3, "real_per_class": 2, "syn_per_class": 4, "batch_size": 16}
    values |= {"augmentations_per_image": 2, "augmentation_prob": 0.4, "init_epoch": 6, "epochs": 6}
    return partial(train_little, shapes, tmp_path / "out", **values, init_lr=0.05, lrate=0.05)


def numbers(run):
    """A run without its times and without what says where phase 0 came from."""
    phases = []
    for phase in run["phases"]:
        training = {key: value for key, value in phase["training"].items() if key not in ("seconds", "reused")}
        phases.append({**phase, "training": training, "seconds": None})
    return {**run, "phases": phases, "seconds": None, "seconds_reused": None}


@pytest.mark.parametrize("method", long_but(("icarl", "wa", "der", "memo"), "icarl"))
def test_every_method_learns_and_reports(train, tmp_path, method, capsys):
    assert train(model_name=method, init_epoch=10, epochs=10) == 0
    out = tmp_path / "out"
    written = results(out)
    (run,) = written["runs"]
    assert run["finished"]
    assert run["seed"] == 1993
    assert sorted(run["class_names"]) == sorted(SHAPES)
    assert [phase["classes_seen"] for phase in run["phases"]] == [2, 4, 6]
    for phase in run["phases"]:
        names = run["class_names"][: phase["classes_seen"]]
        assert list(phase["cnn"]["per_class"]) == names
        assert len(phase["cnn"]["per_phase"]) == phase["phase"] + 1
        assert phase["cnn"]["top5"] >= phase["cnn"]["top1"]
        assert phase["nme"] is not None
        assert phase["memory"]["units_total"] == pytest.approx(len(names) * (2 + 4 / 24))
        assert phase["memory"]["nb_real"] == 2 * len(names)
        assert phase["memory"]["nb_synthetic"] == 4 * len(names)
        assert phase["seconds"]["total"] > 0
        with (out / "seed1993" / f"confusion_phase{phase['phase']:02d}.csv").open() as file:
            rows = list(csv.reader(file))
        assert rows[0][1:] == names
        assert sum(int(cell) for row in rows[1:] for cell in row[1:]) == 6 * len(names)
    classifier = "nme" if method == "icarl" else "cnn"
    assert run["phases"][-1][classifier]["top1"] > 100 / 6 + 10  # well above chance, old classes included
    assert run["phases"][-1][classifier]["old"] > 0
    top1 = [phase["cnn"]["top1"] for phase in run["phases"]]
    assert run["cnn"]["average_incremental_accuracy"] == pytest.approx(sum(top1) / 3)
    assert written["summary"]["cnn"]["top1"]["mean"] == pytest.approx(top1)
    assert json.loads((out / "config.json").read_text())["model_name"] == method
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    log = (out / "log.txt").read_text()
    assert "phase 2 (3 of 3), 6 classes" in log
    assert "epoch 10/10" in log
    assert [path.name for path in (out / "seed1993" / "checkpoints").iterdir()] == ["phase02.pt"]
    assert "average" in capsys.readouterr().out


KILLED = ("simplecil", "icarl", "ewc", "memo", "bic", "podnet", "foster")


@pytest.mark.parametrize(
    ("method", "killed_in"),
    long_but([(method, 1) for method in KILLED] + [("icarl", 0), ("memo", 0)], ("simplecil", 1)),
)
def test_a_killed_run_ends_with_the_same_numbers(train, tmp_path, monkeypatch, capsys, method, killed_in):
    short = {"model_name": method, "init_epoch": 2, "epochs": 2}
    if method not in ("icarl", "memo"):  # what they carry on besides the network shows in one further phase
        short |= {"init_cls": 4, "init_epoch": 1, "epochs": 1, "compression_epochs": 1, "ft_epochs": 1}
    assert train(**short, output_dir=str(tmp_path / "whole")) == 0
    choose = Trainer.choose_exemplars

    def killed(trainer):
        if trainer.method.phase == killed_in:
            raise KeyboardInterrupt
        return choose(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "choose_exemplars", killed)
        assert train(**short) == 130
    assert "stopped" in capsys.readouterr().err
    assert train(**short) == 0
    said = capsys.readouterr().out
    assert ("going on after 1 of" if killed_in else "phase 0 is not trained again") in said
    whole, resumed = (results(tmp_path / name)["runs"][0] for name in ("whole", "out"))
    assert numbers(resumed) == numbers(whole)
    states = [
        torch.load(max((tmp_path / name / "seed1993" / "checkpoints").iterdir()), weights_only=True)
        for name in ("whole", "out")
    ]
    assert states[0]["memory"] == states[1]["memory"]
    assert list(states[0]["network"]) == list(states[1]["network"])
    for key, tensor in states[0]["network"].items():
        assert torch.equal(tensor, states[1]["network"][key]), key


def test_a_finished_run_is_reused(train, tmp_path, monkeypatch, capsys):
    assert train("epochs=1", "init_epoch=1") == 0
    before = results(tmp_path / "out")
    (file,) = (tmp_path / "out" / "seed1993" / "checkpoints").glob("*.pt")
    confusions = [record["cnn"]["confusion"] for record in torch.load(file, weights_only=True)["records"]]
    assert all(isinstance(confusion, torch.Tensor) for confusion in confusions), "lists take long to write and read"
    monkeypatch.setattr(trainer, "train_stage", None)
    assert train("epochs=1", "init_epoch=1") == 0
    assert "all 3 phases are done already" in capsys.readouterr().out
    assert results(tmp_path / "out") == before


def test_several_seeds(train, tmp_path):
    assert train("seed=[1]", "epochs=1", "init_epoch=1") == 0
    assert train("seed=[1,2]", "epochs=1", "init_epoch=1") == 0  # the first seed's run is taken as it is
    written = results(tmp_path / "out")
    one, two = written["runs"]
    assert written["summary"]["seeds"] == [1, 2]
    assert one["class_names"] != two["class_names"]
    a, b = (run["cnn"]["average_incremental_accuracy"] for run in (one, two))
    assert written["summary"]["cnn"]["average_incremental_accuracy"]["mean"] == pytest.approx((a + b) / 2)
    assert written["summary"]["cnn"]["average_incremental_accuracy"]["std"] == pytest.approx(abs(a - b) / 2**0.5)


def test_the_folders_are_listed_once_for_all_class_orders(train, tmp_path, monkeypatch):
    listed, lister = [], DataManager.__init__
    monkeypatch.setattr(
        DataManager, "__init__", lambda self, *given, **how: (listed.append(self), lister(self, *given, **how))[1]
    )
    assert train("seed=1,2,3", "epochs=1", "init_epoch=1", "increment=4") == 0
    assert len(listed) == 1
    assert len({tuple(run["class_names"]) for run in results(tmp_path / "out")["runs"]}) == 3


@pytest.mark.long
def test_phase_0_is_shared_where_it_may_be(train, tmp_path, capsys):
    cache = tmp_path / "cache"
    common = {"phase0_cache": str(cache), "epochs": 1, "init_epoch": 1, "increment": 4}
    assert train(**common, output_dir=str(tmp_path / "a"), model_name="icarl") == 0
    first = results(tmp_path / "a")["runs"][0]
    assert len(list(cache.iterdir())) == 1
    # Another method, another number of exemplars: the same phase 0.
    assert train(**common, output_dir=str(tmp_path / "b"), model_name="memo", syn_per_class=0) == 0
    assert "phase 0 is not trained again" in capsys.readouterr().out
    second = results(tmp_path / "b")["runs"][0]
    assert second["phases"][0]["cnn"] == first["phases"][0]["cnn"]
    assert second["seconds_reused"] == first["phases"][0]["training"]["seconds"]
    # Another schedule, or other copies among the training images: not.
    for number, values in enumerate(({"init_lr": 0.01}, {"augmentation_prob": 0.0}, {"model_seed": 5}, {"seed": [3]})):
        assert train(**{**common, **values}, output_dir=str(tmp_path / f"c{number}")) == 0
        assert "phase 0 is not trained again" not in capsys.readouterr().out
        assert len(list(cache.iterdir())) == 2 + number


def test_workers_change_nothing(train, tmp_path):
    for workers in (0, 1):
        assert train(output_dir=str(tmp_path / str(workers)), num_workers=workers, epochs=1, init_epoch=1) == 0
    a, b = (results(tmp_path / str(workers))["runs"][0] for workers in (0, 1))
    assert numbers(a) == numbers(b)


def test_all_checkpoints_are_kept_on_request(train, tmp_path):
    assert train("keep_checkpoints=0", "epochs=1", "init_epoch=1") == 0
    names = sorted(path.name for path in (tmp_path / "out" / "seed1993" / "checkpoints").iterdir())
    assert names == ["phase00.pt", "phase01.pt", "phase02.pt"]


def test_copies_on_demand(train, tmp_path, own_data_dir, monkeypatch, capsys):
    """Only the chosen exemplars are regenerated, in time for the next phase and not after the last one."""
    paths = make_shapes(own_data_dir, name="Bare", copies=0)
    shutil.rmtree(paths.folder("kept"))
    asked = []

    class Stub:
        def __init__(self, paths, options, *, default, copies, fabric):
            assert (options, default.preset.name, copies) == ("--model tiny --resolution high", "high", 2)

        def state(self, exemplars):
            return {}

        def summary(self, exemplars):
            return {"made_by": [], "files": 0, "digest": ""}

        def make(self, images, with_copies):
            asked.append((len(images), with_copies))
            made = 0
            for image in images:
                paths.kept(image).parent.mkdir(parents=True, exist_ok=True)
                paths.kept(image).write_bytes(encode(np.zeros((32, 32))))
                for k in range(2 if with_copies else 0):
                    paths.copy(image, k).parent.mkdir(parents=True, exist_ok=True)
                    made += not paths.copy(image, k).exists()
                    Image.new("RGB", (32, 32)).save(paths.copy(image, k))
            return made

    monkeypatch.setattr(on_demand, "OnDemand", Stub)
    values = {"data_dir": str(own_data_dir), "dataset": "Bare", "regenerate": "on_demand"}
    values["regenerate_options"] = "--model tiny --resolution high"
    assert train(**values, augmentation_prob=0, epochs=1, init_epoch=1, nme=False) == 0
    # 2 new classes x 4 synthetic exemplars; after the last phase prompts alone, as nobody looks at copies any more
    assert asked == [(8, False), (8, True), (8, False), (8, True), (8, False), (8, False)]
    assert (
        "copies on demand: 32 made, against 144 of all train images made ahead (77.8% saved)" in capsys.readouterr().out
    )
    asked.clear()
    again = {"augmentation_scope": "exemplars", "output_dir": str(tmp_path / "again"), "model_name": "icarl"}
    assert train(**values, **again, epochs=1, init_epoch=1) == 0
    assert (
        asked == [(12, False), (12, True)] * 3
    )  # real exemplars have copies too, and NME reads those of the last phase


def test_the_cost_of_an_edge_map_is_known_before_it_is_made(own_data_dir):
    paths = make_shapes(own_data_dir, name="Bare", copies=0)
    image = paths.images("red disc")[0]

    def cost(resolution):
        return Cost(parse_settings("--model tiny", resolution)[0], paths).units(image)

    assert cost("high") == cost("low") == pytest.approx(1 / 24)  # of the one that is there and has a size
    shutil.rmtree(paths.folder("kept"))
    assert cost("high") == pytest.approx(1 / 24)
    assert cost("low") == pytest.approx(256 * 256 / (32 * 32 * 24))


@pytest.mark.long
def test_a_memory_of_fixed_size(train, tmp_path):
    """12 units for all classes: 3, 1.5, then 2 units each, of which a third goes to prompts at 1/24."""
    values = {"fixed_memory": False, "memory_size": 12, "real_per_class": 4, "syn_per_class": 8, "model_name": "replay"}
    for selection in ("herding", "random", "closest"):
        out = tmp_path / selection
        assert train(**values, exemplar_selection=selection, output_dir=str(out), epochs=1, init_epoch=1) == 0
        memories = [phase["memory"] for phase in results(out)["runs"][0]["phases"]]
        assert [memory["units_budget"] for memory in memories] == [6, 3, 2]
        # 6, 3 and 2 units over 4 + 8/24: factors 1.38, 0.69 and 0.46
        assert [(m["nb_real"], m["nb_synthetic"]) for m in memories] == [(2 * 5, 2 * 7), (4 * 2, 4 * 5), (6 * 1, 6 * 3)]
        assert all(memory["units_total"] <= memory["units_budget_total"] == 12 for memory in memories)


# Bad input: one clear message, exit code 2

ON_DEMAND = ["regenerate=on_demand", "augmentation_prob=0"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["bach_size=3"], ["bach_size", "batch_size"]),
        (["batch_size=many"], ["batch_size must be a valid integer"]),
        (["real_per_class=3"], ["over the memory budget", "3 real + 4 edges x 1/24 = 3.17 units > 3"]),
        (["init_cls=7"], ["init_cls is 7", "6 classes"]),
        (["augmentations_per_image=3"], ["72 of 216 copies are missing", "compress/run.py", "--seeds 3"]),
        (["real_per_class=0", "syn_per_class=0"], ["wa needs exemplars", "real_per_class + syn_per_class"]),
        (["pretrained=true"], ["pretrained", "no weights"]),
        (["fixed_memory=false", "memory_size=1"], ["memory_size = 1", "each of 6 classes"]),
        (["device=[99]"], ["device", "99"]),
        (["dataset=Nowhere"], ["Nowhere", "is not a folder"]),
        (["data_dir=/nowhere"], ["/nowhere", "data_dir"]),
        (["lrate=1e30", "init_lr=1e30"], ["diverged", "init_lr"]),
        ([*ON_DEMAND, "regenerate_options=--model /no.pth"], ["regenerate_options", "/no.pth"]),
        ([*ON_DEMAND, "regenerate_options=--step 3"], ["regenerate_options", "--step 3", "--help"]),
        ([*ON_DEMAND, "regenerate_options=--steps 0"], ["regenerate_options", "--steps", "at least 1"]),
        ([*ON_DEMAND, "regenerate_options=--model 'x"], ["regenerate_options", "quotation"]),
        (["output_dir=/proc/nowhere"], ["output_dir"]),
    ],
)  # fmt: skip
def test_bad_configs(train, capsys, overrides, words):
    assert train(*overrides) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("methods", ["icarl", "bic", "exps/der.json", "yes", "no", "Rebuffi"]),
        ("backbones", ["resnet18", "timm/NAME"]),
        ("forms", ["edges", "text"]),
    ],
)
def test_lists(capsys, kind, words):
    assert main.main(["--list", kind]) == 0
    assert set(words) <= set(capsys.readouterr().out.split())


def test_the_datasets_of_a_folder_are_listed(shapes, capsys):
    for where in (["--data-dir", str(shapes)], [f"--data-dir={shapes}"], [f"data_dir={shapes}"]):
        assert main.main(["--list", "datasets", *where]) == 0
        assert capsys.readouterr().out.splitlines()[0] == "Shapes"


def test_a_lower_rate_goes_on_in_the_folder_of_a_run_that_diverged(train, tmp_path, capsys):
    short = {"init_epoch": 1, "epochs": 1, "checkpoint_every": 1e-9}
    assert train(**short, init_lr=1e30) == 2
    assert "Lower init_lr" in capsys.readouterr().err
    assert train(**short, init_lr=0.01) == 0
    assert results(tmp_path / "out")["config"]["init_lr"] == 0.01
    assert train(**short, init_lr=0.02) == 2
    said = capsys.readouterr().err
    assert "init_lr: 0.01 -> 0.02" in said
    assert "Choose another output_dir, such as" in said
    assert "delete" not in said


def test_two_runs_on_one_class_order(train, tmp_path, capsys):
    (tmp_path / "out" / "seed1993").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "seed1993" / ".lock"):
        assert train(init_epoch=1, epochs=1) == 2
    assert "another process is working on seed 1993" in capsys.readouterr().err


def test_a_phase_0_cache_here(train, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def stop(*_):
        raise UserError("before the first phase")

    monkeypatch.setattr(main.Experiment, "run", stop)
    assert train(phase0_cache=".", cache="disk", syn_per_class=0, augmentation_prob=0) == 2
    assert "before the first phase" in capsys.readouterr().err
    assert [file.suffix for file in (tmp_path / "pixel_cache").iterdir()] == [".pixels"]  # beside it


def test_one_class_for_all_is_said(caplog):
    def phase(number, cnn, nme):
        metrics = [confusion and Metrics(top1=50.0, confusion=confusion) for confusion in (cnn, nme)]
        return Phase.model_construct(phase=number, cnn=metrics[0], nme=metrics[1])

    one, two = [[0, 5], [0, 5]], [[0, 5], [1, 4]]
    main.warn_of_one_class(phase(3, one, two), ["cat", "dog"])
    (record,) = caplog.records
    assert "phase 3: the head (CNN) takes all 10 test images for 'dog'" in record.getMessage()
    caplog.clear()
    main.warn_of_one_class(phase(0, [[5]], None), ["cat"])
    main.warn_of_one_class(phase(3, two, two), ["cat", "dog"])
    assert not caplog.records


def test_a_loss_that_rose_is_said(caplog):
    warn_of_rising_loss("phase 1", [18.6, 30.2, 25.9])
    (record,) = caplog.records
    assert "phase 1: the loss rose from 18.600 to 25.900" in record.getMessage()
    caplog.clear()
    for losses in ([], [1.0], [1.0, 2.0], [2.0, 3.0, 1.9], [-2.0, -1.0, -1.5]):
        warn_of_rising_loss("phase 1", losses)
    assert not caplog.records


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_stopped_run_says(train, tmp_path, monkeypatch, capsys, kept):
    def stop(*_):
        if kept:
            folder = tmp_path / "out" / "seed1993" / "checkpoints"
            folder.mkdir(parents=True)
            (folder / "unfinished.pt").touch()
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(main.Experiment, "run", stop)
    assert train(syn_per_class=0, augmentation_prob=0) == 143
    how = "goes on from the last checkpoint" if kept else "begins anew"
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped; the same command {how}"


def test_no_config(capsys, tmp_path):
    assert main.main([]) == 2
    assert "--config exps/config.json" in capsys.readouterr().err
    assert main.main(["--config", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    assert main.main(["--nonsense"]) == 2
    assert main.main(["--help-config"]) == 0
    assert "memory_per_class" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["train", "test"])
def test_an_empty_class_folder(train, own_data_dir, capsys, mode):
    folder = own_data_dir / "Shapes" / mode / "red disc"
    shutil.rmtree(folder)
    folder.mkdir()
    assert train(data_dir=str(own_data_dir)) == 2
    assert f"{mode}/red disc" in capsys.readouterr().err


UNDECODABLE = [(content, workers) for content in (b"this is text, not a picture", "half") for workers in (0, 1)]


@pytest.mark.parametrize(("content", "workers"), long_but(UNDECODABLE, *UNDECODABLE[::3]))
def test_a_picture_that_does_not_decode(train, own_data_dir, capsys, content, workers):
    image = own_data_dir / "Shapes" / "train" / "red disc" / "003.png"
    image.write_bytes(image.read_bytes()[:200] if content == "half" else content)
    assert train(data_dir=str(own_data_dir), num_workers=workers, epochs=1, init_epoch=1, augmentation_prob=0) == 2
    gc.collect()  # the loader's workers leave with the error's traceback, now and not when the tests end
    said = capsys.readouterr().err
    assert str(image) in said
    assert "Traceback" not in said


def test_checkpoints_of_another_experiment(train, tmp_path, capsys):
    assert train("epochs=1", "init_epoch=1", "init_cls=6") == 0
    assert train("epochs=2", "init_epoch=1", "init_cls=6", "real_per_class=1") == 2
    said = capsys.readouterr().err
    assert "real_per_class: 2 -> 1" in said
    assert "epochs: 1 -> 2" in said
    assert "output_dir" in said
    (tmp_path / "out" / "config.json").unlink()  # the checkpoint itself knows, too
    assert train("epochs=2", "init_epoch=1", "init_cls=6") == 2
    assert "epochs: 1 -> 2" in capsys.readouterr().err


def test_a_damaged_checkpoint(train, tmp_path, capsys):
    assert train("epochs=1", "init_epoch=1", "init_cls=6") == 0
    path = tmp_path / "out" / "seed1993" / "checkpoints" / "phase00.pt"
    whole = torch.load(path, weights_only=True)
    path.write_bytes(path.read_bytes()[:1000])
    assert train("epochs=1", "init_epoch=1", "init_cls=6") == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert "Traceback" not in said
    for part in ("network", "memory", "config"):
        torch.save({**whole, part: {}}, path)
        assert train("epochs=1", "init_epoch=1", "init_cls=6") == 2
        said = capsys.readouterr().err
        assert f"{path} is no checkpoint of this program" in said or part == "config"
        assert str(path) in said
        assert said.count("\n") == 1
