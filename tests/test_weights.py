"""Weights in every form that people have load to the same model; whatever does not fit is refused in words."""

import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ControlNet.cldm.model import ModelError, create_model, load_model, load_state_dict, weights_fingerprint
from tests.conftest import long_but
from tests.little_model import little_config, little_model

CONTROL = "control_model."


@pytest.fixture(scope="module")
def state():
    """A small model's tensors by official names."""
    return {name: tensor.clone() for name, tensor in little_model().state_dict().items()}


@pytest.fixture(scope="module")
def official(state, tmp_path_factory):
    """The checkpoint that all the other forms must equal."""
    return write(tmp_path_factory.mktemp("official") / "official.pth", state)


def write(path, state, config=True):
    """A checkpoint at path and, as it is no Stable Diffusion 1.5, its config beside it."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    if config:
        OmegaConf.save(little_config(), path.with_suffix(".yaml"))
    return path


def only(state, *beginnings):
    return {name: tensor for name, tensor in state.items() if name.startswith(beginnings)}


def without(state, *beginnings):
    return {name: tensor for name, tensor in state.items() if not name.startswith(beginnings)}


def to(dtype, state):
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def assert_holds(model, state, tolerance=0.0):
    """Every tensor of the model is the state's, within tolerance of the tensor's largest value."""
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    for name, tensor in state.items():
        assert (ours[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


# --- files -------------------------------------------------------------------------------------------------------

FILES = {
    "official": lambda s: s,
    "nested": lambda s: {"state_dict": s, "global_step": 3, "epoch": 0},
    "no position_ids": lambda s: {n: t for n, t in s.items() if "position_ids" not in n},
    "text model's new names": lambda s: {n.replace(".text_model.", "."): t for n, t in s.items()},
    "no tables": lambda s: {n: t for n, t in s.items() if "." in n},
    "averages and losses besides": lambda s: (
        s | {"model_ema.decay": torch.tensor(0.9), "first_stage_model.loss.logvar": torch.zeros(1)}
    ),
    "float64": lambda s: to(torch.float64, s),
}


CASES = [(form, ending) for form in FILES for ending in ("pth", "ckpt", "safetensors")]
QUICK = [(form, ending) for form, ending in CASES if form == "official" or ending == "pth"]


@pytest.mark.parametrize(("form", "ending"), long_but(CASES, *QUICK))
def test_files_of_the_same_weights_make_the_same_model(form, ending, state, official, tmp_path):
    if (form, ending) == ("nested", "safetensors"):
        pytest.skip("safetensors holds tensors alone")
    path = write(tmp_path / f"model.{ending}", FILES[form](state))
    model = load_model(path)
    assert_holds(model, state)
    assert model.dtype == torch.float32
    assert model.fingerprint == weights_fingerprint(path) == weights_fingerprint(official)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_of_lower_precision(dtype, tolerance, ending, state, official, tmp_path):
    model = load_model(write(tmp_path / f"model.{ending}", to(dtype, state)))
    assert model.dtype == torch.float32
    assert_holds(model, state, tolerance)
    assert torch.equal(model.alphas_cumprod, state["alphas_cumprod"])  # a schedule of rounded steps would be another
    if dtype == torch.float16:
        assert model.fingerprint == weights_fingerprint(official)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_lower_precision_keep_tables_and_fingerprint(dtype, state, official):
    model = load_model(official, dtype=dtype)
    decoder = {parameter.dtype for parameter in model.first_stage_model.parameters()}
    assert decoder == {torch.float32 if dtype == torch.float16 else dtype}  # which float16 overflows
    model.first_stage_model = None
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.alphas_cumprod.dtype == torch.float32
    assert torch.equal(model.alphas_cumprod, state["alphas_cumprod"])
    assert model.fingerprint == weights_fingerprint(official)


@pytest.mark.parametrize(("made_by", "ending"), [("safetensors", "ckpt"), ("zip", "safetensors"), ("old torch", "pth")])
def test_a_file_is_read_by_what_it_holds(made_by, ending, state, tmp_path):
    path = tmp_path / f"model.{ending}"
    if made_by == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=made_by == "zip")
    loaded = load_state_dict(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_fingerprint_tells_weights_apart(state, official, tmp_path):
    for name in ("control_model.zero_convs.0.0.bias", "cond_stage_model.transformer.text_model.final_layer_norm.bias"):
        changed = write(tmp_path / "changed.pth", state | {name: state[name] + 1})
        assert weights_fingerprint(changed) != weights_fingerprint(official)
    assert re.fullmatch(r"[0-9a-f]{16}\.[0-9a-f]{8}", weights_fingerprint(official))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("linear_start", 0.001),
        ("scale_factor", 0.13025),
        ("only_mid_control", True),
        ("unet_config.params.num_heads", 4),
        ("control_stage_config.params.num_heads", 4),
        ("cond_stage_config.params.num_attention_heads", 4),
    ],
)
def test_a_fingerprint_tells_configs_apart_whose_pictures_differ(where, value, state, official, tmp_path):
    """Equal tensors under another config make other pictures, though no shape differs."""
    path = write(tmp_path / "other.pth", state)
    config = little_config()
    OmegaConf.update(config, f"model.params.{where}", value)
    OmegaConf.save(config, path.with_suffix(".yaml"))
    other, same = weights_fingerprint(path), weights_fingerprint(official)
    assert other != same
    assert other.partition(".")[0] == same.partition(".")[0]
    assert load_model(path).fingerprint == other


def test_a_fingerprint_knows_defaults_and_ignores_what_changes_no_picture(state, official, tmp_path):
    path = write(tmp_path / "other.pth", state)
    config = little_config()
    del config.model.params.scale_factor  # 0.18215 by default, too
    config.model.params.monitor = "val/loss"
    OmegaConf.save(config, path.with_suffix(".yaml"))
    assert weights_fingerprint(path) == weights_fingerprint(official)


def test_a_model_that_was_not_loaded_has_no_fingerprint():
    assert little_model().fingerprint == ""


# --- a control network and its base ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["official", "float16 safetensors", "no prefix"])
def test_a_control_network_joins_its_base(form, state, official, tmp_path):
    control = only(state, CONTROL)
    if form == "no prefix":
        control = {name.removeprefix(CONTROL): tensor for name, tensor in control.items()}
    half = form == "float16 safetensors"
    path = write(
        tmp_path / ("control.safetensors" if half else "control.pth"), to(torch.float16, control) if half else control
    )
    average = {"model_ema.decay": torch.tensor(0.9), "cond_stage_model.logit_scale": torch.tensor(4.6)}
    base = write(tmp_path / "base.ckpt", {"state_dict": without(state, CONTROL) | average}, config=False)
    model = load_model(path, base=base)
    assert_holds(model, state, 2**-11 if half else 0.0)
    assert model.fingerprint == weights_fingerprint(path, base) == weights_fingerprint(official)


def test_a_base_replaces_all_but_the_control_of_a_whole_checkpoint(state, official, tmp_path):
    base = write(tmp_path / "base.pth", {name: tensor + 1 for name, tensor in state.items() if "." in name})
    model = load_model(official, base=base)
    for name, tensor in only(model.state_dict(), CONTROL).items():
        assert torch.equal(tensor, state[name])
    for name, tensor in only(model.state_dict(), "model.", "first_stage_model.").items():
        assert torch.equal(tensor, state[name] + 1)


def test_a_config_beside_the_base_counts_where_it_describes_control(state, tmp_path):
    control = write(tmp_path / "control.pth", only(state, CONTROL), config=False)
    base = write(tmp_path / "base.pth", without(state, CONTROL))
    assert_holds(load_model(control, base=base), state)
    base.with_suffix(".yaml").write_text("model: {target: ldm.models.diffusion.ddpm.LatentDiffusion}")
    with pytest.raises(ModelError, match=r"its config is .*cldm_v15.yaml"):
        load_model(control, base=base)


# --- diffusers' layout -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(state):
    pytest.importorskip("diffusers")
    from tests.diffusers_models import diffusers_networks

    return diffusers_networks(little_config(), state)


def save_folder(networks, folder, names=("unet", "vae", "text_encoder", "controlnet"), config=True, **how):
    """A pipeline's folder, written by diffusers."""
    for name in names:
        own = {key: how[key] for key in how if key != "safe_serialization" or name != "text_encoder"}
        networks[name].save_pretrained(folder / name, **own)
    if config:
        OmegaConf.save(little_config(), folder / "model.yaml")
    return folder


