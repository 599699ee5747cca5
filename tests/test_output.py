"""Whose an output folder is, and the results of its class orders."""

import dataclasses
import json
from pathlib import Path

import pytest

from models import catalogue
from tests.test_report import write
from utils.config.read import load_config
from utils.errors import UserError
from utils.results.output import Output
from utils.results.records import read_results


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"dataset": "D", "model_name": "icarl", "convnet_type": "resnet8", "init_cls": 2, "increment": 2})
    )
    return load_config(file, [], methods=catalogue.methods(), backbones=catalogue.backbones())


def finish(config, folder: Path, seed: int) -> dict:
    """One class order, as main.py writes it when it has done all phases."""
    output = Output(config, folder)
    output.claim()
    (entry,) = read_results(write(folder.parent / "made", [seed]) / "results.json").runs
    for phase in entry.phases:
        phase.cnn.confusion = [[1, 0], [0, 1]]
    return output.write(entry).to_json()


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.json")}


def test_results_of_another_experiment_are_not_mixed_in(config, tmp_path):
    out = tmp_path / "out"
    finish(config, out, 1)
    before = content(out)
    for change in ({"memory_per_class": 2.0}, {"epochs": 3}, {"dataset": "E"}):
        with pytest.raises(UserError, match=rf"holds another experiment .*{next(iter(change))}.* {out}-2\."):
            Output(dataclasses.replace(config, **change), out)
    assert content(out) == before
    assert finish(config, out, 2)["summary"]["seeds"] == [1, 2]
    assert finish(dataclasses.replace(config, num_workers=0), out, 3)["summary"]["seeds"] == [1, 2, 3]


def test_nor_those_of_one_that_began_at_the_same_time(config, tmp_path):
    other = Output(dataclasses.replace(config, epochs=3), tmp_path / "out")  # before the first has written anything
    finish(config, tmp_path / "out", 1)
    before = content(tmp_path / "out")["results.json"]
    (entry,) = read_results(write(tmp_path / "made", [2]) / "results.json").runs
    with pytest.raises(UserError, match="holds another experiment"):
        other.write(entry)
    assert content(tmp_path / "out")["results.json"] == before


@pytest.mark.parametrize(("inside", "folder"), [("out", "."), ("out/deeper", ".."), ("", "out")])
def test_a_free_name(config, tmp_path, monkeypatch, inside, folder):
    finish(config, tmp_path / "out", 1)
    (tmp_path / "out" / "deeper").mkdir()
    (tmp_path / "out-2").mkdir()
    monkeypatch.chdir(tmp_path / inside)
    with pytest.raises(UserError, match=r"such as .*out-3"):
        Output(dataclasses.replace(config, epochs=3), Path(folder))


@pytest.mark.parametrize(("name", "words"), [("config.json", "dataset: not given"), ("results.json", "dataset")])
def test_a_record_without_a_key(config, tmp_path, name, words):
    out = tmp_path / "out"
    finish(config, out, 1)
    (out / "seed1" / "checkpoints").mkdir()
    (out / "seed1" / "checkpoints" / "phase00.pt").touch()
    record = json.loads((out / name).read_text())
    del record.get("config", record)["dataset"]
    (out / name).write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf'{words}.* -> "D".*{out}-2'):
        Output(config, out)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"runs": [{}]}', "[]"])
@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_record_that_is_none(config, tmp_path, name, text):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / name
    file.write_text(text)
    (tmp_path / "out" / "seed1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "seed1" / "checkpoints" / "phase00.pt").touch()
    with pytest.raises(UserError, match=rf"{file}|holds another experiment"):
        Output(config, tmp_path / "out")
    assert file.read_text() == text
