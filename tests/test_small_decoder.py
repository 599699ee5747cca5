"""A small decoder in place of the autoencoder's: diffusers' AutoencoderTiny, from every layout of its file."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file

from compress import run
from compress.generators import build
from compress.options import parse_settings
from ControlNet.cldm.inference import make_ready
from ControlNet.cldm.model import ModelError, load_model, weights_fingerprint
from tests.conftest import long_but
from tests.folders import make_dataset

diffusers = pytest.importorskip("diffusers", reason="is what is compared with")
LAYOUTS = ("folder", "diffusers.safetensors", "taesd_decoder.pth", "taesd_decoder.safetensors")
CHANNELS = 64


def tiny_autoencoder(**how):
    """diffusers', with random weights that give pictures of some contrast."""
    theirs = diffusers.AutoencoderTiny(**how).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1, generator=generator)
    return theirs


def written(theirs, layout, folder):
    path = folder / layout
    if layout == "folder":
        theirs.save_pretrained(path)
    elif layout == "diffusers.safetensors":
        save_file(theirs.state_dict(), path)
    else:  # TAESD's own: a sequence whose first layer, without weights, is not in diffusers'
        state = {}
        for name, tensor in theirs.decoder.state_dict().items():
            _, layer, rest = name.split(".", 2)
            state[f"{int(layer) + 1}.{rest}"] = tensor
        torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    return path


@pytest.mark.parametrize("layout", long_but(LAYOUTS, "folder", "taesd_decoder.safetensors"))
def test_pictures_are_those_of_diffusers(layout, checkpoint, tmp_path):
    theirs = tiny_autoencoder()
    plain, model = load_model(checkpoint), load_model(checkpoint, decoder=written(theirs, layout, tmp_path))
    latents = torch.randn((2, 4, 6, 9), generator=torch.Generator().manual_seed(1))
    expected = theirs.decode(latents).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(model.decode_first_stage(latents), expected, rtol=1e-5, atol=1e-5)
    pictures = torch.rand((1, 3, 32, 32)) * 2 - 1  # are encoded as before
    assert torch.equal(model.encode_first_stage(pictures).mode(), plain.encode_first_stage(pictures).mode())


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_computes_it_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path))
    theirs = tiny_autoencoder()
    model = load_model(checkpoint, decoder=written(theirs, "folder", tmp_path))
    make_ready(model, engine="openvino")
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    expected = theirs.decode(latents).sample
    torch.testing.assert_close(model.decode_first_stage(latents), expected, rtol=1e-4, atol=1e-4)


def test_copies_remember_their_decoder_by_its_content(checkpoint, tmp_path):
    file = written(tiny_autoencoder(), "taesd_decoder.pth", tmp_path)
    twin, other = tmp_path / "twin.pth", tmp_path / "other.pth"
    twin.write_bytes(file.read_bytes())
    torch.save({name: tensor * 2 for name, tensor in torch.load(file).items()}, other)

    def made_by(options):
        _, machine, words, _ = parse_settings(f"--model {checkpoint} {options}", "high")
        assert parse_settings(" ".join(words), "high")[1] == machine
        return build.model_fingerprint(machine)

    plain = weights_fingerprint(checkpoint)
    assert made_by("") == plain
    assert made_by(f"--decoder {file}") == made_by(f"--decoder {twin}") != made_by(f"--decoder {other}")
    assert made_by(f"--decoder {file}") == load_model(checkpoint, decoder=file).fingerprint
    assert made_by(f"--decoder {file}").startswith(f"{plain}+")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("missing.pth", "missing.pth"),
        ("little.safetensors", "is no decoder of TAESD for this model's latents: it has alphas_cumprod"),
        ("sixteen.pth", "layers.0.weight is (64, 16, 3, 3), not (64, 4, 3, 3)"),
    ],
)
def test_what_is_no_decoder_is_answered_in_a_line(file, words, checkpoint, tmp_path):
    sixteen = tiny_autoencoder(latent_channels=16)  # as Stable Diffusion 3 has
    written(sixteen, "taesd_decoder.pth", tmp_path).rename(tmp_path / "sixteen.pth")
    folder = checkpoint.parent if file == checkpoint.name else tmp_path
    with pytest.raises(ModelError) as raised:
        load_model(checkpoint, decoder=folder / file)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_takes_it(checkpoint, tmp_path, capsys):
    paths = make_dataset(tmp_path / "data", ("box",), train=1, size=(48, 40))
    file = written(tiny_autoencoder(), "taesd_decoder.safetensors", tmp_path)
    words = ["--data-dir", str(paths.root.parent), "--dataset", paths.dataset, "--resolution", "high", "--size", "64"]
    words += ["--steps", "1", "--model", str(checkpoint)]
    assert run.main([*words, "--seeds", "1", "--decoder", str(file)]) == 0
    capsys.readouterr()
    assert run.main([*words, "--seeds", "2"]) == 2  # copies of another decoder are there
    assert "decoder:" in capsys.readouterr().err
    assert run.main([*words, "--seeds", "2", "--decoder", "nowhere.pth", "--replace"]) == 2
    assert "nowhere.pth" in capsys.readouterr().err
