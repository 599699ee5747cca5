"""The networks in OpenVINO: torch's results, converted once; and what is said where that can't be."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from compress import run
from compress.generators.build import OPENVINO_BF16, choose_engine, choose_precision
from ControlNet.cldm import openvino_engine
from ControlNet.cldm.inference import make_ready
from tests import forks
from tests import little_model as little
from tests.little_config import relative_error
from tests.little_model import little_model, save_checkpoint
from utils.data.paths import DatasetPaths
from utils.errors import UserError

installed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache, monkeypatch):
    """All tests find what the first of them has converted."""
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(cache))


def ready(model=None, precision="fp32"):
    model = model or little_model()
    make_ready(model, engine="openvino", precision=precision)
    return model


def conditions(batch, height, width, controlled=True):
    generator = torch.Generator().manual_seed(batch)
    hint = (torch.rand((batch, 3, height, width), generator=generator) > 0.9).float()
    context = torch.randn((batch, 77, 32), generator=generator)
    return {"c_concat": [hint] if controlled else None, "c_crossattn": [context]}


def sampled(model, batch=2, height=64, width=64, controlled=True, **how):
    cond, uncond = (conditions(batch + i, height, width, controlled) for i in range(2))
    uncond = {"c_concat": cond["c_concat"], "c_crossattn": [uncond["c_crossattn"][0][:batch]]}
    with torch.inference_mode():
        shape = (batch, 4, height // 8, width // 8)
        generator = torch.Generator().manual_seed(0)
        latents = little.sampled(model, "ddim", 4, shape, cond, uncond, 3.0, generator=generator, **how)
        return latents, model.decode_first_stage(latents)


def assert_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) < 1e-5


@pytest.mark.long
@installed
def test_pictures_are_torchs(caplog):
    plain, other = little_model(), ready()
    assert_close(sampled(other), sampled(plain))
    for batch, height, width in ((1, 64, 64), (3, 64, 128)):  # what was converted serves every batch and size
        assert_close(sampled(other, batch, height, width), sampled(plain, batch, height, width))
    for model in (plain, other):
        model.control_scales = [0.5, *model.control_scales[1:]]
    assert_close(sampled(other), sampled(plain))
    assert not torch.allclose(sampled(other)[0], sampled(ready())[0], atol=1e-3)


@pytest.mark.long
@installed
def test_a_large_network_is_compiled_for_its_first_shape_and_then_for_all(monkeypatch):
    monkeypatch.setattr(openvino_engine, "LARGE", 0)
    compiled = []
    real = openvino_engine._Network._compiled
    monkeypatch.setattr(
        openvino_engine._Network, "_compiled", lambda self, *args: compiled.append(self) or real(self, *args)
    )
    plain, other = little_model(), ready()
    sizes = ((2, 64, 64), (2, 64, 64), (1, 64, 64), (2, 64, 64), (3, 64, 128), (2, 64, 64))
    for size in sizes:
        assert_close(sampled(other, *size), sampled(plain, *size))
    assert [compiled.count(network) for network in dict.fromkeys(compiled)] == [2, 2]  # the step and the decoder


@pytest.mark.long
@installed
@pytest.mark.parametrize("how", [{"controlled": False}, {"reuse_every": 2}])
def test_so_are_those_of_other_ways_to_sample(how):
    assert_close(sampled(ready(), **how), sampled(little_model(), **how))


@pytest.mark.long
@installed
def test_a_network_is_converted_once_for_its_weights(monkeypatch, tmp_path):
    import openvino

    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path))
    converted = []
    real = openvino.convert_model
    monkeypatch.setattr(openvino, "convert_model", lambda *args, **how: converted.append(args) or real(*args, **how))
    latents = torch.randn(1, 4, 8, 8)
    expected = little_model().decode_first_stage(latents)
    assert_close([ready().decode_first_stage(latents)], [expected])
    assert_close([ready().decode_first_stage(latents)], [expected])
    assert len(converted) == 1
    changed = little_model()
    changed.first_stage_model.decoder.conv_out.weight.mul_(2)
    assert not torch.allclose(ready(changed).decode_first_stage(latents), expected, atol=1e-3)
    assert len(converted) == 2
    kept = sorted((tmp_path / "openvino").iterdir())
    for file in kept:
        (file / "network.xml").write_text("half a fi")
    assert_close([ready().decode_first_stage(latents)], [expected])  # what can't be read is made again
    assert len(converted) == 3
    assert not [name for name in (tmp_path / "openvino").iterdir() if name.name.startswith(".")]


SIGNALLED = """
import gc, os, signal
import torch
from tests.test_openvino import ready
latents = torch.randn(1, 4, 8, 8)
for _ in range(2):
    ready().decode_first_stage(latents)
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("answered"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.long
@installed
def test_signals_are_answered_when_the_networks_are_gone(tmp_path):
    """With a CPU that has AMX, OpenVINO itself leaves the process to die of its next signal."""
    ended = forks.run(["-c", SIGNALLED], env={"ESCORT_CACHE_DIR": str(tmp_path)})
    assert (ended.returncode, ended.stdout) == (0, "answered\n"), ended.stderr


@pytest.mark.long
@installed
def test_a_cache_that_cannot_be_written_costs_time_alone(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "file"))
    latents = torch.randn(1, 4, 8, 8)
    assert_close([ready().decode_first_stage(latents)], [little_model().decode_first_stage(latents)])
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "can't be kept in" in message
    assert "\n" not in message


