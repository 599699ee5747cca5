"""diffusers' pipelines as generators: small random ones of two architectures, through the command on a few digits."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers

import torchvision_compat  # noqa: F401
from compress.forms import Condition, Request
from compress.generators import NoPicture, pipelines
from compress.generators.build import load, model_fingerprint
from compress.options import Machine
from compress.presets import LOW
from tests.conftest import long_but
from tests.digits import make_digits
from tests.little_run import command
from utils.data.paths import DatasetPaths
from utils.errors import UserError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (16, 32)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 514,
    "projection_dim": 32,
    "eos_token_id": 513,
}


def text_encoder(kind: str = "CLIPTextModel"):
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**TEXT)).eval()


def tokenizer():
    """CLIP's without merges: a text is its bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)


def autoencoder():
    """A factor of 8, as in the real ones, which --size goes by."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )


def scheduler():
    return diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def networks(**how):
    """UNet and control network, whose zero convolutions are not zero: the edge map counts."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=4, attention_head_dim=4, **how
    )
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
    with torch.no_grad():
        for name, weight in control.named_parameters():
            if "controlnet" in name:
                weight.normal_(std=0.3)
    return {"unet": unet, "controlnet": control}


def sd15(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **networks(
            cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sdxl(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    pipeline = diffusers.StableDiffusionXLControlNetPipeline(
        **networks(
            cross_attention_dim=64,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        vae=autoencoder(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder("CLIPTextModelWithProjection"),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


ARCHITECTURES = {"sd15": sd15, "sdxl": sdxl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("pipelines") / name) for name, make in ARCHITECTURES.items()}


@pytest.fixture
def paths(tmp_path) -> DatasetPaths:
    return make_digits(tmp_path / "data", train=2, test=1, copies=0, classes=2)


@pytest.fixture
def compress(paths, capsys):
    """The command on the digits: -> (exit code, stdout, stderr)."""

    def call(model: Path | str, *options: str):
        run = command(paths, f"diffusers:{model}", capsys)
        return run("--precision", "fp32", *options, resolution="low", steps="2")

    return call


def copies(paths: DatasetPaths, folder: str = "exemplars") -> dict[str, np.ndarray]:
    files = sorted((paths.root / folder).rglob("*_seed*"))
    return {str(file.relative_to(paths.root)): np.asarray(Image.open(file)).astype(int) for file in files}


@pytest.mark.parametrize("name", long_but(ARCHITECTURES, "sd15"))
def test_copies_are_made_resumed_and_kept_apart_from_another_pipelines(name, folders, paths, compress, tmp_path):
    code, out, err = compress(folders[name], "--batch-size", "4", "--dry-run")
    assert (code, "copies: 8 to make" in out) == (0, True), out + err
    assert "the time is unknown" not in out
    code, out, err = compress(folders[name], "--batch-size", "4")
    assert code == 0, err
    assert "copies: 8 made, 0 skipped, 0 failed" in out
    made = copies(paths)
    assert len(made) == 8
    assert all(picture.shape == (28, 28) for picture in made.values())
    assert max(picture.std() for picture in made.values()) > 1
    pairs = itertools.combinations(made.values(), 2)
    assert all(np.abs(one - other).max() > 2 for one, other in pairs)  # by edge map, by class, and by seed

    first = next(iter(made))
    (paths.root / first).unlink()
    code, out, err = compress(folders[name], "--batch-size", "1")
    assert "copies: 1 made, 7 skipped, 0 failed" in out, err
    assert np.abs(copies(paths)[first] - made[first]).max() <= 2

    (file,) = (paths.root / "exemplars").glob("settings*.json")
    settings = json.loads(file.read_text())["settings"]
    assert settings["model"] == model_fingerprint(Machine(model=f"diffusers:{folders[name]}"))
    code, out, err = compress(ARCHITECTURES[name](tmp_path / "other", seed=1))
    assert code == 2
    assert "made with other settings: model" in err


@pytest.mark.parametrize("name", long_but(ARCHITECTURES, "sd15"))
def test_one_at_a_time_and_four_at_a_time_are_equal_within_rounding(name, folders):
    edges = np.zeros((4, 64, 64), np.uint8)
    for i, edge in enumerate(edges):
        edge[8 + 8 * i] = 255
    requests = [
        Request(Path("x"), i, "seven", Condition((64, 64), hint=edge), (64, 64), False, seed=i)
        for i, edge in enumerate(edges)
    ]
    preset = LOW.changed(size=64, steps=3)
    made = {}
    for size in (1, 3, 4):
        machine = Machine(model=f"diffusers:{folders[name]}", batch_size=size, precision="fp32")
        made[size] = np.stack(pipelines.PipelineGenerator(preset, machine, torch.device("cpu"))(requests)).astype(int)
    assert np.abs(made[1] - made[4]).max() <= 2
    assert np.abs(made[3] - made[4]).max() <= 2
    assert np.abs(made[4][0] - made[4][1]).max() > 2


@pytest.mark.parametrize("form", ["edges+webp:10@16", "text", "thumb:40@8"])
def test_forms_with_and_without_edge_map_and_start(form, folders, paths, compress):
    """By the pipeline's relatives for image to image and for text alone."""
    code, out, err = compress(folders["sdxl"], "--form", form, "--batch-size", "4", "--start-strength", "0.3")
    assert code == 0, err
    assert "copies: 8 made" in out


@pytest.mark.parametrize("form", ["codebook:4@3", "latent:4@32"])
def test_forms_that_need_our_networks_refuse_a_pipeline(form, folders, compress):
    code, _, err = compress(folders["sd15"], "--form", form)
    assert (code, err.count("\n")) == (2, 1)
    assert f"the form {form} needs a --model that encodes" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "fast"], "leave out --sampler"),
        (["--reuse-every", "2"], "leave out --reuse-every"),
        (["--guidance-window", "0:0.5"], "leave out --guidance-window"),
        (["--engine", "compile"], "leave out --engine"),
        (["--lora", "x.safetensors"], "leave out --lora"),
        (["--base", "x"], "leave out --base"),
    ],
)
def test_settings_of_our_own_model_are_refused(options, words, folders, compress):
    code, _, err = compress(folders["sd15"], *options)
    assert (code, words in err.splitlines()[-1]) == (2, True), err


def test_a_control_network_steers_the_pipeline_of_base(folders, paths, compress, tmp_path):
    """Its copies are those of the whole pipeline."""
    assert compress(folders["sd15"], "--replace")[0] == 0  # edge maps too, as below
    whole = copies(paths)
    code, _, err = compress(folders["sd15"] / "controlnet")
    assert (code, "--base" in err) == (2, True)
    base = shutil.copytree(folders["sd15"], tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    del index["controlnet"]
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    control = folders["sd15"] / "controlnet"
    code, _, err = compress(control, "--base", str(base), "--replace")
    assert code == 0, err
    assert all(np.abs(copies(paths)[file] - picture).max() <= 2 for file, picture in whole.items())
    code, _, err = compress(base, "--replace")
    assert (code, "does not take" in err) == (2, True), err


def test_a_fingerprint_tells_pipelines_apart_and_ignores_versions(folders, tmp_path):
    def of(folder):
        return model_fingerprint(Machine(model=f"diffusers:{folder}"))

    copy = shutil.copytree(folders["sd15"], tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": "0.1"}, indent=8))
    assert of(copy) == of(folders["sd15"])
    assert of(folders["sd15"]).endswith(".StableDiffusionControlNetPipeline")
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "steps_offset": 0}))
    assert of(copy) != of(folders["sd15"])
    assert of(sd15(tmp_path / "other", seed=1)) != of(folders["sd15"]) != of(folders["sdxl"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("diffusers", "names a pipeline's folder"),
        ("diffusers:nobody/nothing-here", "hf download nobody/nothing-here"),
        ("diffusers:{tmp_path}", "neither model_index.json nor config.json"),
    ],
)
def test_a_pipeline_that_is_not_there_is_named(model, words, tmp_path):
    with pytest.raises(UserError, match=words):
        model_fingerprint(Machine(model=model.format(tmp_path=tmp_path)))


