"""Making pictures where memory is short: halved batches, parts of the model in turns; and what is done only once."""

import logging
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compress import presets
from compress.forms import Condition, Request
from compress.generators import NoPicture, controlnet
from compress.generators.build import choose_precision
from compress.generators.controlnet import PictureGenerator, default_batch_size
from compress.presets import HIGH
from ControlNet.cldm import inference
from ControlNet.cldm.model import load_model
from ControlNet.sampling import SAMPLERS, sample_latents
from tests.conftest import long_but
from tests.little_model import little_model
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine

PRESET = HIGH.changed(size=64, steps=2)
PARTS = ("cond_stage_model", "control_model", "first_stage_model", "model")


def jobs(count, size=64, texts=("apple pie", "crème", "sushi")):
    rng = np.random.default_rng(0)
    return [
        Request(
            image=Path(f"{i}.jpg"),
            copy_number=i % 3,
            text=texts[i % len(texts)],
            condition=Condition((size, size), (rng.random((size, size)) > 0.9).astype(np.uint8) * 255),
            size=(size, size),
            greyscale=False,
            seed=i % 3,
        )
        for i in range(count)
    ]


def assert_alike(ours, theirs):
    """At most one level of 255 apart, at fewer than one pixel in 100."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        difference = abs(one.astype(int) - other)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


# --- memory that runs out ----------------------------------------------------------------------------------------


def exhaust_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def exhaust_cpu():
    torch.empty(1 << 55)  # more than any machine can address


def exhaust_numpy():
    np.empty(1 << 55)


def exhaust_cudnn():
    raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


def exhaust_cublas():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


EXHAUST = (exhaust_gpu, exhaust_cudnn, exhaust_cublas, exhaust_cpu, exhaust_numpy)


def small_device(most, exhaust, tried):
    """A sampler on a device with memory for `most` pictures; notes the batch sizes that are tried."""

    def sample(model, sampler, schedule, x, *args, **options):
        tried.append(len(x))
        if len(x) > most:
            exhaust()
        return sample_latents(model, sampler, schedule, x, *args, **options)

    return sample


@pytest.mark.parametrize("exhaust", long_but(EXHAUST, exhaust_gpu))
def test_a_batch_that_does_not_fit_is_halved(exhaust, monkeypatch, caplog):
    expected = PictureGenerator(PRESET, little_model(), batch_size=2)(jobs(2))
    expected += PictureGenerator(PRESET, little_model(), batch_size=2)(jobs(7)[2:4])
    tried = []
    monkeypatch.setattr(controlnet, "sample_latents", small_device(2, exhaust, tried))
    generator = PictureGenerator(PRESET, little_model(), batch_size=8)
    with caplog.at_level(logging.WARNING):
        pictures = generator(jobs(7))
    assert len(pictures) == 7
    assert all(np.array_equal(*pair) for pair in zip(pictures[:4], expected, strict=True))  # the right ones, in order
    assert tried == [8, 4, 2, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "8 pictures of 64 x 64 pixels at a time don't fit on cpu: 2 at a time from now on (--batch-size)"
    ]
    tried.clear()
    generator(jobs(3))
    assert tried == [2, 2]  # it remembers
    assert len(caplog.records) == 1


def test_a_decoder_that_does_not_fit_decodes_fewer_at_a_time(monkeypatch, caplog):
    model, tried = little_model(), []
    expected = PictureGenerator(PRESET, little_model(), batch_size=4)(jobs(4))
    decode = model.decode_first_stage

    def decode_two(latents):
        tried.append(len(latents))
        if len(latents) > 2:
            exhaust_gpu()
        return decode(latents)

    monkeypatch.setattr(model, "decode_first_stage", decode_two)
    generator = PictureGenerator(PRESET, model, batch_size=4)
    assert_alike(generator(jobs(4)), expected)
    assert tried == [4, 2, 2]
    generator(jobs(4))
    assert tried == [4, 2, 2, 2, 2]  # it remembers
    assert generator.batch_size == 4
    assert not caplog.records


def test_a_picture_that_does_not_fit_is_said_in_words(monkeypatch):
    tried = []
    monkeypatch.setattr(controlnet, "sample_latents", small_device(0, exhaust_gpu, tried))
    with pytest.raises(UserError, match="not even one picture of 64 x 64 pixels fits on cpu: use --low-memory"):
        PictureGenerator(PRESET, little_model(), batch_size=4)(jobs(4))
    assert tried == [4, 2, 1]


def test_what_did_not_fit_is_freed_before_the_next_try(monkeypatch):
    held = []

    def holding(model, sampler, schedule, x, *args, **options):
        assert not any(tensor() is not None for tensor in held)
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        if len(x) > 1:
            exhaust_gpu()
        return sample_latents(model, sampler, schedule, x, *args, **options)

    monkeypatch.setattr(controlnet, "sample_latents", holding)
    assert len(PictureGenerator(PRESET, little_model(), batch_size=4)(jobs(2))) == 2
    assert len(held) == 4


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(controlnet, "sample_latents", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        PictureGenerator(PRESET, little_model(), batch_size=4)(jobs(4))


# --- low memory --------------------------------------------------------------------------------------------------


def test_low_memory_brings_in_only_the_part_at_work(monkeypatch):
    """A tensor that is brought to the device is a copy here: whoever computes must be one, and all others must not."""
    model = little_model()
    homes = {
        part: {tensor.data_ptr() for tensor in (*getattr(model, part).parameters(), *getattr(model, part).buffers())}
        for part in PARTS
    }
    at_work = []

    def note(part):
        def hook(*_):
            there = [name for name in PARTS if next(getattr(model, name).parameters()).data_ptr() not in homes[name]]
            at_work.append((part, tuple(there)))

        return hook

    for part in PARTS:
        for module in getattr(model, part).modules():
            if not list(module.children()):
                module.register_forward_pre_hook(note(part))
    decoded = []
    decode = model.decode_first_stage
    monkeypatch.setattr(model, "decode_first_stage", lambda z: decoded.append(len(z)) or decode(z))
    monkeypatch.setattr(inference, "moved", lambda tensor, device: tensor.clone())
    pictures = PictureGenerator(PRESET, model, batch_size=2, low_memory=True)(jobs(3))
    denoising = ("control_model", "model")
    assert set(at_work) == {
        ("cond_stage_model", ("cond_stage_model",)),
        ("control_model", denoising),
        ("model", denoising),
        ("first_stage_model", ("first_stage_model",)),
    }
    assert decoded == [1] * 4  # two batches of two, one picture at a time
    for part in PARTS:  # everything is at home again, and no memory was left behind
        network = getattr(model, part)
        assert {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())} == homes[part]
    monkeypatch.undo()
    assert_alike(pictures, PictureGenerator(PRESET, little_model(), batch_size=2)(jobs(3)))


def test_low_memory_survives_an_exhausted_device(monkeypatch):
    tried = []
    monkeypatch.setattr(controlnet, "sample_latents", small_device(1, exhaust_gpu, tried))
    generator = PictureGenerator(PRESET, little_model(), batch_size=2, low_memory=True)
    pictures = generator(jobs(2))
    assert tried == [2, 1, 1]
    monkeypatch.undo()
    assert_alike(pictures, PictureGenerator(PRESET, little_model(), batch_size=2)(jobs(2)))


def test_low_memory_pins_the_weights_that_visit_a_gpu(monkeypatch):
    """From pageable memory they take three to five times as long."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    model = little_model()
    inference.pin(*model.children())
    at_home = {tensor.data_ptr() for part in PARTS for tensor in getattr(model, part).parameters()}
    assert at_home <= {tensor.data_ptr() for tensor in pinned}

    def refuse(tensor):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    inference.pin(model)  # goes on


