"""Weights that do not fit, broken files and files of other kinds are refused in words, and no code in them is run."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ControlNet.cldm.model import ModelError, create_model, load_model, load_state_dict, weights_fingerprint
from tests.little_model import CONTROL, little_config, only, without, write


def wide_texts(state, width, *beginnings):
    return {
        name: torch.zeros(tensor.shape[0], width)
        if name.startswith(beginnings) and name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        else tensor
        for name, tensor in state.items()
    }


UNET = "model.diffusion_model."
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
WRONG = {
    "base without control": (lambda s: without(s, CONTROL), r"base model without control.*--base"),
    "control without base": (lambda s: only(s, CONTROL), r"ControlNet alone.*--base"),
    "SD 2.x": (lambda s: wide_texts(s, 1024, UNET, CONTROL), r"Stable Diffusion 2.x \(texts 1024 wide\)"),
    "SD 2.x control": (lambda s: wide_texts(s, 1024, CONTROL), r"its ControlNet is of Stable Diffusion 2.x"),
    "SD 2.x text encoder": (
        lambda s: without(s, "cond_stage_model.") | {"cond_stage_model.model.ln_final.bias": torch.zeros(1024)},
        "text encoder is Stable Diffusion 2.x's",
    ),
    "SDXL": (lambda s: s | {"conditioner.embedders.0.x": torch.zeros(1)}, "Stable Diffusion XL"),
    "SDXL widths": (lambda s: wide_texts(s, 2048, UNET), r"Stable Diffusion XL \(texts 2048 wide\)"),
    "inpainting": (lambda s: s | {CONV_IN: torch.zeros(32, 9, 3, 3)}, "inpainting model .9 input channels"),
    "pix2pix": (lambda s: s | {CONV_IN: torch.zeros(32, 8, 3, 3)}, "InstructPix2Pix model .8 input channels"),
    "SD 3": (lambda s: {"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, "a transformer"),
    "LoRA": (lambda s: {"lora_unet_mid_block_attentions_0.lora_up.weight": torch.zeros(1)}, "it is a LoRA"),
    "no autoencoder": (lambda s: without(s, "first_stage_model."), "lacks the autoencoder"),
    "no text encoder": (lambda s: without(s, "cond_stage_model."), "lacks the text encoder"),
    "a classifier": (lambda s: {"fc.weight": torch.zeros(1)}, "nothing of a Stable Diffusion checkpoint"),
    "misshapen": (
        lambda s: s | {"first_stage_model.quant_conv.bias": torch.zeros(3)},
        r"1 misshapen \(first_stage_model.quant_conv.bias \(3,\) instead of \(8,\)\)",
    ),
    "unexpected": (lambda s: s | {"control_model.extra": torch.zeros(3)}, r"1 unexpected \(control_model.extra\)"),
    "several": (
        lambda s: without(s, "logvar", "first_stage_model.quant_conv.", "first_stage_model.post_quant_conv."),
        r"4 missing \(first_stage_model.quant_conv.weight, first_stage_model.quant_conv.bias, .*, \.\.\.\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_that_do_not_fit_are_refused_with_the_reason(kind, state, tmp_path):
    change, message = WRONG[kind]
    path = write(tmp_path / "wrong.safetensors", change(state))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_control_and_base_that_are_swapped_or_neither_are_refused(state, tmp_path):
    control = write(tmp_path / "control.safetensors", only(state, CONTROL))
    base = write(tmp_path / "base.safetensors", without(state, CONTROL))
    with pytest.raises(ModelError, match=r"base\.safetensors holds no ControlNet"):
        load_model(base, base=control)
    with pytest.raises(ModelError, match=r"the base .*control\.safetensors holds no Stable Diffusion"):
        load_model(control, base=control)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_controlnet", "input_blocks.1.0.in_layers.2.up"], "it is a Control-LoRA"),
        (["adapter.body.0.resnets.0.block1.weight"], "it is a T2I-Adapter"),
        (["body.0.block1.weight", "conv_in.weight"], "it is a T2I-Adapter"),
    ],
)
def test_other_kinds_of_control_are_named(names, message, state, tmp_path):
    path = write(tmp_path / "control.safetensors", {name: torch.zeros(1) for name in names})
    base = write(tmp_path / "base.safetensors", without(state, CONTROL))
    for other in (None, base):
        with pytest.raises(ModelError, match=message):
            load_model(path, base=other)


def test_a_config_of_a_base_beside_it_is_no_model_config(state, tmp_path):
    """Web UIs put v1-inference.yaml beside a base."""
    base = write(tmp_path / "base.safetensors", without(state, CONTROL), config=False)
    base.with_suffix(".yaml").write_text("model: {target: ldm.models.diffusion.ddpm.LatentDiffusion}")
    with pytest.raises(ModelError, match="base model without control"):
        load_model(base)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_gpu_that_is_not_there_is_said(ending, state, tmp_path):
    path = write(tmp_path / f"model.{ending}", state)
    with pytest.raises(ModelError, match="no CUDA device; use location='cpu'"):
        load_state_dict(path, location="cuda")


def test_a_control_networks_difference_to_its_base_is_refused(state, tmp_path):
    """Its shapes are a ControlNet's: nothing but this name tells."""
    path = write(tmp_path / "difference.safetensors", only(state, CONTROL) | {"difference": torch.ones(())})
    with pytest.raises(ModelError, match="take the plain file"):
        load_model(path, base="tiny")