def test_a_pipeline_that_is_not_ours_is_pointed_to_diffusers(folders):
    with pytest.raises(UserError, match=r"\ndiffusers may run it: --model diffusers:"):
        load(Machine(model=str(folders["sdxl"])), torch.device("cpu"), "fp32")


def test_without_diffusers_the_package_is_named(folders, compress, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, _, err = compress(folders["sd15"])
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install diffusers" in err


def generator(folders, batch_size: int = 4) -> pipelines.PipelineGenerator:
    machine = Machine(model=f"diffusers:{folders['sd15']}", batch_size=batch_size, precision="fp32")
    return pipelines.PipelineGenerator(LOW.changed(size=64, steps=1), machine, torch.device("cpu"))


def requests(count: int) -> list[Request]:
    hint = np.eye(64, dtype=np.uint8) * 255
    return [Request(Path("x"), i, "a", Condition((64, 64), hint=hint), (64, 64), False, seed=i) for i in range(count)]


def test_a_batch_that_does_not_fit_is_halved(folders, caplog):
    made = generator(folders)
    unet = made._loaded.unet
    forward, sizes = unet.forward, []

    def limited(sample, *args, **kwargs):
        sizes.append(len(sample))
        if len(sample) > 4:  # two pictures, with guidance
            raise torch.OutOfMemoryError("out of memory")
        return forward(sample, *args, **kwargs)

    unet.forward = limited
    expected = generator(folders, batch_size=2)(requests(4))
    assert np.abs(np.stack(made(requests(4))).astype(int) - np.stack(expected)).max() <= 2
    assert sizes == [8, 4, 4]
    assert made.batch_size == 2
    assert "2 at a time from now on" in caplog.text


def test_a_picture_that_is_none_fails_alone(folders):
    made = generator(folders, batch_size=2)
    decode = made._loaded.vae.decode

    def broken(latents, *args, **kwargs):
        (pictures,) = decode(
            latents, *args, return_dict=False, **{k: v for k, v in kwargs.items() if k != "return_dict"}
        )
        pictures[0] = torch.nan
        return (pictures,)

    made._loaded.vae.decode = broken
    bad, good = made(requests(2))
    assert isinstance(bad, NoPicture)
    assert "no numbers" in str(bad)
    assert good.shape == (64, 64, 3)
