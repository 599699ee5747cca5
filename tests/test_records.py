"""Nothing mixed: what compress/run.py remembers of its files, and refuses, replaces, keeps apart or adopts."""

import json
import os
import re
import shlex
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from lightning_fabric import Fabric
from PIL import Image

import main
from compress import plan as plans
from compress.coding.edge_maps import coder_digest
from compress.generators import build as machine
from compress.presets import HIGH, LOW
from compress.records import MadeOtherwise, Recipe, Records, State, read_mark
from compress.training.on_demand import OnDemand
from tests.conftest import long_but
from tests.folders import save_noise
from tests.little_model import little_model, save_checkpoint
from tests.little_run import LABELS, Killed, command, copies, kill_at, little_dataset, tree, without_weights
from tests.regenerating import Maker, edges
from utils.data.paths import DatasetPaths
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    model = little_model()
    next(model.parameters()).data.add_(1)
    return save_checkpoint(model, tmp_path_factory.mktemp("models") / "other.safetensors")


@pytest.fixture
def no_model_from_now(monkeypatch):
    """Call it, and from then on loading a model fails the test, and its weights are not there."""
    return lambda: without_weights(monkeypatch)


def marks(paths: DatasetPaths, label: str = "*") -> list[str | None]:
    return [read_mark(file) for file in paths.folder("copies").glob(f"{label}/*.jpg")]


def record_file(paths: DatasetPaths, mode: str = "copies") -> Path:
    (file,) = paths.folder(mode).glob("settings*.json")
    return file


def remove_marks(paths: DatasetPaths) -> None:
    """Leave the files as earlier versions and the published scripts did: without records and marks."""
    for file in paths.folder("copies").glob("*/*.jpg"):
        with Image.open(file) as image:
            image.load()
        del image.info["comment"]
        image.save(file, quality="keep")
    for mode in ("copies", "kept"):
        for file in paths.folder(mode).glob("settings*.json"):
            file.unlink()


def test_a_copy_and_its_folder_say_what_made_it(paths, compress):
    (paths.root / "class_names.json").write_text('{"sushi": "a plate of sushi"}')
    compress()
    (mark,) = set(marks(paths, "sushi"))
    assert re.fullmatch(r"ESCORT [0-9a-f]{12}", mark)
    assert len(set(marks(paths))) == 2  # the class's text is part of it
    record = json.loads(record_file(paths).read_text())
    assert record["class_texts"] == {"apple pie": "apple pie", "sushi": "a plate of sushi"}
    settings = record["settings"]
    assert settings["sampling"]["steps"] == 1
    assert (settings["shorter_side"], settings["prompt_template"]) == (64, HIGH.prompt_template)
    assert re.fullmatch(r"[0-9a-f]{16}\.[0-9a-f]{8}", settings["model"])
    record = json.loads(record_file(paths, "kept").read_text())
    assert record["settings"] == {
        "edge_coder": coder_digest(),
        **{"edges_of_generated_size": False, "low_threshold": 100, "high_threshold": 200},
    }
    assert record["classes"] == list(LABELS)


def test_the_same_settings_go_on_without_opening_a_copy(paths, compress, monkeypatch, no_model_from_now, made):
    no_model_from_now()
    before = tree(paths.root)
    monkeypatch.setattr(plans, "read_mark", lambda copy: pytest.fail(f"{copy} was opened"))
    assert compress("--dry-run")[0] == 0
    assert tree(paths.root) == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": "2"}, ["copies there", "steps 1 -> 2"]),
        ({"size": "128"}, ["shorter side 64 -> 128"]),
        ({"options": ["--guidance", "7.5"]}, ["guidance 9.0 -> 7.5"]),
        ({"options": ["--quality", "90"]}, ["quality 75 -> 90"]),
        ({"options": ["--precision", "bf16"]}, ["precision 'fp32' -> 'bf16'"]),
        ({"options": ["--sampler", "dpm++2m"]}, ["sampler 'ddim' -> 'dpm++2m'"]),
        ({"options": ["--negative-prompt", "no"]}, ["negative prompt 'longbody", "-> 'no'"]),
        ({"options": ["--prompt-template", "a {label}"]}, ["prompt template", "-> 'a {label}'"]),
        ({"resolution": "low"}, ["edge maps and copies", "edges of generated size False -> True"]),
    ],
)
def test_other_settings_stop_the_run_and_say_why(paths, compress, no_model_from_now, changed, words, made):
    no_model_from_now()
    before = tree(paths.root)
    options = changed.pop("options", [])
    for more in ([], ["--dry-run"], ["--repair"], ["--classes", "sushi"]):
        code, out, err = compress(*options, *more, **changed)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 2
        assert all(word in err for word in [*words, "--replace", "--keep-apart"])
    assert tree(paths.root) == before