# --- float16, and values that are no numbers ---------------------------------------------------------------------


def test_beside_float16_networks_the_autoencoder_works_in_float32(checkpoint):
    """Its activations exceed 65,504: Stable Diffusion 1.5's pictures come out black."""
    model = load_model(checkpoint, dtype=torch.float16)
    assert model.dtype == torch.float16
    assert {parameter.dtype for parameter in model.first_stage_model.parameters()} == {torch.float32}
    whole = load_model(checkpoint)
    for ours, theirs in zip(model.first_stage_model.parameters(), whole.first_stage_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # not rounded on the way
    for parameter in model.first_stage_model.decoder.conv_in.parameters():
        parameter.data *= 1e5
    latents = torch.full((1, 4, 8, 8), 0.5, dtype=torch.float16)
    assert model.decode_first_stage(latents).isfinite().all()
    assert model.encode_first_stage(torch.zeros(1, 3, 64, 64, dtype=torch.float16)).mode().dtype == torch.float32


def with_bad_pictures(monkeypatch, numbers):
    """The decoder's pictures with these numbers hold an infinite value."""
    count = iter(range(1000))
    model = little_model()
    decode = model.decode_first_stage

    def spoil(latents):
        pictures = decode(latents)
        for picture in pictures:
            if next(count) in numbers:
                picture[0, 5, 5] = torch.inf
        return pictures

    monkeypatch.setattr(model, "decode_first_stage", spoil)
    return model


def test_a_picture_without_numbers_fails_alone(monkeypatch):
    expected = PictureGenerator(PRESET, little_model(), batch_size=4)(jobs(4))
    pictures = PictureGenerator(PRESET, with_bad_pictures(monkeypatch, {2}), batch_size=4)(jobs(4))
    assert [isinstance(picture, NoPicture) for picture in pictures] == [False, False, True, False]
    assert all(np.array_equal(pictures[i], expected[i]) for i in (0, 1, 3))
    assert "no numbers: lower --guidance (9 now)" in str(pictures[2])  # in float32 a higher precision is no advice
    assert "fp32" not in str(pictures[2])


def test_settings_that_make_no_picture_at_all_end_the_run(monkeypatch):
    generator = PictureGenerator(PRESET, with_bad_pictures(monkeypatch, range(1000)), batch_size=4)
    assert len(generator(jobs(4))) == 4
    with pytest.raises(UserError, match=r"none of 8 pictures is one: in torch\.float32 .*: lower --guidance"):
        generator(jobs(4))


# --- once --------------------------------------------------------------------------------------------------------


def test_every_text_is_encoded_once(monkeypatch):
    model = little_model()
    encoded = []
    encode = model.get_learned_conditioning
    monkeypatch.setattr(model, "get_learned_conditioning", lambda texts: encoded.extend(texts) or encode(texts))
    generator = PictureGenerator(PRESET, model, batch_size=4)
    generator(jobs(4))
    generator(jobs(3, texts=("sushi", "ramen")))
    labels = ("apple pie", "crème", "sushi", "ramen")
    assert encoded == [PRESET.negative_prompt, *(PRESET.prompt_text(label) for label in labels)]


@pytest.mark.parametrize("name", long_but(tuple(presets.SAMPLERS), "unipc"))
def test_the_sampler_is_the_presets(name):
    """And a copy is the same alone, in any batch, and after a part of them was made."""
    model = little_model()
    preset = HIGH.changed(size=64, steps=4, sampler=name)
    alone = PictureGenerator(preset, model, batch_size=1)
    pictures = [alone([job])[0] for job in jobs(4)]
    assert_alike(PictureGenerator(preset, model, batch_size=4)(jobs(4)), pictures)
    assert_alike(PictureGenerator(preset, model, batch_size=2)(jobs(4)[::-1]), pictures[::-1])
    if name != "ddim":
        assert (PictureGenerator(PRESET.changed(steps=4), model)(jobs(1))[0] != pictures[0]).mean() > 0.1


def test_guidance_in_a_window_of_the_steps(monkeypatch):
    model, batches = little_model(), []
    predict = model.apply_model
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond: batches.append(len(x)) or predict(x, t, cond))
    PictureGenerator(PRESET.changed(steps=5, guidance_window=(0.2, 0.6)), model, batch_size=1)(jobs(1))
    assert batches == [1, 2, 2, 1, 1]
    assert PRESET.changed(guidance_window=(0.0, 1.0)) == PRESET.changed()