BASE = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_a_pipelines_folder(how, networks, state, official, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline", **how)
    model = load_model(folder)
    assert_holds(model, state)
    assert model.fingerprint == weights_fingerprint(folder) == weights_fingerprint(official)


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}])
def test_a_folder_in_shards(how, networks, state, official, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline", max_shard_size="300KB", **how)
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    assert load_model(folder).fingerprint == weights_fingerprint(official)
    (folder / "unet" / next((folder / "unet").glob("*-00001-of-*")).name).unlink()
    with pytest.raises(ModelError, match=r"no checkpoint at .*00001-of"):
        load_model(folder)


def test_a_pickled_text_encoder_of_a_folder(networks, state, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline")
    safe = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_state_dict(safe)
    position = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(tensors | position, folder / "text_encoder" / "pytorch_model.bin")
    safe.unlink()
    assert_holds(load_model(folder), state)


@pytest.mark.parametrize(("control", "base"), [("folder", "folder"), ("file", "folder"), ("folder", "file")])
def test_control_and_base_in_any_mixture(control, base, networks, state, official, tmp_path):
    if control == "folder":
        networks["controlnet"].save_pretrained(tmp_path / "control")
        control_path = tmp_path / "control"
        OmegaConf.save(little_config(), control_path / "model.yaml")
    else:
        control_path = write(tmp_path / "control.pth", only(state, CONTROL))
    if base == "folder":
        base_path = save_folder(networks, tmp_path / "base", BASE, config=False)
    else:
        base_path = write(tmp_path / "base.pth", without(state, CONTROL), config=False)
    model = load_model(control_path, base=base_path)
    assert_holds(model, state)
    assert model.fingerprint == weights_fingerprint(official)


def test_the_file_of_a_control_networks_folder(networks, state, tmp_path):
    networks["controlnet"].save_pretrained(tmp_path / "control")
    base = write(tmp_path / "base.pth", without(state, CONTROL))
    file = next((tmp_path / "control").glob("*.safetensors"))
    assert_holds(load_model(file, base=base), state)


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


SHAPES = [(shape, names) for shape in ("linear", "convolution") for names in ("old", "new")]


@pytest.mark.parametrize(("shape", "names"), long_but(SHAPES, ("linear", "new"), ("convolution", "old")))
def test_attention_of_older_and_newer_autoencoders(names, shape, networks, state, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline")
    path = next((folder / "vae").glob("*.safetensors"))
    tensors = {}
    for name, tensor in load_state_dict(path).items():
        attends = ".attentions." in name
        if attends and tensor.ndim == 2 and shape == "convolution":
            tensor = tensor[:, :, None, None]
        if attends and names == "old":
            for new, old in OLD_ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor.clone()
    assert any(".query." in name for name in tensors) == (names == "old")
    save_file(tensors, path)
    assert_holds(load_model(folder), state)


def test_a_transformers_linear_projections(networks, state, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline")
    path = next((folder / "unet").glob("*.safetensors"))
    linear = {
        name: tensor[:, :, 0, 0].clone() if name.endswith(("proj_in.weight", "proj_out.weight")) else tensor.clone()
        for name, tensor in load_state_dict(path).items()
    }
    save_file(linear, path)
    assert_holds(load_model(folder), state)


# --- refusals ----------------------------------------------------------------------------------------------------


def like(state, **changes):
    """The state with some tensors changed or, by None, taken out."""
    changed = state | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


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
    control = write(tmp_path / "control.pth", only(state, CONTROL))
    base = write(tmp_path / "base.pth", without(state, CONTROL))
    with pytest.raises(ModelError, match=r"base\.pth holds no ControlNet"):
        load_model(base, base=control)
    with pytest.raises(ModelError, match=r"the base .*control\.pth holds no Stable Diffusion"):
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
    base = write(tmp_path / "base.pth", without(state, CONTROL))
    for other in (None, base):
        with pytest.raises(ModelError, match=message):
            load_model(path, base=other)


def test_a_file_of_a_distributed_training_loads(state, official, tmp_path):
    path = write(tmp_path / "ddp.pth", {f"module.{name}": tensor for name, tensor in state.items()})
    assert load_model(path).fingerprint == weights_fingerprint(official)


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


def broken(kind, path, state):
    if kind == "missing":
        return
    write(path, state)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "head alone":
        path.write_bytes(content[:40])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5710757851\n")
    elif kind == "page":
        path.write_text("\n<!DOCTYPE html>\n<html><title>Hugging Face</title></html>")
    elif kind == "text":
        path.write_text("Entry not found")
    elif kind == "noise":
        path.write_bytes(bytes(range(255, 100, -1)) * 50)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "zip":
        path.write_bytes(b"PK\5\6" + bytes(18))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no checkpoint at .*wrong"),
        ("truncated", r"a download that broke off after [\d,]+ bytes"),
        ("head alone", "not a whole checkpoint|broke off after 40 bytes"),
        ("empty", r"wrong\.\w+ is empty"),
        ("pointer", "Git LFS pointer"),
        ("page", r"wrong\.\w+ is a web page"),
        ("text", "a text that begins with 'Entry not found'"),
        ("noise", "wrong.* is "),
        ("list", "holds no tensors by name"),
        ("zip", "wrong.* is "),
    ],
)
def test_broken_files_are_refused_in_words(kind, ending, message, state, tmp_path):
    path = tmp_path / f"wrong.{ending}"
    if kind == "list":
        path = tmp_path / "wrong.pth"
    broken(kind, path, state)
    for use in (load_model, weights_fingerprint):
        with pytest.raises(ModelError, match=message) as caught:
            use(path)
        assert "weights_only" not in str(caught.value)
        assert str(caught.value).count(str(path)) == 1


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


def test_folders_that_are_not_diffusers_are_refused(networks, state, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ModelError, match=r"photos is no folder of diffusers' layout.* but nothing"):
        load_model(tmp_path / "photos")
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ModelError, match=r"but a\.jpg"):
        load_model(tmp_path / "photos")
    with pytest.raises(ModelError, match="base model without control"):
        load_model(save_folder(networks, tmp_path / "base", BASE))
    with pytest.raises(ModelError, match="one network, and no ControlNet"):
        load_model(tmp_path / "base" / "unet")
    (tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vae is no folder of diffusers' layout"):
        load_model(tmp_path / "base")


def test_other_predictions_than_noise_are_refused(networks, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline")
    (folder / "scheduler").mkdir()
    settings = {"prediction_type": "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    load_model(folder)
    settings["prediction_type"] = "v_prediction"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="v_prediction"):
        load_model(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_refused(official):
    official.chmod(0)
    try:
        with pytest.raises(ModelError, match="may not be read"):
            load_model(official)
    finally:
        official.chmod(0o644)


def test_the_official_file_that_is_not_there_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr("ControlNet.cldm.weights.MODELS_FOLDER", tmp_path)
    with pytest.raises(ModelError, match=r"control_sd15_canny.pth: --download fetches it"):
        load_model("sd15")


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_loading_leaves_the_weights_in_the_file(ending, tmp_path):
    """On the CPU nothing is copied: a tensor's pages stay unread until it is used."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    path = write(tmp_path / f"big.{ending}", {"control_model.big": torch.ones(64, 2**20)}, config=False)
    before = resident()
    tensors = load_state_dict(path)
    assert resident() - before < path.stat().st_size / 4
    assert tensors["control_model.big"].sum() == 2**26


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
    path = write(tmp_path / "model.pth", state | dict.fromkeys(names, torch.zeros(2)))
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