@pytest.fixture
def compress(tmp_path, capsys):
    paths = DatasetPaths(tmp_path / "data", "Food")
    rng = np.random.default_rng(0)
    for i in range(2):
        folder = paths.folder("train") / "sushi"
        folder.mkdir(parents=True, exist_ok=True)
        picture = np.kron(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(picture).save(folder / f"{i}.jpg")
    model = save_checkpoint(little_model(), tmp_path / "little.pth")
    common = ["--data-dir", str(paths.data_dir), "--dataset", "Food", "--model", str(model), "--resolution", "high"]
    common += ["--size", "64", "--steps", "2", "--seeds", "2", "--device", "cpu"]

    def call(*options):
        code = run.main([*common, *options])
        return code, capsys.readouterr()

    call.paths = paths
    return call


@pytest.mark.long
@installed
def test_it_is_no_setting_of_copies_in_float32(compress):
    assert compress("--precision", "fp32", "--keep-apart", "torch")[0] == 0
    code, said = compress("--precision", "fp32", "--engine", "openvino")
    assert code == 0
    assert "by openvino in fp32" in said.out
    folders = [compress.paths.root / name for name in ("exemplars", "exemplars-torch")]
    ours, theirs = ([np.asarray(Image.open(p)).astype(int) for p in sorted(f.rglob("*.jpg"))] for f in folders)
    assert len(ours) == len(theirs) == 4
    # Where rounding decides a JPEG coefficient, a block of 16 x 16 of the 64 x 64 pixels differs.
    assert all((abs(a - b) > 4).mean() < 0.07 for a, b in zip(ours, theirs, strict=True))
    shutil.rmtree(folders[0] / "sushi")
    assert compress("--precision", "fp32")[0] == 0  # no other settings: they go on as if torch had made them


def test_where_it_is_not_installed_one_line_says_so(compress, monkeypatch):
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: False)
    code, said = compress("--engine", "openvino")
    assert (code, said.err) == (
        2,
        "error: --engine openvino needs a package that is not installed: pip install openvino\n",
    )
    assert choose_engine("auto", CPU) == "torch"


def test_what_it_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: True)
    for device, low_memory in ((torch.device("cuda"), False), (CPU, True)):
        with pytest.raises(UserError, match="for CPUs"):
            choose_engine("openvino", device, low_memory)
    monkeypatch.setattr(openvino_engine, "computes_bf16", lambda: False)
    assert choose_precision("auto", CPU, "openvino") == "fp32"
    for precision in ("bf16", "fp16"):
        with pytest.raises(UserError, match=f"does not compute in {precision} on this CPU"):
            choose_precision(precision, CPU, "openvino")


def test_its_bf16_is_a_setting_of_its_own(monkeypatch):
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: True)
    monkeypatch.setattr(openvino_engine, "computes_bf16", lambda: True)
    assert choose_precision("auto", CPU, "openvino") == choose_precision("bf16", CPU, "openvino") == OPENVINO_BF16
    assert choose_precision("fp32", CPU, "openvino") == "fp32"
