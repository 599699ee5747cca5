"""The benchmarks of copies count the steps that are made and the memory in use, and rank equal pictures alone."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from compress.generators.controlnet import PictureGenerator
from compress.presets import HIGH
from ControlNet.cldm.model import load_model
from tests.bench import bench_controlnet as bench
from tests.bench import bench_herding, bench_pycil
from tests.bench.bench_memory import Tracker, der_peak

DDIM = HIGH.changed(size=64, sampler="ddim", steps=20)


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["bench_controlnet.py", *map(str, options)])
        bench.main()
        return capsys.readouterr().out

    return call


@pytest.mark.long
def test_pictures_of_other_steps_are_not_ranked(command, checkpoint):
    """Of DDIM's 1000 timesteps every 333rd: four, of which diffusers takes three.  The command itself."""
    pytest.importorskip("diffusers")
    said = command("--model", checkpoint, "--size", 64, "--batch-sizes", 1, "--rounds", 1, "--measured-steps", 3)
    assert "diffusers against published, 3 steps: " in said
    assert "other pictures (3 steps against 4), not ranked" in said
    rows = [line for line in said.splitlines() if line.startswith("    1  ")]
    assert len(rows) == 3
    assert {row.split()[1] for row in rows if " x" in row} == {"published", "ours"}


@pytest.mark.parametrize("steps", [1, 3])
def test_the_steps_that_are_counted_are_those_that_are_made(checkpoint, steps, monkeypatch):
    model = load_model(checkpoint)
    passes, predict = [], type(model).apply_model
    monkeypatch.setattr(
        type(model), "apply_model", lambda self, x, *rest: (passes.append(x), predict(self, x, *rest))[1]
    )
    job = bench.make_jobs(1, 64)
    for name, contender, of_step in (
        ("published", bench.published(model), 2),
        ("ours", bench.ours(PictureGenerator(DDIM, model)), 1),
    ):
        passes.clear()
        contender(DDIM, job, steps)
        assert len(passes) == of_step * bench.real_steps(name, DDIM, steps)


@pytest.mark.parametrize("name", ["published", "ours", "diffusers"])
def test_a_copy_is_added_up_from_the_steps_that_were_made(name):
    """0.5 s that are done once, and 2 s a step, whichever numbers of steps were timed."""
    for few in (3, 4, 7):
        seconds = {count: 0.5 + 2 * bench.real_steps(name, DDIM, count) for count in (1, few)}
        assert bench.whole_copy(name, DDIM, seconds) == pytest.approx((40.5, 2.0, 0.5))


def test_pictures_that_differ_are_not_ranked(capsys):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    nearly = np.clip(picture + rng.integers(-1, 2, picture.shape), 0, 255).astype(np.uint8)
    other = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)  # 22 dB apart
    contenders = {name: lambda *_, made=made: [made] for name, made in (("a", picture), ("b", nearly), ("c", other))}
    assert bench.comparable(contenders, DDIM, [None], 20, bench.SAME_PSNR["fp32"]) == {"a", "b"}
    said = capsys.readouterr().out.splitlines()
    assert ["not ranked" in line for line in said] == [False, True]
    drawing = HIGH.changed(size=64, sampler="lcm", steps=4)
    assert bench.comparable(contenders, drawing, [None], 4, bench.SAME_PSNR["fp32"]) == {"a", "b", "c"}


def test_herding_is_compared_on_the_same_picks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_herding.py", "--images=40", "--features=8", "--picks=9", "--rounds=1"])
    bench_herding.main()
    assert "herding 9 of 40 images, 8 features: PyCIL " in capsys.readouterr().out
    monkeypatch.setattr(bench_herding, "herding", lambda rows, m: list(range(m)))
    with pytest.raises(SystemExit, match="the picks differ"):
        bench_herding.main()


def test_a_part_within_another_one_is_counted_for_itself(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 9.0, 16.0, 20.0, 21.0])
    monkeypatch.setattr(bench_pycil.Meter, "_now", staticmethod(lambda: (now := next(clock), 10 * now)))
    meter = bench_pycil.Meter()
    with meter.part("train"), meter.part("exemplars"):
        pass
    meter.phase += 1
    meter.timed(lambda: None, "train")()
    assert meter.seconds["train"] == [[3.0 + 7.0, 100.0], [1.0, 10.0]]
    assert meter.seconds["exemplars"] == [[5.0, 50.0]]


def test_a_folder_that_is_no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench_pycil.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="is no checkout of PyCIL"):
        bench_pycil.main()


def test_both_sides_get_the_same_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_pycil, "TRAIN", 3)
    monkeypatch.setattr(bench_pycil, "TEST", 2)
    bench_pycil.make_data(tmp_path, None)
    arrays = np.load(tmp_path / "pictures.npz")
    assert (arrays["train"].shape, arrays["test"].shape) == ((45, 32, 32, 3), (30, 32, 32, 3))
    for row in (0, 4, 44):
        label = int(arrays["train_targets"][row])
        file = tmp_path / "data" / "MINI15" / "train" / f"class_{label:02d}" / f"{row - 3 * label:03d}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(file)), arrays["train"][row])


def test_memory_is_counted_as_long_as_it_is_alive():
    layer = torch.nn.Linear(1000, 500, bias=False, device="meta")
    with torch.inference_mode(), Tracker(layer) as tracker:
        x = torch.empty(10, 1000, device="meta")
        first = layer(x)
        del first
        second = layer(x)
        view = second[:5]
        assert tracker.now == 2_000_000 + 40_000 + 20_000
        both = torch.cat([second, view])
        del both
    assert (tracker.weights, tracker.peak) == (2_000_000, 2_000_000 + 40_000 + 20_000 + 30_000)


def test_a_phase_of_der_takes_its_extractors_and_little_else():
    """Weights, gradients and momentum of the newest extractor, and what its backward pass needs of a batch."""
    first, later = (der_peak("resnet18", 64, 2, phase) for phase in (0, 2))
    weights = first[0]
    assert later[0] == pytest.approx(3 * weights, rel=0.01)
    assert first[1] > 3 * weights
    assert 2 * weights <= later[1] - first[1] < 2.2 * weights
    assert der_peak("resnet18", 64, 16, 0)[1] - first[1] > 7 * (first[1] - 3 * weights) / 2