BROKEN = {
    "truncated": (lambda whole: whole[: len(whole) // 2], r"a download that broke off after [\d,]+ bytes"),
    "head alone": (lambda whole: whole[:40], "not a whole checkpoint|broke off after 40 bytes"),
    "empty": (lambda whole: b"", r"wrong\.\w+ is empty"),
    "pointer": (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 571\n", "LFS pointer"),
    "page": (lambda whole: b"\n<!DOCTYPE html>\n<html><title>Hugging Face</title></html>", r"\.\w+ is a web page"),
    "text": (lambda whole: b"Entry not found", "a text that begins with 'Entry not found'"),
    "noise": (lambda whole: bytes(range(255, 100, -1)) * 50, "wrong.* is "),
    "zip": (lambda whole: b"PK\5\6" + bytes(18), "wrong.* is "),
}
"""What becomes of a whole file, and what is said of it."""


def assert_refused(path, message):
    for use in (load_model, weights_fingerprint):
        with pytest.raises(ModelError, match=message) as caught:
            use(path)
        assert "weights_only" not in str(caught.value)
        assert str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_in_words(kind, ending, tmp_path):
    spoil, message = BROKEN[kind]
    path = write(tmp_path / f"wrong.{ending}", {"control_model.weight": torch.ones(9999)})
    path.write_bytes(spoil(path.read_bytes()))
    assert_refused(path, message)


def test_files_that_are_missing_or_hold_a_list_are_refused_in_words(tmp_path):
    for ending in ("pth", "safetensors"):
        assert_refused(tmp_path / f"wrong.{ending}", "no checkpoint at .*wrong")
    torch.save([1, 2], tmp_path / "wrong.pth")
    assert_refused(tmp_path / "wrong.pth", "holds no tensors by name")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_truncated_file_says_how_much_is_there(ending, state, tmp_path):
    path = write(tmp_path / f"wrong.{ending}", state)
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(ModelError, match=r"broke.* 1,000,000 bytes"):
        load_model(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("made_by", ["safetensors", "zip", "old torch"])
def test_flipped_bytes_never_end_in_a_traceback(made_by, tmp_path):
    path, draw = tmp_path / "flipped.ckpt", random.Random(0)
    tensors = {f"control_model.{i}": torch.ones(5, 7) for i in range(3)}
    if made_by == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=made_by == "zip")
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(3):
            content[draw.randrange(min(len(whole), 600))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            load_state_dict(path)
        except ModelError:
            refused += 1
    assert refused > 30


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("payload-ran"),))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("truncated", [True, False])
def test_code_in_a_checkpoint_is_never_run(new_format, truncated, state, tmp_path, monkeypatch):
    """As in v1-5-pruned.ckpt, which holds callbacks of its trainer."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wrong.ckpt"
    torch.save({"callbacks": Payload(), "state_dict": state}, path, _use_new_zipfile_serialization=new_format)
    if truncated:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="broke off" if truncated and new_format else r"holds code \(.*safetensors"):
        load_model(path)
    assert not Path("payload-ran").exists()
    torch.load(path, weights_only=False) if not truncated else Path("payload-ran").touch()
    assert Path("payload-ran").exists()  # it would have run


def test_a_bare_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wrong.pth"
    path.write_bytes(pickle.dumps({"state_dict": Payload()}, protocol=2))
    with pytest.raises(ModelError, match="holds code"):
        load_model(path)
    assert not Path("payload-ran").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_refused(state, tmp_path):
    path = write(tmp_path / "model.safetensors", state)
    path.chmod(0)
    with pytest.raises(ModelError, match="may not be read"):
        load_model(path)


def test_the_official_file_that_is_not_there_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr("ControlNet.cldm.weights.MODELS_FOLDER", tmp_path)
    with pytest.raises(ModelError, match=r"control_sd15_canny.pth: --download fetches it"):
        load_model("sd15")


@pytest.mark.parametrize(
    ("name", "head", "words"),
    [
        ("a.gguf", b"GGUF\3\0\0\0", "a GGUF file"),
        ("a.onnx", b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "an ONNX model"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    ],
)
def test_other_formats_are_named(name, head, words, tmp_path):
    (tmp_path / name).write_bytes(head + bytes(range(256)) * 4)
    with pytest.raises(ModelError, match=f"{name} is {words}"):
        load_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.diffusion_model.out.2.weight.absmax"], "quantised by bitsandbytes"),
        (["control_model.control_add_embedding.linear_1.weight"], "a ControlNet-Union"),
        (["control_model.task_embedding"], "a ControlNet-Union"),
    ],
)
def test_weights_of_other_kinds_are_named(names, words, state, tmp_path):
    path = write(tmp_path / "model.safetensors", state | dict.fromkeys(names, torch.zeros(2)))
    with pytest.raises(ModelError, match=f"it is {words}"):
        load_model(path)


def test_a_config_of_stable_diffusion_2_is_named():
    """The published cldm_v21.yaml differs in these places, among others."""
    config = little_config()
    config.model.params.unet_config.params.use_linear_in_transformer = True
    with pytest.raises(ModelError, match=r"is a config of Stable Diffusion 2\.x, and only models of 1\.5"):
        create_model(config)
    config = little_config()
    config.model.params.cond_stage_config.target = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    with pytest.raises(ModelError, match=r"Stable Diffusion 2\.x"):
        create_model(config)


def test_a_folder_in_place_of_a_file_is_said(tmp_path):
    with pytest.raises(ModelError, match="is a folder: name the file in it"):
        load_state_dict(tmp_path)


def test_a_model_config_does_not_read_the_environment(tmp_path):
    config = tmp_path / "model.yaml"
    config.write_text("model: {target: cldm.cldm.ControlLDM, params: {monitor: '${oc.env:HOME}'}}")
    with pytest.raises(ModelError, match=r"\$\{oc.env:HOME\}; only references to its own keys"):
        create_model(config)


def test_a_model_config_with_a_reference_to_nothing_is_named(state, tmp_path):
    """Also where the config lies beside weights whose fingerprint is asked for."""
    path = write(tmp_path / "model.safetensors", state)
    config = path.with_suffix(".yaml")
    config.write_text(
        "model: {target: cldm.cldm.ControlLDM, params: {scale_factor: '${nosuch}', control_stage_config: {}}}"
    )
    for use in (lambda: create_model(config), lambda: weights_fingerprint(path)):
        with pytest.raises(ModelError, match=r"can't read the model config .*model\.yaml: .*nosuch"):
            use()