def test_copies_that_start_from_a_picture():
    """They depend on it, the less the higher the strength, and not on what else is in their batch."""
    model, rng = little_model(), np.random.default_rng(1)
    starts = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    first, second = ([replace(job, condition=replace(job.condition, start=s)) for job in jobs(3)] for s in starts)
    apart = []
    for strength in (0.25, 1.0):
        preset = PRESET.changed(steps=4, start_strength=strength)
        pictures = PictureGenerator(preset, model, batch_size=4)(first)
        assert_alike(PictureGenerator(preset, model, batch_size=1)(first), pictures)
        others = PictureGenerator(preset, model, batch_size=4)(second)
        apart.append(np.abs(np.stack(pictures).astype(int) - np.stack(others)).mean())
    assert apart[0] > 1.5 * apart[1]
    low = PictureGenerator(preset, model, batch_size=4, low_memory=True, device="cpu")(first)
    assert_alike(low, pictures)


def test_samplers_have_one_list_of_names():
    assert tuple(SAMPLERS) == tuple(presets.SAMPLERS)
    for name, sampler in SAMPLERS.items():
        assert sampler.has_eta == (presets.SAMPLERS[name].eta is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "euler"}, "--sampler is one of ddim, .*, not 'euler'"),
        ({"sampler": "lcm", "steps": 51}, "--sampler lcm takes at most 50 steps"),
        ({"sampler": "lcm", "eta": 0.5}, "--eta goes with --sampler ddim.*, not lcm"),
        ({"guidance_window": (0.5, 0.5)}, "--guidance-window a:b has 0 <= a < b <= 1, not 0.5:0.5"),
        ({"sampler": "tcd", "eta": 1.5}, "--eta lies between 0 and 1"),
    ],
)
def test_impossible_sampling_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        HIGH.changed(**changes)


