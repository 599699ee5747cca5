"""Prompts -> copies, with the real networks at a very small size and with a recorder in the sampler's place."""

import errno
import itertools
import os
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from compress import regenerate
from compress.generators import batches, controlnet
from compress.presets import HIGH, LOW
from ControlNet.sampling import draw
from tests.conftest import long_but
from tests.folders import save_noise
from tests.little_model import little_model
from tests.little_run import tree
from tests.regenerating import Maker
from utils import files
from utils.data.paths import DatasetPaths
from utils.errors import UserError

SMALL = HIGH.changed(size=64, steps=2)


def drawing(path: Path, seed: int, size=(40, 40), mode="RGB", **options) -> Path:
    """A picture with edges that differ for each seed; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    image = Image.new(mode, size, 20)
    for _ in range(4):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        colour = tuple(rng.integers(60, 256, len(image.getbands())).tolist())
        ImageDraw.Draw(image).rectangle((x, y, x + size[0] // 3, y + size[1] // 3), fill=colour)
    image.save(path, **options)
    return path


@pytest.fixture
def paths(tmp_path):
    """Two classes; RGB, greyscale, a wide picture; endings and names as they come."""
    paths = DatasetPaths(tmp_path / "train", "Toy")  # a data folder that is called like a mode
    train = paths.folder("train")
    drawing(train / "apple pie" / "a.JPEG", 0)
    drawing(train / "apple pie" / "grey.png", 1, mode="L")
    drawing(train / "apple pie" / "wide ü.jpg", 2, size=(100, 50))
    drawing(train / "crème" / "a.jpg", 3)
    drawing(train / "crème" / "a.png", 4, size=(64, 30))
    return paths


def images_of(paths):
    return [image for label in paths.classes() for image in paths.images(label)]


@pytest.fixture(scope="module")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield little_model()
    torch.set_num_threads(threads)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def files_of_classes(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*/*") if file.is_file()]


def test_everything_is_made_and_nothing_twice(paths, model):
    done = []
    regenerator = Maker(paths, SMALL, model, batch_size=2)
    todo = regenerator.plan(images_of(paths), [0, 2])
    assert (todo.kept_missing, todo.copies_missing) == (5, 10)
    result = regenerator.run(todo, done.append)
    assert (result.kept_made, result.copies_made, result.failures) == (5, 10, [])
    assert sum(done) == 10
    assert len(list(paths.folder("kept").rglob("*.*"))) == 5 + 1  # and their settings
    assert {file.name for file in paths.folder("copies").rglob("*.jpg")} == {
        f"{stem}_seed0{k}.jpg" for stem in ("a", "grey", "wide ü", "a.jpg", "a.png") for k in (0, 2)
    }

    before = {file: file.stat().st_mtime_ns for file in paths.root.rglob("*")}
    again = Maker(paths, SMALL, None)(images_of(paths), [0, 2])  # no model is needed
    assert (again.kept_made, again.kept_skipped) == (0, 5)
    assert (again.copies_made, again.copies_skipped) == (0, 10)
    assert {file: file.stat().st_mtime_ns for file in paths.root.rglob("*")} == before
    for name in ("image_bytes", "kept_bytes", "image_bits", "raw_bits"):
        assert getattr(again, name) == getattr(result, name) > 0


def test_copies_are_jpegs_that_stand_in_for_their_image(paths, model):
    images = images_of(paths)
    Maker(paths, SMALL, model, batch_size=4)(images, [0])
    for image in images:
        with Image.open(image) as original, Image.open(paths.copy(image, 0)) as copy:
            assert copy.format == "JPEG"
            assert copy.size == original.size
            assert copy.mode == original.mode  # a greyscale image's copy is greyscale
            assert copy.quantization[0][0] == 8  # quality 75
            assert np.asarray(copy).std() > 10


def test_sizes_are_counted(paths, model):
    images = images_of(paths)
    result = Maker(paths, SMALL, None)(images, [])
    assert result.image_bits == (3 * 40 * 40 - 40 * 40 + 100 * 50 + 64 * 30) * 24 + 40 * 40 * 8
    assert result.raw_bits == 3 * 40 * 40 + 100 * 50 + 64 * 30
    assert result.image_bytes == sum(image.stat().st_size for image in images)
    texts = sum(len(image.parent.name.encode()) for image in images)
    assert result.kept_bytes == texts + sum(paths.kept(image).stat().st_size for image in images)


def test_copies_do_not_depend_on_their_batch(paths, model):
    """Batches of 1 and of 3: sums in another order, at most one level of 255 at fewer than 1 pixel in 100."""
    images = images_of(paths)
    regenerators = {size: Maker(paths, SMALL, model, batch_size=size) for size in (1, 3)}
    jobs = [job for task in regenerators[1].plan(images, range(3)).tasks for job in regenerators[1].requests(task)]
    pictures = {
        size: {
            (job.image, job.copy_number): picture
            for batch in batches(jobs, size)
            for job, picture in zip(batch, regenerator.generate(batch), strict=True)
        }
        for size, regenerator in regenerators.items()
    }
    assert len(pictures[1]) == 15
    for key, one in pictures[1].items():
        difference = abs(one.astype(int) - pictures[3][key])
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_copies_differ_between_numbers_images_and_texts(paths, model):
    images = images_of(paths)
    regenerator = Maker(paths, SMALL, model, batch_size=4)
    regenerator(images, [0, 1])
    same_size = [image for image in images if pixels(image).shape == (40, 40, 3)]
    for first, second in itertools.pairwise(same_size):
        assert abs(pixels(paths.copy(first, 0)) - pixels(paths.copy(second, 0))).mean() > 1
        assert abs(pixels(paths.copy(first, 0)) - pixels(paths.copy(first, 1))).mean() > 1
    task = regenerator.plan(images[:1], [9]).tasks[0]
    (job,) = regenerator.requests(task)
    one, other = regenerator.generate([job, replace(job, text="another thing")])
    assert abs(one.astype(int) - other).mean() > 0.1


def test_a_missing_copy_comes_back_byte_for_byte(paths, model):
    regenerator = Maker(paths, SMALL, model, batch_size=4)
    regenerator(images_of(paths), range(3))
    whole = tree(paths.root)
    paths.copy(paths.images("crème")[0], 1).unlink()
    paths.kept(paths.images("apple pie")[0]).unlink()
    result = regenerator(images_of(paths), range(3))
    assert (result.kept_made, result.copies_made, result.copies_skipped) == (1, 1, 14)
    assert tree(paths.root) == whole


@pytest.mark.parametrize("moment", long_but((4, 1, 9, 20), 4))
def test_a_run_that_ends_anywhere_goes_on_to_the_same_tree(tmp_path, paths, model, monkeypatch, moment):
    class Killed(BaseException):
        pass

    moved, one_at_a_time = [], threading.Lock()

    def replace_until_killed(source, target, move=os.replace):
        with one_at_a_time:
            if len(moved) == moment:
                raise Killed
            moved.append(target)
            move(source, target)

    regenerator = Maker(paths, SMALL, model, batch_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_killed)
        with pytest.raises(Killed):
            regenerator(images_of(paths), range(4))
    files = [*files_of_classes(paths.folder("kept")), *files_of_classes(paths.folder("copies"))]
    settings = [target for target in moved if Path(target).name.startswith("settings")]
    assert len(files) == moment - len(settings)
    regenerator(images_of(paths), range(4))
    undisturbed = DatasetPaths(tmp_path / "undisturbed", "Toy")
    for file, content in tree(paths.folder("train")).items():
        (undisturbed.folder("train") / file).parent.mkdir(parents=True, exist_ok=True)
        (undisturbed.folder("train") / file).write_bytes(content)
    Maker(undisturbed, SMALL, model, batch_size=2)(images_of(undisturbed), range(4))
    assert tree(paths.root) == tree(undisturbed.root)


def test_overwriting(paths, model):
    images = images_of(paths)
    regenerator = Maker(paths, SMALL, model, batch_size=4)
    regenerator(images, [0])
    whole = tree(paths.root)
    paths.copy(images[0], 0).write_bytes(b"something else")
    result = regenerator.run(regenerator.plan(images, [0], existing="overwrite"))
    assert (result.kept_made, result.copies_made, result.copies_skipped) == (5, 5, 0)
    assert tree(paths.root) == whole


def test_a_bmp_edge_map_is_used_and_not_made_again(paths, model):
    image = paths.images("apple pie")[0]
    bmp = paths.kept(image).with_suffix(".bmp")
    bmp.parent.mkdir(parents=True)
    Image.new("L", (40, 40), 0).save(bmp)
    regenerator = Maker(paths, SMALL, model, batch_size=1)
    result = regenerator([image], [0])
    assert (result.kept_made, result.kept_skipped, result.copies_made) == (0, 1, 1)
    assert not paths.kept(image).exists()
    without_edges = paths.copy(image, 0).read_bytes()
    bmp.unlink()
    regenerator.run(regenerator.plan([image], [0], existing="overwrite"))
    assert paths.copy(image, 0).read_bytes() != without_edges


def test_bad_images_are_listed_and_the_others_made(paths, model):
    folder = paths.folder("train") / "apple pie"
    truncated = save_noise(folder / "truncated.jpg", 0, (64, 64))
    truncated.write_bytes(truncated.read_bytes()[:-400])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nothing.jpg")
    done = []
    regenerator = Maker(paths, SMALL, model, batch_size=4)
    result = regenerator.run(regenerator.plan(images_of(paths), [0, 1]), done.append)
    assert {failure.image.name for failure in result.failures} == {
        "truncated.jpg", "text.jpg", "empty.png", "folder.jpg", "dangling.jpg",
    }  # fmt: skip
    assert all(failure.reason and not failure.reason.startswith("/") for failure in result.failures)
    assert (result.kept_made, result.kept_failed) == (5, 5)
    assert (result.copies_made, result.copies_failed) == (10, 10)
    assert sum(done) == 20
    assert len(files_of_classes(paths.folder("copies"))) == 10


def test_a_broken_edge_map_is_listed(paths, model):
    image, other = paths.images("apple pie")[:2]
    paths.kept(image).parent.mkdir(parents=True)
    paths.kept(image).write_bytes(b"\x89PNG")
    result = Maker(paths, SMALL, model, batch_size=1)([image, other], [0])
    assert [failure.image for failure in result.failures] == [image]
    assert str(paths.kept(image)) in result.failures[0].reason
    assert result.copies_made == 1


def test_a_full_disk_stops_the_run_and_a_bad_name_does_not(paths, model, monkeypatch):
    def refuse(number):
        def write_atomically(path, write):
            raise OSError(number, os.strerror(number), str(path))

        return write_atomically

    regenerator = Maker(paths, SMALL, model, batch_size=4)
    monkeypatch.setattr(regenerate, "write_atomically", refuse(errno.ENOSPC))
    with pytest.raises(UserError, match="No space left"):
        regenerator(images_of(paths), [0])
    monkeypatch.setattr(regenerate, "write_atomically", refuse(errno.ENAMETOOLONG))
    result = regenerator(images_of(paths), [0])
    assert (result.copies_made, result.copies_failed, len(result.failures)) == (0, 5, 5)


def test_half_written_files_of_dead_processes_are_removed(paths):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here, an_hour_ago = socket.gethostname(), time.time() - 3700
    folders = [paths.kept(images_of(paths)[0]).parent, paths.copy(images_of(paths)[0], 0).parent]
    others = f".another-host.{gone.pid}-abc.tmp"  # with the number of a process that has died on this one
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / f".{here}.{gone.pid}-abc.tmp").touch()
        (folder / f".{here}.{os.getppid()}-abc.tmp").touch()  # a process that runs may be writing it
        (folder / others).touch()
        (folder / f".another-host.{gone.pid}-old.tmp").touch()
        os.utime(folder / f".another-host.{gone.pid}-old.tmp", (an_hour_ago, an_hour_ago))
        (folder / "mine.tmp").touch()
    Maker(paths, SMALL, None)(images_of(paths), [])
    left = {file.name for folder in folders for file in folder.iterdir() if file.suffix == ".tmp"}
    assert left == {f".{here}.{os.getppid()}-abc.tmp", others, "mine.tmp"}


def test_what_is_being_written_has_the_name_of_its_machine(tmp_path):
    names = []
    files.write_atomically(tmp_path / "a.bin", lambda file: names.extend(os.listdir(tmp_path)))
    assert names[0].startswith(f".{socket.gethostname()}.{os.getpid()}-")
    assert os.listdir(tmp_path) == ["a.bin"]
    half = tmp_path / names[0]
    half.touch()
    assert files.temporary_files(tmp_path) == [half]  # this process has not begun to write: it is another's


@pytest.fixture
def recorded(monkeypatch):
    """What `sample_latents` is asked for, call by call; it returns the noise."""
    calls = []

    def record(model, sampler, schedule, x, cond, uncond, **options):
        call = {"steps": len(schedule.timesteps), "shape": tuple(x.shape), "cond": cond, "uncond": uncond, "x": x}
        calls.append({**call, **options, "control": list(model.control_scales)})
        return x

    monkeypatch.setattr(controlnet, "sample_latents", record)
    return calls


class Decoder(torch.nn.Module):
    """A model that only encodes texts, counting them, and decodes to one value."""

    device, dtype, channels, alphas_cumprod = torch.device("cpu"), torch.float32, 4, torch.linspace(1, 0.01, 1000)

    def __init__(self, value=0.0):
        super().__init__()
        self.control_scales = [1.0] * 13
        self.encoded = []
        self.value = value

    def get_learned_conditioning(self, texts):
        self.encoded += texts
        return torch.full((len(texts), 77, 8), float(len(texts[0])))

    def decode_first_stage(self, latents):
        return torch.full((latents.shape[0], 3, latents.shape[2] * 8, latents.shape[3] * 8), self.value)


def test_what_the_sampler_is_asked_for(paths, recorded):
    model = Decoder()
    Maker(paths, LOW, model, batch_size=2)(images_of(paths), [0, 1, 4])
    assert sorted(model.encoded) == sorted(
        [LOW.negative_prompt, *(f"{label}, clean, clear, bright, neat" for label in ("apple pie", "crème"))]
    )
    assert {call["shape"] for call in recorded} == {(2, 4, 32, 32), (2, 4, 32, 64), (2, 4, 32, 72)}
    for call in recorded:
        assert (call["steps"], call["eta"], call["scales"]) == (50, 0.0, [9.0] * 50)
        (hint,) = call["cond"]["c_concat"]
        assert hint.shape == (2, 3, call["shape"][2] * 8, call["shape"][3] * 8)
        assert set(hint.unique().tolist()) == {0.0, 1.0}
        assert (hint[:, 0] == hint[:, 2]).all()
        assert call["cond"]["c_crossattn"][0].shape == (2, 77, 8)
        assert call["uncond"]["c_concat"][0] is hint
        assert (call["uncond"]["c_crossattn"][0] == len(LOW.negative_prompt)).all()
        assert call["control"] == [1.0] * 13
    first = recorded[0]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert torch.equal(first["x"], draw(first["shape"], generators, torch.device("cpu")))


def test_guess_mode(paths, recorded):
    (paths.root / "class_names.json").write_text('{"crème": ""}', encoding="utf-8")
    model = Decoder()
    Maker(paths, HIGH, model, batch_size=3)(images_of(paths), [0])
    guessing = [call for call in recorded if call["uncond"]["c_concat"] is None]
    assert "best quality, extremely detailed" in model.encoded
    assert guessing
    assert len(guessing) < len(recorded)
    for call in guessing:
        assert (call["steps"], call["scales"]) == (50, [4.5] * 50)
        assert call["cond"]["c_concat"] is not None
        assert call["control"] == pytest.approx([0.825 ** (12 - i) for i in range(13)])
    for call in recorded:
        if call not in guessing:
            assert (call["steps"], call["control"]) == (20, [1.0] * 13)


@pytest.mark.parametrize(("value", "level"), [(-3.0, 0), (-1.0, 0), (0.0, 127), (0.5, 191), (1.0, 255), (2.0, 255)])
def test_decoded_values_become_levels(paths, recorded, value, level):
    image = paths.images("apple pie")[0]
    regenerator = Maker(paths, SMALL, Decoder(value), batch_size=1)
    task = regenerator.plan([image], [0]).tasks[0]
    (picture,) = regenerator.generate(regenerator.requests(task))
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert (picture == level).all()


def test_values_that_are_no_numbers_fail_their_image(paths, recorded):
    images = images_of(paths)
    result = Maker(paths, SMALL, Decoder(float("nan")), batch_size=1)(images[:1], [0])
    assert (result.copies_made, result.copies_failed) == (0, 1)
    assert result.failures[0].image == images[0]
    assert "lower --guidance" in result.failures[0].reason
    assert not files_of_classes(paths.folder("copies"))


def test_memory_that_runs_out_is_said_in_words(paths, monkeypatch):
    def exhausted(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(controlnet, "sample_latents", exhausted)
    with pytest.raises(UserError, match="not even one picture of 64 x 64 pixels fits on cpu"):
        Maker(paths, SMALL, Decoder(), batch_size=1)(images_of(paths), [0])
