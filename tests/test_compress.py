"""The command line `compress/run.py`, as its users call it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress import summary
from compress.coding.edge_maps import decode
from compress.generators import build as machine
from compress.generators.controlnet import PictureGenerator
from compress.options import copy_numbers, parse_settings
from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.model import ModelError
from tests.folders import make_dataset, save_noise
from tests.little_run import arguments
from utils.data.paths import DatasetPaths

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine

REPOSITORY = Path(__file__).parent.parent
LABELS = ("apple pie", "crème", "sushi")


@pytest.fixture
def paths(tmp_path):
    return make_dataset(tmp_path / "my train data", LABELS, train=3, size=(48, 40), ending=".JPG")


def made(paths: DatasetPaths) -> dict[str, bytes]:
    files = [*paths.folder("kept").rglob("*"), *paths.folder("copies").rglob("*")]
    return {str(file.relative_to(paths.root)): file.read_bytes() for file in files if file.is_file()}


def copies(paths: DatasetPaths) -> set[str]:
    return {Path(name).parent.name + "/" + Path(name).name for name in made(paths) if name.endswith(".jpg")}


def test_a_whole_run_and_its_rerun(paths, compress, monkeypatch):
    code, out, err = compress("--seeds", "2")
    assert code == 0, err
    assert "edge maps: 9 made, 0 skipped, 0 failed" in out
    assert re.search(r"copies: 18 made, 0 skipped, 0 failed in [\d.]+ s \([\d.e+]+ copies/s\)", out)
    assert re.search(r"on disk: images [\d.]+ kB, edge maps and class texts [\d.]+ kB \(1/[\d.]+\)", out)
    assert f"raw bits: images {9 * 40 * 48 * 24:,}, edge maps {9 * 40 * 48:,} (1/24.0)" in out
    assert "18/18" in err  # the progress bar counts copies
    assert len(made(paths)) == 9 + 18 + 2  # and the settings of both
    before = made(paths)
    monkeypatch.setattr(machine, "load_model", None)  # nothing is missing: the model is not even loaded
    code, out, err = compress("--seeds", "2")
    assert code == 0
    assert "copy/s" not in err, "no bar of nothing"
    assert "edge maps: 0 made, 9 skipped, 0 failed" in out
    assert "copies: 0 made, 18 skipped, 0 failed" in out
    assert "(1/24.0)" in out
    assert made(paths) == before


def test_the_low_resolution_preset(paths, compress):
    code, out, _ = compress("--resolution", "low", "--seeds", "1", "--limit", "1")
    assert code == 0
    with Image.open(paths.images("sushi")[0]) as image:
        assert decode(paths.kept(paths.images("sushi")[0]).read_bytes(), 64, 64).any()
        assert Image.open(paths.copy(paths.images("sushi")[0], 0)).size == image.size
    assert "(1/11.2)" in out  # of 40 x 48 x 24 bits


def test_which_copies(paths, compress):
    assert compress("--classes", "sushi", "--limit", "1", "--seeds", "0,3,12")[0] == 0
    assert copies(paths) == {f"sushi/0000_seed{k}.jpg" for k in ("00", "03", "12")}
    _, out, _ = compress("--classes", "sushi", "--limit", "1", "--seeds", "2")
    assert "copies: 1 made, 1 skipped" in out
    assert "sushi/0000_seed01.jpg" in copies(paths)


def test_which_images(paths, compress):
    assert compress("--classes", "sushi,apple pie", "--limit", "2", "--seeds", "1")[0] == 0
    assert copies(paths) == {f"{label}/000{i}_seed00.jpg" for label in ("sushi", "apple pie") for i in (0, 1)}
    compress("--classes", "crème", "--classes", "sushi", "--seeds", "1", "--limit", "1")
    assert "crème/0000_seed00.jpg" in copies(paths)


def test_a_comma_in_a_class_label(tmp_path, compress):
    data = make_dataset(tmp_path, ["salt, pepper", "sushi"], train=1)
    assert compress("--classes", "salt, pepper", "--seeds", "1", data=data)[0] == 0
    assert copies(data) == {"salt, pepper/0000_seed00.jpg"}


def test_shards_share_the_work(tmp_path, paths, compress):
    for part in ("1/2", "2/2"):
        assert compress("--seeds", "1", "--shard", part)[0] == 0
        assert len(copies(paths)) == {"1/2": 5, "2/2": 9}[part]
    whole = make_dataset(tmp_path / "whole", LABELS, train=3, size=(48, 40), ending=".JPG")
    compress("--seeds", "1", data=whole)
    assert made(whole) == made(paths)


def test_overwriting_with_other_settings(paths, compress):
    compress("--seeds", "1", "--limit", "1")
    before = made(paths)
    code, out, _ = compress("--seeds", "1", "--limit", "1", "--steps", "2", "--overwrite")
    assert code == 0
    assert "edge maps: 3 made, 0 skipped" in out
    assert "copies: 3 made, 0 skipped" in out
    after = made(paths)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {name for name in before if name.endswith(".jpg")}


def test_texts_of_the_command_line(paths, compress, monkeypatch):
    encoded = []

    def note(model, texts, of=ControlLDM.get_learned_conditioning):
        encoded.extend(texts)
        return of(model, texts)

    monkeypatch.setattr(ControlLDM, "get_learned_conditioning", note)
    compress("--seeds", "1", "--classes", "sushi", "--prompt-template", "a photo of {label}", "--negative-prompt", "no")
    assert set(encoded) == {"a photo of sushi", "no"}
    encoded.clear()
    (paths.root / "class_names.json").write_text('{"sushi": "a plate of sushi"}')
    compress("--seeds", "1,", "--classes", "sushi", "--replace")
    assert "a plate of sushi, best quality, extremely detailed" in encoded


def test_a_dry_run_tells_and_writes_nothing(paths, compress):
    compress("--seeds", "1", "--limit", "1")
    before = made(paths)
    save_noise(paths.folder("train") / "sushi" / "x.jpg", 0).write_text("no picture")
    code, out, _ = compress("--seeds", "2", "--dry-run")
    assert code == 0
    assert "10 images" in out
    assert "edge maps: 7 to make, 3 there already" in out
    assert "copies: 17 to make, 3 there already" in out
    assert re.search(r"expected: [\d.]+ kB of edge maps, [\d.]+ kB of copies, about [\d.]+ s for the copies", out)
    assert made(paths) == before


def test_a_dry_run_without_weights_still_counts(paths, compress):
    code, out, err = compress("--seeds", "2", "--dry-run", "--model", "/no/such.pth")
    assert code == 0, err
    assert "copies: 18 to make, 0 there already" in out
    assert re.search(r"expected: [\d.]+ kB of edge maps, [\d.]+ kB of copies\n", out)
    assert "the time is unknown: " in out
    assert "/no/such.pth" in out
    assert not made(paths)


def test_the_preset_that_fits(tmp_path, compress):
    small = make_dataset(tmp_path / "small", ["a"], train=1, size=(48, 40))
    large = make_dataset(tmp_path / "large", ["a"], train=1, size=(300, 280))
    for data, preset in ((small, "low"), (large, "high")):
        code, out, _ = compress("--resolution", "auto", "--dry-run", "--model", "/no/such.pth", data=data)
        assert (code, f"Toy, {preset} resolution: 1 images" in out) == (0, True)


def test_what_a_dry_run_expects_comes_close(paths, compress):
    _, out, _ = compress("--seeds", "1", "--dry-run")
    expected = re.search(r"expected: ([\d.]+) kB of edge maps, ([\d.]+) kB of copies", out)
    compress("--seeds", "1")
    for kind, kilobytes in zip(("edge_maps", "exemplars"), expected.groups(), strict=True):
        true = sum(len(content) for name, content in made(paths).items() if name.startswith(kind)) / 1000
        assert float(kilobytes) == pytest.approx(true, rel=0.5)


def test_bad_images_and_empty_classes_are_listed(paths, compress):
    train = paths.folder("train")
    (train / "sushi" / "text.jpg").write_text("no picture")
    cut = save_noise(train / "crème" / "cut.jpg", 1)
    cut.write_bytes(cut.read_bytes()[:500])
    (train / "empty").mkdir()
    code, out, _ = compress("--seeds", "2")
    assert code == 1
    assert "edge maps: 9 made, 0 skipped, 2 failed" in out
    assert "copies: 18 made, 0 skipped, 4 failed" in out
    listed = out[out.index("failed:\n") :].splitlines()[1:]
    assert len(listed) == 3
    assert f"{train / 'empty'}: no images" in listed[0]
    assert str(cut) in listed[1]
    assert "not a picture" in listed[2]
    assert len(copies(paths)) == 18


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "None"], ["None", "train", "--data-dir"]),
        (["--classes", "suschi"], ["suschi", "did you mean 'sushi'"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--device", "tpu"], ["device", "tpu"]),
        (["--model", "/no/such.pth"], ["/no/such.pth"]),
        (["--model", __file__], [__file__]),
        (["--seeds", "0"], ["--seeds", "0 copies"]),
        (["--seeds", "a"], ["--seeds", "'a'"]),
        (["--seeds", "-1"], ["--seeds"]),
        (["--seeds", "18446744073709551616"], ["--seeds", "18446744073709551616 is too large"]),
        (["--seeds", "0,18446744073709551616"], ["--seeds", "too large"]),
        (["--quality", "101"], ["--quality", "101"]),
        (["--shard", "0/2"], ["--shard", "0/2"]),
        (["--shard", "3/2"], ["--shard", "3/2"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--steps", "1001"], ["--steps", "1001"]),
        (["--size", "10"], ["--size", "64"]),
        (["--size", "700"], ["--size", "700", "704"]),
        (["--guidance", "nan"], ["--guidance", "nan"]),
        (["--prompt-template", "{lable}"], ["{label}", "{lable}"]),
        (["--resolution", "middle"], ["--resolution", "middle"]),
        (["--frob"], ["--frob"]),
    ],
)
def test_a_wrong_command_gets_one_line_and_exit_code_2(paths, compress, options, words):
    code, _, err = compress(*options)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") <= 2
    assert all(word in err for word in words)
    assert not made(paths)


def test_a_dataset_without_any_image_is_a_wrong_command(tmp_path, compress):
    (tmp_path / "Bare" / "train" / "sushi").mkdir(parents=True)
    code, _, err = compress(data=DatasetPaths(tmp_path, "Bare"))
    assert code == 2
    assert "no images" in err


def test_a_size_that_is_named_is_generated(tmp_path, compress, monkeypatch):
    """No copy is generated smaller than it says, as the published formula would make it: it halves 768 x 1152."""
    data = make_dataset(tmp_path / "wide", ["a"], train=1, size=(60, 40))
    sizes = []

    def note(generator, batch, steps=None):
        sizes.extend(request.condition.size for request in batch)
        return [np.zeros((*request.condition.size, 3), np.uint8) for request in batch]

    monkeypatch.setattr(PictureGenerator, "__call__", note)
    for size, expected in (("640", "640 x 960"), ("768", "768 x 1152"), ("1024", "1024 x 1536")):
        options = ["--size", size, "--seeds", "1", "--overwrite"]
        for more in (["--dry-run"], []):
            code, out, err = compress(*options, *more, data=data)
            assert code == 0, err
            assert f"1 images, generated at {expected} pixels\n" in out
    assert {f"{height} x {width}" for height, width in sizes} == {"640 x 960", "768 x 1152", "1024 x 1536"}


def test_copies_of_a_size_that_an_earlier_version_halved_are_other_copies(paths, compress):
    """They are recorded without the limit of pixels, which was the published one for all sizes."""
    options = ["--size", "768", "--seeds", "1", "--classes", "sushi", "--limit", "1"]

    def forget_limit():
        for file in paths.root.glob("*/settings*.json"):
            record = json.loads(file.read_text())
            record["settings"].pop("max_pixels", None)
            file.write_text(json.dumps(record))

    compress("--seeds", "1", "--classes", "sushi", "--limit", "1")
    forget_limit()
    assert compress("--seeds", "1", "--classes", "sushi", "--limit", "1")[0] == 0  # of 64 pixels: nothing has changed
    (file,) = paths.folder("copies").glob("settings*.json")
    record = json.loads(file.read_text())
    record["settings"] |= {"shorter_side": 768, "small_shorter_side": 768}
    file.write_text(json.dumps(record))
    code, _, err = compress(*options)
    assert code == 2
    assert "max pixels 786432 -> 1769472" in err


def test_pictures_that_the_limit_makes_smaller_are_counted(tmp_path, compress):
    data = make_dataset(tmp_path / "long", ["a"], train=2, size=(50, 40))
    save_noise(data.folder("train") / "a" / "long.jpg", 1, size=(400, 40))
    unmeasured = ("--dry-run", "--model", "/no/such.pth")
    code, out, _ = compress("--size", "128", *unmeasured, data=data)
    assert (code, "3 images, generated at 128 x 128 to 128 x 1280 pixels\n" in out) == (0, True)
    _, out, _ = compress("--size", "512", *unmeasured, data=data)
    assert "generated at 512 x 640 to 256 x 2560 pixels; 1 are so long that the limit of 786,432 pixels makes" in out


def test_folders_that_can_not_be_written_to_are_found_before_the_model_is_loaded(paths, compress, monkeypatch):
    monkeypatch.setattr(machine, "load_model", None)
    paths.folder("copies").write_text("a file where a folder should be")
    code, _, err = compress("--seeds", "1")
    assert (code, err.count("\n")) == (2, 1)
    assert f"can't write to {paths.folder('copies')}" in err


def test_a_link_to_nowhere_among_edge_maps_is_named(paths, compress, tmp_path):
    compress("--seeds", "1", "--limit", "1", "--classes", "sushi")
    kept = paths.find_kept(paths.images("sushi")[0])
    kept.unlink()
    kept.symlink_to(tmp_path / "nowhere.webp")
    code, out, _ = compress("--seeds", "2", "--limit", "1", "--classes", "sushi")
    assert code == 1
    assert f"{kept}: No such file or directory" in out


def test_settings_that_surprise_are_said(paths, compress, caplog):
    for options, words in (
        (["--steps", "30"], "--steps 30 of ddim makes 31 steps"),
        (["--guidance", "0"], "--guidance 0 follows the negative prompt alone"),
    ):
        caplog.clear()
        assert compress(*options, "--dry-run", "--model", "/no/such.pth")[0] == 0
        assert words in caplog.text
    caplog.clear()
    compress("--steps", "20", "--guidance", "1", "--dry-run", "--model", "/no/such.pth")
    assert "steps" not in caplog.text
    assert "guidance" not in caplog.text


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--low-memory"], "low_memory", True),
        (["--compile"], "engine", "compile"),
        pytest.param(["--engine", "compile"], "engine", "compile", marks=pytest.mark.long),
    ],
)
def test_what_suits_the_machine_changes_no_settings(paths, compress, monkeypatch, options, name, value):
    given = {}

    def note(generator, preset, model, of=PictureGenerator.__init__, **how):
        given.update(how)
        of(generator, preset, model, **{**how, "engine": "torch"})

    monkeypatch.setattr(PictureGenerator, "__init__", note)
    compress("--seeds", "1", "--limit", "1")
    assert (given["low_memory"], given["engine"]) == (False, "torch")
    code, out, err = compress("--seeds", "2", "--limit", "1", *options)
    assert code == 0, err
    assert given[name] == value
    assert "copies: 3 made, 3 skipped" in out


def test_the_download_happens_when_asked_and_only_then(paths, compress, monkeypatch):
    def download():
        raise ModelError("no network here")

    monkeypatch.setattr(machine, "download_sd15", download)
    code, _, err = compress("--model", "sd15", "--download")
    assert (code, err) == (2, "error: no network here\n")
    code, _, err = compress("--model", "tiny", "--download")
    assert code == 2
    assert "sd15, and not of tiny" in err
    assert compress("--seeds", "1", "--limit", "1")[0] == 0
    assert compress("--seeds", "1", "--limit", "1", "--verify", "--download")[0] == 0  # needs no model


def test_control_c_gets_one_line(paths, compress, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PictureGenerator, "__call__", interrupt)
    code, _, err = compress()
    assert code == 130
    assert err.splitlines()[-1].startswith("stopped")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("5", [0, 1, 2, 3, 4]), ("1", [0]), ("0,3,7", [0, 3, 7]), ("3,", [3]), ("7, 3,7", [7, 3]), ("0,", [0])],
)
def test_copy_numbers(text, numbers):
    assert copy_numbers(text) == numbers


def test_figures_for_a_person():
    assert [summary.size(count) for count in (0, 999, 1234, 5.7e9, 2e15)] == [
        "0 bytes",
        "999 bytes",
        "1.2 kB",
        "5.7 GB",
        "2000.0 TB",
    ]
    assert [summary.duration(s) for s in (1.25, 59.94, 60, 3723, 360000)] == [
        "1.2 s",
        "59.9 s",
        "0:01:00",
        "1:02:03",
        "100:00:00",
    ]
    assert [summary.ratio(*pair) for pair in ((1, 24), (1, 1), (8, 3))] == ["1/24.0", "1/1.0", "2.67 times"]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


@pytest.mark.long
def test_sigkill_and_rerun_leave_the_tree_of_an_undisturbed_run(tmp_path, paths, checkpoint, compress):
    """The script by its path, from another folder; killed once there are copies; then run again as a module.

    In bf16, which is "auto" on some CPUs, copies depend on how many are made at a time, and the second run has others.
    """
    options = ["--seeds", "12", "--precision", "fp32"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "compress" / "run.py"), *arguments(paths, checkpoint), *options],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while len(copies(paths)) < 10 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 10 <= len(copies(paths)) < 108
    # A process that is killed while it writes leaves this behind.
    leftover = paths.folder("copies") / "apple pie" / f".{socket.gethostname()}.{process.pid}-half.tmp"
    leftover.write_bytes(b"half")
    finished = subprocess.run(
        [sys.executable, "-m", "compress.run", *arguments(paths, checkpoint), *options],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"copies: \d+ made, [1-9]\d* skipped, 0 failed", finished.stdout)
    whole = make_dataset(tmp_path / "whole", LABELS, train=3, size=(48, 40), ending=".JPG")
    compress(*options, data=whole)
    assert len(copies(paths)) == 108
    assert made(paths) == made(whole)


def test_the_fast_preset_sets_what_is_not_given():
    def settings(text):
        form, _, words, _ = parse_settings(text, "high")
        return form.copy_settings(), words

    assert settings("") == settings("--preset paper")
    assert settings("--preset fast") == settings("--sampler dpm++2m --steps 4")
    assert settings("--preset fast --steps 8 --guidance 1") == settings("--steps 8 --guidance 1 --sampler dpm++2m")
    assert settings("")[0]["sampling"]["steps"] == 20