def test_a_sampler_brings_its_eta():
    assert HIGH.changed(sampler="tcd").sampling.eta == 0.3
    assert HIGH.changed(sampler="tcd", eta=0.0).sampling.eta == 0.0
    assert HIGH.changed(sampler="tcd").changed(sampler="lcm").sampling.eta == 0.0


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_distilled_samplers_bring_no_guidance(sampler):
    changed = HIGH.changed(sampler=sampler, steps=4)
    assert (changed.sampling.guidance, changed.guess.guidance) == (1.0, 1.0)
    assert HIGH.changed(sampler=sampler, steps=4, guidance=2.5).sampling.guidance == 2.5
    assert HIGH.changed(sampler="dpm++2m").sampling.guidance == 9.0


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx2": True, "avx512_bf16": False}, "fp32")],
)
def test_auto_precision_is_bf16_on_a_cpu_that_computes_in_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(("computes", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_precision_is_fp16_on_a_gpu_that_only_emulates_bf16(computes, expected, monkeypatch):
    """V100, T4, RTX 20: torch counts their emulation as support unless it is asked."""
    said = {True: True, False: computes}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: said[including_emulation])
    assert choose_precision("auto", torch.device("cuda")) == expected


# --- batch sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gigabytes", "dtype", "expected"),
    [(4, torch.float16, 1), (12, torch.float16, 4), (24, torch.bfloat16, 8), (24, torch.float32, 4),
     (80, torch.bfloat16, 16), (141, torch.bfloat16, 16)],
)  # fmt: skip
def test_the_batch_size_of_a_gpu_depends_on_its_memory(gigabytes, dtype, expected, monkeypatch):
    class FullSize(torch.nn.Module):
        device, dtype = torch.device("cuda"), None

        def parameters(self, recurse=True):
            return iter([torch.empty(1_430_000_000, dtype=self.dtype, device="meta")])

    class Properties:
        total_memory = gigabytes * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    FullSize.dtype = dtype
    assert default_batch_size(FullSize()) == expected


def test_the_batch_size_of_a_cpu_depends_on_the_model(monkeypatch):
    model = little_model()
    assert default_batch_size(model) == 8
    monkeypatch.setattr(controlnet, "FULL_SIZE", 1000)
    assert default_batch_size(model) == 1
