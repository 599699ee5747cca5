"""Thumbnails as the hints of a control network: the form, and the training of a network that reads them."""

import cv2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from compress.forms import Request, form_named
from compress.forms.picture import enlarged
from compress.generators.build import warn_of_settings
from compress.generators.controlnet import PictureGenerator
from compress.options import Machine
from compress.presets import HIGH
from ControlNet import train as trainer
from ControlNet.cldm.model import MODELS_FOLDER, ModelError
from ControlNet.cldm.weights import trained_hint
from tests.little_model import little_model
from tests.test_forms import photograph
from utils.errors import UserError

PRESET = HIGH.changed(size=64, steps=1)


def test_the_hint_is_the_thumbnail_in_colour_at_the_generated_size():
    image, form = photograph(120, 90), form_named("thumb:60@12", PRESET)
    kept = form.encode(image)
    condition = form.condition(kept, (120, 90))
    assert (condition.size, condition.hint.shape, condition.start) == ((64, 64), (64, 64, 3), None)
    small = form_named("avif:60@12", PRESET).condition(kept, (120, 90)).start
    assert small.shape == (16, 12, 3)
    assert np.array_equal(condition.hint, cv2.resize(small, (64, 64), interpolation=cv2.INTER_CUBIC))
    assert form.check(kept, image) is None
    assert form.check(form.encode(255 - image), image)[0] == "made otherwise"
    assert form.raw_bits(120, 90) is None
    assert form.needs_model
    assert not form.deterministic
    assert form.copy_settings()["form"] == "thumb:60@12"
    assert form.copy_settings() != form_named("thumb:50@12", PRESET).copy_settings()
    for broken in (b"", b"broken", kept[:20]):
        with pytest.raises(OSError, match=r"\w"):
            form.condition(broken, (120, 90))


def test_the_control_network_sees_all_three_channels():
    image, form, model = photograph(64, 64), form_named("thumb:90@16", PRESET), little_model()
    seen, predict = [], model.control_model.encode_hint
    model.control_model.encode_hint = lambda hint: seen.append(hint) or predict(hint)
    condition = form.condition(form.encode(image), (64, 64))
    requests = [Request(None, k, "disc", condition, (64, 64), False, k) for k in (0, 1)]
    pictures = PictureGenerator(PRESET, model, batch_size=2)(requests)
    assert not np.array_equal(*pictures)
    expected = torch.from_numpy(condition.hint).permute(2, 0, 1).float() / 255
    assert torch.equal(seen[0], torch.stack([expected] * 2))


@pytest.mark.parametrize("name", ["thumb", "thumb:40", "thumb@8", "thumb:101@8", "thumb:x@8", "thumb:40@8/2"])
def test_names_of_no_thumbnail(name):
    with pytest.raises(UserError, match=r"form 'thumb'|form 'avif' needs a quality"):
        form_named(name, HIGH)


@pytest.fixture
def config(tmp_path):
    """Of the bundled model's training, for one photograph that nothing moves."""
    (tmp_path / "train" / "disc").mkdir(parents=True)
    Image.fromarray(photograph(40, 48)).save(tmp_path / "train" / "disc" / "0.png")
    config = OmegaConf.load(MODELS_FOLDER / "cldm_tiny_train.yaml")
    still = dict.fromkeys(("rotate", "scale", "shift", "shear"), 0)
    changes = {"augmentation": still, "looseness": {**still, "gamma": 0}, "data": str(tmp_path / "train")}
    return OmegaConf.merge(config, {**changes, "class_names": None})


@pytest.mark.parametrize("side", [8, 40, 100])
def test_a_network_is_trained_on_the_hints_that_the_form_makes(config, side):
    config.hint = f"thumb@{side}"
    picture, hint, label = trainer.Views(config, "diffusion")[0, 0]
    assert (picture.shape, hint.shape, hint.dtype, label) == ((3, 64, 64), (3, 64, 64), torch.float32, 0)
    image, scale = photograph(40, 48), min(1, side / 40)
    small = cv2.resize(image, (round(48 * scale), round(40 * scale)), interpolation=cv2.INTER_AREA)
    assert np.array_equal((hint * 255).permute(1, 2, 0).numpy().round(), enlarged(small, 64, 64))


def test_edge_maps_are_the_default_hint(config):
    assert config.hint == "edges"
    _, hint, _ = trainer.Views(config, "diffusion")[0, 0]
    del config["hint"]
    _, unnamed, _ = trainer.Views(config, "diffusion")[0, 0]
    assert hint.shape == (1, 64, 64)
    assert set(hint.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hint, unnamed)


@pytest.mark.parametrize("hint", ["thumb", "thumb@0", "depth"])
def test_another_hint_is_refused(config, hint):
    config.hint = hint
    with pytest.raises(ModelError, match="edges or thumb@SIDE"):
        trainer.Views(config, "diffusion")


@pytest.mark.parametrize(
    ("form", "trained", "warned"),
    [
        *(("thumb:40@8", "edges", "thumb:40@8 will show little"), ("edges", "thumb@8", "edges will show little")),
        *(("thumb:40@8", "thumb@16", None), ("edges+colour@8", "edges", None), ("text", "thumb@8", None)),
        ("thumb:40@8", None, None),
    ],
)
def test_a_control_network_of_other_hints_is_warned_of(form, trained, warned, tmp_path, caplog):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", trained and {"hint": trained})
    warn_of_settings(form_named(form, PRESET), Machine(model=str(tmp_path / "model.safetensors")), {})
    assert warned in caplog.text if warned else "will show little" not in caplog.text


def test_the_bundled_control_networks_have_seen_edge_maps():
    assert trained_hint("tiny") == trained_hint("sd15") == "edges"


@pytest.mark.long
def test_a_small_network_learns_from_thumbnails(config, tmp_path):
    """A few steps of all stages; the weights that come of it make copies of the form."""
    from ControlNet.cldm.model import load_model
    from tests.little_model import little_config

    OmegaConf.save(little_config(), tmp_path / "model.yaml")
    changes = {
        **{"model": str(tmp_path / "model.yaml"), "weights": str(tmp_path / "model.safetensors"), "hint": "thumb@8"},
        **{"output": str(tmp_path / "training"), "precision": "32-true", "checkpoint_every": 2, "text": {"steps": 2}},
        **{stage: {"steps": 2, "batch_size": 2} for stage in ("autoencoder", "diffusion", "refine")},
    }
    OmegaConf.save(OmegaConf.merge(config, changes), tmp_path / "train.yaml")
    assert trainer.main([str(tmp_path / "train.yaml")]) == 0
    assert trainer.main([str(tmp_path / "train.yaml"), "hint=edges"]) == 2  # its checkpoints are of other hints
    assert trained_hint(tmp_path / "model.safetensors") == "thumb@8"
    form = form_named("thumb:60@8", PRESET)
    condition = form.condition(form.encode(photograph(40, 48)), (40, 48))
    generator = PictureGenerator(PRESET, load_model(tmp_path / "model.safetensors"), batch_size=1)
    (picture,) = generator([Request(None, 0, "disc", condition, (40, 48), False, 0)])
    assert picture.shape == (64, 64, 3)