def test_another_model_is_another_setting(paths, compress, other_checkpoint, made):
    before = tree(paths.root)
    other = ["--model", str(other_checkpoint)]
    for more in ((), ("--seeds", "3"), ("--dry-run",), ("--repair",)):
        code, out, err = compress(*other, *more)
        assert (code, out) == (2, "")
        assert re.search(r"model '[0-9a-f]{16}\.[0-9a-f]{8}' -> '[0-9a-f]{16}\.[0-9a-f]{8}'", err)
    code, out, _ = compress(*other, "--verify")
    assert code == 1
    assert "8 copies made otherwise" in out
    code, _, err = compress("--base", str(other_checkpoint), "--seeds", "3")
    assert code == 2
    assert "model" in err
    assert tree(paths.root) == before
    assert compress(*other, "--replace")[0] == 0
    assert all(before[f"exemplars/{name}"] != content for name, content in copies(paths).items())


@pytest.mark.parametrize("option", ["--lora", "--decoder", "--base", "--model"])
def test_a_model_that_is_not_there_is_not_taken_for_that_of_finished_copies(paths, compress, monkeypatch, option, made):
    before = tree(paths.root)
    for more in ((), ("--dry-run",), ("--verify",), ("--repair",)):
        code, out, err = compress(option, "nosuch.safetensors", *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "were made with --model" in err
        assert "nosuch.safetensors" in err
    assert tree(paths.root) == before


def test_finished_copies_need_no_weights_if_the_same_model_is_named(paths, compress, checkpoint, monkeypatch):
    compress("--classes", "sushi")
    compress("--classes", "apple pie")
    without_weights(monkeypatch)
    assert compress()[0] == 0
    code, _, err = compress("--lora", "a.safetensors", "--classes", "sushi")
    assert (code, str(checkpoint) in err) == (2, True)


@pytest.mark.long
def test_copies_of_two_precisions_are_never_mixed(tmp_path, compress, capsys):
    """The bundled model, whose pictures differ between them; "auto" on a CPU without bf16 is fp32."""
    paths = little_dataset(tmp_path / "tiny")
    tiny = command(paths, Path("tiny"), capsys)
    assert tiny("--precision", "bf16")[0] == 0
    bf16 = copies(paths)
    assert tiny()[0] == 0  # nothing is missing, and nothing is compared
    assert tiny("--verify")[0] == 0
    next(paths.copies_folder("sushi").iterdir()).unlink()
    before = tree(paths.root)
    for options in ([], ["--precision", "fp32"], ["--seeds", "3"]):
        code, _, err = tiny(*options)
        assert code == 2
        assert "precision 'bf16' -> 'fp32'" in err
        assert "--replace" in err
        assert "--keep-apart" in err
    assert tree(paths.root) == before
    assert tiny("--verify", "--precision", "fp32")[0] == 1
    assert tiny("--replace", "--precision", "fp32")[0] == 0
    fp32 = copies(paths)
    assert fp32.keys() == bf16.keys()
    assert all(fp32[name] != bf16[name] for name in bf16)
    assert tiny("--verify")[0] == 0


def test_copies_of_a_version_without_precision_are_kept(paths, compress, made):
    """Their precision is unknown; what is added to them from now on is known."""
    file = record_file(paths)
    record = json.loads(file.read_text())
    del record["settings"]["precision"]
    file.write_text(json.dumps(record))
    earlier = Records(paths, Recipe(edges(SMALL), record["settings"]["model"], "fp32")).copies
    for copy in paths.folder("copies").glob("*/*.jpg"):
        (old,) = {read_mark(copy)}
        (new,) = earlier.marks(copy.parent.name) - {old}
        copy.write_bytes(copy.read_bytes().replace(old.encode(), new.encode()))
    code, out, _ = compress("--precision", "bf16")
    assert (code, "copies: 0 made, 8 skipped" in out) == (0, True)
    assert compress("--seeds", "3")[0] == 0
    assert len(set(marks(paths, "sushi"))) == 2
    assert compress("--seeds", "3", "--verify")[0] == 0
    code, _, err = compress("--seeds", "4", "--precision", "bf16")
    assert code == 2
    assert "precision 'fp32' -> 'bf16'" in err


def test_replacing_makes_again_what_was_made_otherwise_alone(tmp_path, paths, compress):
    compress(steps="2")
    compress("--classes", "sushi", "--replace")
    kept = copies(paths, "apple pie")
    newer = {name: os.stat(paths.folder("copies") / name).st_mtime_ns for name in copies(paths, "sushi")}
    code, _, err = compress()
    assert code == 2
    assert "in 1 of 2 classes" in err
    code, out, _ = compress("--replace", "--dry-run")
    assert "copies: 4 to make, 4 there already; 4 of those to make are there, made otherwise" in out
    assert copies(paths, "apple pie") == kept
    code, out, _ = compress("--replace")
    assert code == 0
    assert "edge maps: 0 made, 4 skipped" in out
    assert "copies: 4 made, 4 skipped" in out
    assert newer == {name: os.stat(paths.folder("copies") / name).st_mtime_ns for name in newer}
    fresh = little_dataset(tmp_path / "fresh")
    compress(data=fresh)
    assert copies(fresh) == copies(paths)
    assert compress()[0] == 0


@pytest.mark.long
@pytest.mark.parametrize("moment", [1, 0, 5, 8])
def test_a_replacement_that_was_killed_goes_on(tmp_path, paths, compress, monkeypatch, moment, made):
    """To the low resolution: edge maps are replaced, too."""
    with monkeypatch.context() as patch:
        kill_at(moment, patch)
        with pytest.raises(Killed):
            compress("--replace", resolution="low")
    assert compress()[0] == 2  # the old settings are not what was decided
    assert compress("--dry-run", resolution="low")[0] == 0  # decided before: no --replace is needed
    code, out, _ = compress(resolution="low")
    assert code == 0
    assert re.search(r"copies: [1-8] made", out)
    fresh = little_dataset(tmp_path / "fresh")
    compress(data=fresh, resolution="low")
    assert copies(fresh) == copies(paths)
    assert tree(fresh.folder("kept")).items() <= {**tree(paths.folder("kept")), **only_settings(fresh)}.items()
    code, out, _ = compress(resolution="low")
    assert "copies: 0 made, 8 skipped" in out


def only_settings(paths):
    return {name: content for name, content in tree(paths.folder("kept")).items() if name.endswith(".json")}


@pytest.mark.long
def test_an_overwriting_run_that_was_killed_goes_on(paths, compress, monkeypatch, made):
    with monkeypatch.context() as patch:
        kill_at(6, patch)
        with pytest.raises(Killed):
            compress("--overwrite", steps="2")
    code, out, _ = compress(steps="2")
    assert code == 0
    assert "copies: 6 made, 2 skipped" in out
    assert len(set(marks(paths))) == 2  # one for each class


def test_keeping_apart(paths, compress, made):
    before = tree(paths.root)
    assert compress("--keep-apart", "two-steps", steps="2")[0] == 0
    after = tree(paths.root)
    assert {name: after[name] for name in before} == before
    apart = DatasetPaths(paths.data_dir, paths.dataset, "two-steps")
    assert len(copies(apart)) == 8
    assert apart.copies_folder("sushi") == paths.root / "exemplars-two-steps" / "sushi"
    assert apart.find_kept(paths.images("sushi")[0]).is_relative_to(paths.root / "edge_maps-two-steps")
    assert copies(apart) != copies(paths)
    assert compress("--keep-apart", "two-steps")[0] == 2  # the same rules hold there
    code, _, err = compress("--keep-apart", "../elsewhere")
    assert code == 2
    assert "../elsewhere" in err


def test_a_changed_text_counts_for_its_class_alone(paths, compress, made):
    before = copies(paths)
    (paths.root / "class_names.json").write_text('{"sushi": "a plate of sushi"}')
    assert compress("--classes", "apple pie")[0] == 0
    code, _, err = compress()
    assert code == 2
    assert "text of class 'sushi': 'sushi' -> 'a plate of sushi'" in err
    assert "1 of 2 classes" in err
    assert copies(paths) == before
    code, out, _ = compress("--replace")
    assert "copies: 4 made, 4 skipped" in out
    after = copies(paths)
    assert {name for name in after if after[name] != before[name]} == set(copies(paths, "sushi"))
    assert compress()[0] == 0


def test_a_new_class_and_deleted_copies_are_no_change_of_settings(paths, compress, made):
    save_noise(paths.folder("train") / "tarte" / "a.jpg", 9, (48, 40))
    assert compress()[0] == 0
    shutil.rmtree(paths.copies_folder("sushi"))
    code, out, _ = compress("--classes", "sushi", steps="2")  # nothing is left that it could be mixed with
    assert (code, "copies: 4 made" in out) == (0, True)
    assert compress("--classes", "sushi")[0] == 2


def test_copies_without_a_record_are_adopted(paths, compress, made):
    remove_marks(paths)
    before = tree(paths.root)
    code, out, _ = compress("--verify", steps="7")
    assert (code, "8 copies without a record of how they were made (kept)" in out) == (0, True)
    code, out, _ = compress(steps="7")
    assert code == 0
    assert "4 edge maps and 8 copies without a record of how they were made are kept" in out
    assert tree(paths.root) == before
    code, out, _ = compress("--seeds", "3", steps="7")
    assert "copies: 4 made, 8 skipped" in out
    assert before.items() <= tree(paths.root).items()
    assert sorted(marks(paths), key=str).count(None) == 8
    code, out, _ = compress("--seeds", "3", steps="7")  # adopted
    assert (code, "without a record" in out, "0 made, 12 skipped" in out) == (0, False, True)
    code, out, _ = compress("--replace", "--seeds", "3", steps="7")
    assert "copies: 8 made, 4 skipped" in out
    assert None not in marks(paths)


def test_marks_without_a_record_still_tell(paths, compress, made):
    record_file(paths).unlink()
    code, _, err = compress("--seeds", "3", steps="2")
    assert code == 2
    assert "no record is left" in err
    assert compress("--seeds", "3")[0] == 0


def test_a_record_of_a_version_that_knew_fewer_settings(paths):
    folder = paths.folder("copies")
    recorded = Records(paths, Recipe(edges(SMALL), "m", "fp32")).copies
    del recorded.settings["sampling"]["sampler"]
    del recorded.settings["precision"]
    folder.mkdir()
    texts = dict.fromkeys(LABELS, "")
    earlier = {"settings": recorded.settings, "class_texts": {label: label for label in texts}}
    (folder / "settings.json").write_text(json.dumps(earlier))
    later = {**earlier, "settings": {**recorded.settings, "steps": 3}}
    (folder / "settings-2.json").write_text(json.dumps({**later, "class_texts": {"tarte": "tarte"}}))
    mark = recorded.mark("sushi")
    record = Records(paths, Recipe(edges(SMALL), "m", "fp32")).copies
    assert record.state("sushi") is State.SAME
    assert record.marks("sushi") == {mark, record.mark("sushi")}
    record.note(["sushi"])
    assert [file.number for file in record.files] == [1, 2, 3]
    assert record.newest("sushi")["sampler"] == "ddim"
    assert Records(paths, Recipe(edges(SMALL), "m", "bf16")).copies.state("sushi") is State.OTHER
    assert Records(paths, Recipe(edges(SMALL), "m", "bf16")).copies.state("apple pie") is State.SAME
    other = Records(paths, Recipe(edges(SMALL.changed(sampler="dpm++2m")), "m", "fp32")).copies
    assert other.state("sushi") is State.OTHER
    assert other.differences("sushi") == ["sampler 'ddim' -> 'dpm++2m'"]


def test_a_broken_record_is_said(paths, compress, made):
    broken = record_file(paths)
    broken.write_text("{")
    code, _, err = compress()
    assert code == 2
    assert str(broken) in err


SMALL = HIGH.changed(size=64, steps=1)


def images_of(paths):
    return [image for label in paths.classes() for image in paths.images(label)]


def test_shards_that_start_together_share_one_record(tmp_path, paths, checkpoint):
    """Both plan before either writes."""
    model = little_model()
    regenerator = Maker(paths, SMALL, model, batch_size=2)
    todo = [regenerator.plan(images_of(paths)[i::2], [0]) for i in (0, 1)]
    for part in todo:
        regenerator.run(part)
    assert record_file(paths).is_file()
    assert record_file(paths, "kept").is_file()
    whole = little_dataset(tmp_path / "whole")
    Maker(whole, SMALL, model, batch_size=2)(images_of(whole), [0])
    assert tree(whole.root) == tree(paths.root)


def test_shards_that_start_together_with_other_settings_do_not_mix(paths):
    model = little_model()
    one, other = (Maker(paths, SMALL.changed(steps=steps), model, batch_size=2) for steps in (1, 2))
    mine, theirs = one.plan(images_of(paths)[::2], [0]), other.plan(images_of(paths)[1::2], [0])
    one.run(mine)
    before = tree(paths.root)
    with pytest.raises(MadeOtherwise, match="another process"):
        other.run(theirs)
    assert tree(paths.root) == before


def test_what_makes_no_difference_is_no_setting(paths):
    """Guess mode's sampling, for a class that has a text; and an edge map of the image's own size knows no size."""
    texts = Records(paths, Recipe(edges(HIGH), "m", "fp32"))
    texts.copies.note(LABELS)
    texts.kept.note(LABELS)
    unguessed = Records(paths, Recipe(edges(replace(HIGH, guess=None)), "m", "fp32"))
    assert unguessed.copies.state("sushi") is State.SAME
    (paths.root / "class_names.json").write_text('{"sushi": ""}')
    assert Records(paths, Recipe(edges(replace(HIGH, guess=None)), "m", "fp32")).copies.state("sushi") is State.OTHER
    assert Records(paths, Recipe(edges(HIGH.changed(size=256)), "m", "fp32")).kept.state("sushi") is State.SAME
    assert Records(paths, Recipe(edges(LOW), "m", "fp32")).kept.state("sushi") is State.OTHER


def on_demand(paths, checkpoint, steps=1):
    options = f"--model {shlex.quote(str(checkpoint))} --size 64 --steps {steps} --batch-size 4"
    fabric = Fabric(accelerator="cpu", devices=1)
    return OnDemand(paths, options, default=edges(HIGH), copies=2, fabric=fabric)


def test_the_trainer_keeps_the_same_records(paths, compress, checkpoint):
    on_demand(paths, checkpoint).make(paths.images("sushi"))
    assert compress()[0] == 0  # goes on with what it made
    whole = tree(paths.root)
    on_demand(paths, checkpoint).make(images_of(paths))
    assert tree(paths.root) == whole
    with pytest.raises(UserError, match=r"steps 1 -> 2(?s:.*)variant=NAME"):  # before the first phase
        on_demand(paths, checkpoint, steps=2)
    apart = DatasetPaths(paths.data_dir, paths.dataset, "two")
    on_demand(apart, checkpoint, steps=2).make(paths.images("sushi"))
    assert len(copies(apart)) == 4
    assert {name: content for name, content in tree(paths.root).items() if "-two/" not in name} == whole


def test_the_model_of_copies_on_demand_is_freed_before_training_goes_on(paths, checkpoint, monkeypatch):
    models = []

    def note(*arguments, of=machine.load_model):
        model = of(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(machine, "load_model", note)
    maker = on_demand(paths, checkpoint)
    for label in LABELS:
        maker.make(paths.images(label))
        assert [model() for model in models] == [None] * len(models)
    assert len(models) == 2


def test_the_trainer_reads_what_is_kept_apart(paths, compress, tmp_path, capsys):
    compress("--keep-apart", "two")
    config = json.loads((REPOSITORY / "exps" / "demo.json").read_text())
    config |= {"dataset": paths.dataset, "data_dir": str(paths.data_dir), "output_dir": str(tmp_path / "out")}
    config |= {"init_cls": 1, "increment": 1, "real_per_class": 1, "syn_per_class": 1, "augmentations_per_image": 3}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert main.main(["--config", str(file), "variant=two"]) == 2
    said = capsys.readouterr().err
    assert f"4 of 12 copies are missing, the first is {paths.root / 'exemplars-two'}" in said
    assert "--keep-apart two" in said


DRY = ("", "--replace", "--overwrite", "--keep-apart x", "--repair")


@pytest.mark.parametrize("options", long_but(DRY, "--replace"))
def test_a_dry_run_writes_nothing_at_all(paths, compress, options):
    before = tree(paths.root)
    assert compress(*options.split(), "--dry-run")[0] == 0
    assert tree(paths.root) == before
    assert not (paths.root / "exemplars").exists()
