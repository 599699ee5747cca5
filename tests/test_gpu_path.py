"""The path of a GPU without one: networks on the meta device, which knows devices, dtypes and shapes, but no values.

Each operation is looked at as it is dispatched: tensors of two devices, or of two dtypes where kernels refuse them, are
an error here as they would be on a GPU.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.forms import Condition, Request
from compress.generators.controlnet import PictureGenerator
from compress.presets import HIGH, LOW, SAMPLERS
from ControlNet.cldm.inference import make_ready
from ControlNet.cldm.model import MODELS_FOLDER, create_empty_model
from ControlNet.cldm.small_decoder import SmallDecoder, use_small_decoder
from ControlNet.ldm.schedule import schedule_buffers
from ControlNet.train import TASKS
from tests.conftest import long_but
from tests.little_model import little_config, little_model

TEXTS = SimpleNamespace(texts=["a", "a, clean", "b", "b, clean", "", "blurry"], classes=2, templates=2, negatives=2)
"""Two classes, each in two templates, and two negative texts."""
ONE_DTYPE = ("linear", "addmm", "mm", "matmul", "conv", "group_norm", "layer_norm", "dot_product", "cat")
"""Operations, by parts of their names, whose kernels take tensors of one dtype."""


class Strict(TorchDispatchMode):
    """Fails where a GPU would.  What is copied to the CPU comes out as ones, as there are no values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name in ("to", "_to_copy", "copy_"):
            if args[0].is_meta and torch.device("cpu") in tree_leaves((args, kwargs)):
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return func(*args, **kwargs)
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        assert len(devices) <= 1, f"{name} of tensors on {devices}"
        if any(part in name for part in ONE_DTYPE):
            dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
            assert len(dtypes) <= 1, f"{name} of tensors of {dtypes}"
        return func(*args, **kwargs)


def on_meta(config, dtype):
    """A model as `load_model` puts it on a GPU: tables and, beside float16 networks, the autoencoder in float32.

    Of the tables, samplers read alphas_cumprod on the CPU: it has its values.
    """
    with torch.device("meta"):
        model = create_empty_model(config)
    for name, part in model.named_children():
        part.to(torch.float32 if dtype == torch.float16 and name == "first_stage_model" else dtype)
    model.alphas_cumprod = torch.tensor(schedule_buffers(1000, 0.00085, 0.012)["alphas_cumprod"])
    return model.eval().requires_grad_(False)


def requests(count, size, text="sushi", start=False, control=True):
    hint = np.zeros(size, np.uint8) if control else None
    picture = np.zeros((*size, 3), np.uint8) if start else None
    return [Request(Path("a.jpg"), k, text, Condition(size, hint, picture), size, False, k) for k in range(count)]


SCENARIOS = {
    **{sampler: {"sampler": sampler} for sampler in SAMPLERS},
    "guess mode": {"text": ""},
    "no edge map": {"control": False},
    "from a picture": {"start": True},
    "odd proportions": {"size": (64, 384)},
    "reused features": {"reuse_every": 2},
    "guidance in a window": {"guidance_window": (0.0, 0.5)},
    "no guidance": {"guidance": 1.0},
    "fresh noise": {"eta": 0.5},
    "low resolution": {"preset": LOW},
    "small decoder": {"small_decoder": True},
    "low memory": {"low_memory": True},
}


def make_pictures(config, dtype, scenario, size, steps=2):
    settings = dict(SCENARIOS[scenario])
    asked = {key: settings.pop(key) for key in ("text", "control", "start") if key in settings}
    size, preset = settings.pop("size", size), settings.pop("preset", HIGH)
    low_memory, small_decoder = (settings.pop(key, False) for key in ("low_memory", "small_decoder"))
    model = on_meta(config, dtype)
    if small_decoder:
        with torch.device("meta"):
            decoder = SmallDecoder(4)
        use_small_decoder(model.first_stage_model, model.scale_factor, decoder.to(model.first_stage_dtype))
    generator = PictureGenerator(
        preset.changed(size=64, steps=steps, **settings), model, batch_size=2, low_memory=low_memory, device="meta"
    )
    with Strict():
        pictures = generator(requests(2, size, **asked))
    assert [picture.shape for picture in pictures] == [(*size, 3)] * 2


def train_step(config, stage, size):
    """A stage's loss on pictures of size x size, and its gradients, as ControlNet/train.py has them on a GPU."""
    settings = {"kl_weight": 1e-6, "text_dropout": 0.1, "hint_dropout": 0.3, "guidance": 9, "skip": 100}
    model = on_meta(config, torch.float32).requires_grad_(True)
    task = TASKS[stage](model, OmegaConf.create({**settings, "target_decay": 0.5}), TEXTS).to("meta").train()
    pictures, labels = torch.zeros(2, 3, size, size, device="meta"), torch.tensor([0, 1], device="meta")
    with Strict():
        losses = task(pictures, pictures[:, :1], labels, torch.Generator().manual_seed(0))
        losses["loss"].backward()
    assert losses["loss"].is_meta
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trained
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []


@pytest.mark.parametrize("stage", long_but(TASKS, "text", "diffusion"))
def test_no_loss_of_controlnet_s_training_mixes_devices(stage):
    train_step(little_config(), stage, 64)


@pytest.mark.slow
@pytest.mark.parametrize("stage", TASKS)
def test_nor_does_one_at_full_size(stage):
    train_step(MODELS_FOLDER / "cldm_v15.yaml", stage, 512)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EACH = [("ddim", "fp32"), *itertools.product(SCENARIOS, ("bf16", "fp16"))]  # float32 has no dtypes to mix


@pytest.mark.parametrize(
    ("scenario", "dtype"), long_but(EACH, ("guess mode", "bf16"), ("from a picture", "fp16"), ("low memory", "fp16"))
)
def test_no_operation_mixes_devices_or_dtypes(scenario, dtype):
    make_pictures(little_config(), DTYPES[dtype], scenario, (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "dtype"), EACH)
def test_nor_at_full_size(scenario, dtype):
    make_pictures(MODELS_FOLDER / "cldm_v15.yaml", DTYPES[dtype], scenario, (512, 512))


def test_what_a_gpu_would_refuse_is_seen():
    there = torch.zeros(2, 2, device="meta")
    with Strict():
        with pytest.raises(AssertionError, match="mul of tensors on"):
            there * torch.zeros(2, 2)
        with pytest.raises(AssertionError, match=r"mm of tensors of"):
            there @ there.half()
        assert torch.equal((there + there).cpu(), torch.ones(2, 2))


@pytest.mark.long
def test_dynamo_compiles_a_step_without_a_graph_break(monkeypatch):
    """One graph a kind of step: guided, and with features to keep or to reuse."""
    torch._dynamo.reset()
    explained = []

    def compile_eagerly(function, **options):
        def call(*args, **kwargs):
            explained.append(torch._dynamo.explain(function)(*args, **kwargs))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    model = little_model()
    make_ready(model, engine="compile")
    generator = PictureGenerator(HIGH.changed(size=64, steps=2, reuse_every=2), model, batch_size=1)
    generator(requests(1, (64, 64)))
    torch._dynamo.reset()
    assert len(explained) == 3  # two steps and the decoder
    assert [each.graph_break_count for each in explained] == [0] * 3
