"""Copies on a CUDA device against those of a CPU: `make test-gpu`."""

import numpy as np
import pytest
import torch

from compress.generators.controlnet import PictureGenerator
from compress.presets import HIGH
from ControlNet.cldm.model import load_model
from tests.test_gpu_path import requests

pytestmark = pytest.mark.gpu

PRESET = HIGH.changed(size=64, steps=4)


def generator(checkpoint, device, dtype=torch.float32, **how):
    home = "cpu" if how.get("low_memory") else device
    return PictureGenerator(PRESET, load_model(checkpoint, home, dtype), batch_size=2, device=device, **how)


@pytest.fixture(scope="module")
def on_cpu(checkpoint):
    return generator(checkpoint, "cpu")(requests(3, (64, 64)))


@pytest.fixture(autouse=True)
def true_float32():
    """As `utils.devices.launch` sets it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("how", [{}, {"low_memory": True}, {"engine": "compile"}], ids=str)
def test_float32_pictures_are_those_of_a_cpu(checkpoint, on_cpu, how):
    pictures = generator(checkpoint, "cuda", **how)(requests(3, (64, 64)))
    for ours, theirs in zip(pictures, on_cpu, strict=True):
        difference = abs(ours.astype(int) - theirs)
        assert difference.max() <= 3
        assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [{}, {"low_memory": True}, {"engine": "compile"}], ids=str)
def test_pictures_of_16_bits_come_close(checkpoint, on_cpu, dtype, how):
    pictures = generator(checkpoint, "cuda", dtype, **how)(requests(3, (64, 64)))
    for ours, theirs in zip(pictures, on_cpu, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < (4 if dtype == torch.float16 else 16)


def test_a_batch_that_does_not_fit_is_halved(checkpoint):
    made = generator(checkpoint, "cuda")
    made.batch_size = 1 << 14
    asked = requests(2, (512, 512))
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        assert len(made(asked)) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert made.batch_size < 1 << 14


def test_low_memory_leaves_nothing_on_the_device(checkpoint):
    made = generator(checkpoint, "cuda", low_memory=True)
    assert all(parameter.is_pinned() for parameter in made.model.parameters())
    made(requests(1, (64, 64)))
    assert {parameter.device.type for parameter in made.model.parameters()} == {"cpu"}
