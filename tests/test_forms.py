"""Presets, and the forms of exemplars: what is kept of an image, and what comes back."""

import gc
import io
import struct
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from compress.forms import form_named, resize_back
from compress.forms.edges import read, sketched
from compress.forms.latent import CODERS
from compress.options import Machine
from compress.presets import HIGH, LOW
from compress.records import read_mark
from ControlNet.cldm.model import load_model
from tests.digits import make_digits
from utils.devices import launch
from utils.errors import UserError


def picture(height=90, width=120, channels=3):
    """A disc on a slope: a picture with edges."""
    y, x = np.mgrid[:height, :width]
    values = np.where(
        (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2, 220, x * 60 // width
    )
    return np.repeat(values.astype(np.uint8)[:, :, None], channels, axis=2)


def test_texts_of_the_presets():
    assert HIGH.prompt_text("apple pie") == "apple pie, best quality, extremely detailed"
    assert LOW.prompt_text("apple pie") == "apple pie, clean, clear, bright, neat"
    assert HIGH.prompt_text("") == "best quality, extremely detailed"
    assert HIGH.negative_prompt == (
        "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
        "low quality"
    )
    assert LOW.negative_prompt == "blurry, dark, messy, dotted"


def test_sampling_of_the_presets():
    for preset, steps in ((HIGH, 20), (LOW, 50)):
        sampling = preset.sampling_for("apple pie")
        assert (sampling.steps, sampling.guidance, sampling.eta) == (steps, 9.0, 0.0)
        assert sampling.unconditional_control
        assert sampling.control_scales() == [1.0] * 13
        assert (preset.low_threshold, preset.high_threshold) == (100, 200)


def test_an_empty_label_means_guess_mode_at_high_resolution():
    guess = HIGH.sampling_for("")
    assert (guess.steps, guess.guidance, guess.unconditional_control) == (50, 4.5, False)
    assert guess.control_scales() == pytest.approx([0.825 ** (12 - i) for i in range(13)])
    assert LOW.sampling_for("") == LOW.sampling_for("apple pie")


def test_changed_settings():
    changed = HIGH.changed(size=64, steps=4, guidance=3.0, prompt_template="a photo of {label}", negative_prompt="")
    assert changed.prompt_text("cat") == "a photo of cat"
    assert changed.negative_prompt == ""
    assert changed.generated_size(28, 28) == (64, 64) == changed.generated_size(1000, 1000)
    assert [(s.steps, s.guidance) for s in (changed.sampling, changed.guess)] == [(4, 3.0)] * 2
    assert not changed.guess.unconditional_control
    assert HIGH.changed() == HIGH
    assert LOW.changed(steps=7).guess is None
    assert HIGH.changed(prompt_template="{label} {label}").prompt_text("{a}") == "{a} {a}"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"size": 63}, "--size"), ({"steps": 1001}, "--steps"), ({"prompt_template": "{name}"}, "{name}")],
)
def test_settings_that_cannot_be(change, word):
    with pytest.raises(UserError, match=word):
        HIGH.changed(**change)


def edges(preset):
    return form_named("edges", preset)


def test_high_resolution_edges_have_the_size_of_the_image():
    image = picture()
    edge_map = read(edges(HIGH).encode(image, "disc"), (90, 120))
    assert (edge_map == cv2.Canny(image, 100, 200)).all()
    assert edge_map.any()
    assert edges(HIGH).raw_bits(90, 120) == 90 * 120


def test_low_resolution_edges_have_the_generated_size():
    for shape, generated, interpolation in (
        ((90, 120), (256, 320), cv2.INTER_LANCZOS4),
        ((300, 300), (256, 256), cv2.INTER_AREA),
        ((600, 800), (512, 704), cv2.INTER_AREA),
    ):
        image = picture(*shape)
        edge_map = read(edges(LOW).encode(image), generated)
        resized = cv2.resize(image, generated[::-1], interpolation=interpolation)
        assert (edge_map == cv2.Canny(resized, 100, 200)).all()
        assert edges(LOW).raw_bits(*shape) == edge_map.size


def test_real_edges_take_less_than_a_png_of_them(tmp_path):
    kept = edges(HIGH).encode(picture(224, 224))
    Image.fromarray(read(kept, (224, 224)) > 0).save(tmp_path / "x.png", optimize=True)
    assert len(kept) < 0.7 * (tmp_path / "x.png").stat().st_size


def test_edge_maps_of_earlier_versions_and_of_the_published_scripts_are_read(tmp_path):
    image = picture()
    edge_map = cv2.Canny(image, 100, 200)
    Image.fromarray(edge_map > 0).save(tmp_path / "a.webp", lossless=True)
    Image.fromarray(edge_map > 0).save(tmp_path / "a.png", optimize=True)
    assert cv2.imwrite(str(tmp_path / "a.bmp"), edge_map)
    for name in ("a.webp", "a.png", "a.bmp"):
        old = (tmp_path / name).read_bytes()
        loaded = read(old, (90, 120))
        assert np.array_equal(loaded, edge_map)
        assert loaded.dtype == np.uint8
        assert edges(HIGH).check(old, image) is None
        assert edges(HIGH).recoded(old, image) == edges(HIGH).encode(image)
        assert edges(HIGH).recoded(old, image[:80].copy()) is None
        with pytest.raises(OSError, match=r"\w"):
            read(old[:-30], (90, 120))


def test_a_broken_edge_map_is_an_oserror():
    kept = edges(HIGH).encode(picture())
    for broken in (
        b"RIFF\x10\0\0\0WEBPVP8L",
        b"",
        b"text",
        kept[: len(kept) // 2],
        kept + b"x",
        kept[:20],
        bytes(3000),
    ):
        with pytest.raises(OSError, match=r"\w"):
            edges(HIGH).condition(broken, (90, 120))
    assert edges(HIGH).check(kept, 255 - np.zeros_like(picture()))[0] == "made otherwise"


def test_the_hint_is_resized_by_nearest_neighbour():
    kept = edges(HIGH).encode(picture())
    condition = edges(HIGH).condition(kept, (90, 120))
    assert condition.size == (512, 704)
    assert (condition.hint == cv2.resize(read(kept, (90, 120)), (704, 512), interpolation=cv2.INTER_NEAREST)).all()
    assert set(np.unique(condition.hint)) == {0, 255}
    same_size = edges(HIGH.changed(size=64)).encode(picture(64, 64))
    assert np.array_equal(edges(HIGH.changed(size=64)).condition(same_size, (64, 64)).hint, read(same_size, (64, 64)))


@pytest.mark.parametrize("name", ["edge", "edges+", "", "Edges", "edges@64@3", "a b"])
def test_names_of_no_form(name):
    with pytest.raises(UserError, match="form"):
        form_named(name, HIGH)


# --- pictures, latent codes, text, smaller edge maps ----------------------------------------------------------------


def photograph(height=120, width=90):
    """A smooth picture with some detail, as codecs expect it."""
    noise = np.random.default_rng(0).normal(0, 1, (height, width, 3))
    return (cv2.GaussianBlur(noise, (0, 0), 5) * 500 + 4 * noise + 128).clip(0, 255).astype(np.uint8)


def psnr(one, other):
    return 10 * np.log10(255**2 / np.square(one.astype(float) - other).mean())


@pytest.mark.parametrize("codec", ["jpeg", "webp", "avif"])
def test_a_picture_comes_back_as_well_as_its_quality_and_size_allow(codec):
    image, bounds = photograph(), {(None, 90): 33, (None, 20): 25, (60, 90): 22}
    sizes = []
    for (side, quality), bound in bounds.items():
        form = form_named(f"{codec}:{quality}" + (f"@{side}" if side else ""), HIGH)
        kept = form.encode(image)
        assert kept == form.encode(image)
        (request,) = [form.condition(kept, image.shape[:2])]
        assert request.size == ((120, 90) if side is None else (80, 60))
        back = resize_back(request.start, *image.shape[:2])
        assert back.shape == image.shape
        assert psnr(back, image) > bound
        sizes.append(len(kept))
        assert form.check(kept, image) is None
        assert form.check(form.encode(255 - image), image)[0] == "made otherwise"
        assert form.raw_bits(*image.shape[:2]) is None
    assert sizes[0] > 1.5 * sizes[1]
    assert sizes[0] > 1.5 * sizes[2]


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    """A handwritten digit, 28 x 28, greyscale: what the bundled model's autoencoder knows."""
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, train=1, test=1)
    return np.asarray(Image.open(next((folder / "MNIST" / "train").glob("3/*"))).convert("L"))


@pytest.mark.parametrize(("bits", "bound"), [(8, 20), (6, 20), (3, 18)])
def test_a_latent_code_comes_back_as_well_as_its_bits_allow(digit, bits, bound):
    form = form_named(f"latent:{bits}@64", HIGH).using(Machine(model="tiny"))
    kept = form.encode(digit)
    assert kept == form.encode(digit)
    assert len(kept) <= 5 + form.raw_bits(28, 28) // 8 == 5 + bits * 4 * 8 * 8 // 8
    exact = form.autoencoder.encode(form.shown(digit))
    step = np.ptp(exact) / (2**bits - 1)
    assert np.abs(form.latents(kept, (28, 28)) - exact).max() <= 0.51 * step + 2e-3  # ends of 16 bits
    back = form.condition(kept, (28, 28)).start
    assert back.shape == (28, 28, 3)
    assert psnr(back[:, :, 1], digit) > bound
    assert form.check(kept, digit) is None
    assert form.check(kept, np.flipud(digit))[0] == "made otherwise"
    for broken in (b"", kept[:-1], kept + b"0", b"\x07" + kept[1:]):
        with pytest.raises(OSError, match="empty" if not broken else "no latent code"):
            form.condition(broken, (28, 28))


def test_latents_are_computed_on_the_process_s_device(monkeypatch):
    """In reader threads, too, where CUDA's current device is the first one, whatever the process's is."""
    form = form_named("latent:4", HIGH).using(Machine(model="tiny"))
    form.release()
    launch("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert form.autoencoder.device == torch.device("cpu")


def test_the_autoencoder_alone_is_loaded_and_freed():
    form = form_named("latent:4", HIGH).using(Machine(model="tiny"))
    whole = load_model("tiny").first_stage_model
    alone = weakref.ref(form.autoencoder.network)
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), alone().parameters(), strict=True))
    form.release()
    gc.collect()
    assert alone() is None


@pytest.mark.parametrize("message", ["CUDA out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_a_picture_that_does_not_fit_the_device_can_not_be_encoded(message, monkeypatch):
    form = form_named("latent:4", HIGH).using(Machine(model="tiny"))
    autoencoder = form.autoencoder
    error = torch.OutOfMemoryError(message) if "out of" in message else RuntimeError(message)

    def refuse(pixels):
        raise error

    monkeypatch.setattr(autoencoder.network, "encode", refuse)
    with pytest.raises(OSError, match="40 x 48 pixels do not fit on cpu: name a side"):
        form.encode(photograph(40, 48))
    error = RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        form.encode(photograph(40, 48))
    form.release()


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (40, 24)])
def test_a_latent_code_of_any_size(size):
    form = form_named("latent:4", HIGH).using(Machine(model="tiny"))
    image = photograph(*size)
    kept = form.encode(image)
    assert form.condition(kept, size).start.shape == image.shape
    assert form.raw_bits(*size) == 4 * 4 * max(2, -(-size[0] // 8)) * max(2, -(-size[1] // 8))
    assert form.check(kept, image) is None


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 4, 100, 4000])
def test_levels_come_back_from_either_coder(bits, count):
    levels = np.random.default_rng(0).binomial(2**bits - 1, 0.4, count).astype(np.uint8)
    for code, decode in CODERS:
        assert np.array_equal(decode(code(levels, bits), count, bits), levels)
    if count == 4000 and bits > 2:
        assert len(CODERS[1][0](levels, bits)) < count * bits / 8 + 20


def test_a_latent_code_without_weights_says_so():
    form = form_named("latent:4", HIGH).using(Machine(model="/nowhere/x.pth"))
    with pytest.raises(UserError, match="nowhere"):
        form.settings()


@pytest.mark.parametrize("codec", ["jpeg", "webp", "avif"])
def test_a_greyscale_picture_stays_grey(codec):
    image = np.ascontiguousarray(photograph()[:, :, 0])
    form = form_named(f"{codec}:80", HIGH)
    back = form.condition(form.encode(image), image.shape, True).start
    assert np.ptp(back.astype(int), axis=2).max() <= 3
    assert psnr(back[:, :, 0], image) > 28


def test_a_picture_is_never_enlarged():
    image = photograph(40, 30)
    form = form_named("webp:50@64", HIGH)
    assert form.condition(form.encode(image), (40, 30)).size == (40, 30)


def test_the_copy_of_a_picture_is_lossless(tmp_path):
    form, picture = form_named("webp:10@20", HIGH), photograph()
    with (tmp_path / "x.png").open("wb") as file:
        form.save_copy(picture, file, False, "ESCORT 0123456789ab")
    with Image.open(tmp_path / "x.png") as copy:
        assert np.array_equal(np.asarray(copy), picture)
    assert read_mark(tmp_path / "x.png") == "ESCORT 0123456789ab"


def test_a_smaller_edge_map():
    image = picture(90, 120)
    form = form_named("edges@45", LOW)
    small = cv2.Canny(cv2.resize(image, (60, 45), interpolation=cv2.INTER_AREA), 100, 200)
    kept = form.encode(image)
    assert np.array_equal(read(kept, (45, 60)), small)
    assert form.raw_bits(90, 120) == 45 * 60
    hint = form.condition(kept, (90, 120)).hint
    assert np.array_equal(hint, cv2.resize(small, (320, 256), interpolation=cv2.INTER_NEAREST))
    assert form.check(kept, image) is None
    assert form.settings() != form_named("edges@44", LOW).settings()


def test_a_sketch_is_the_edge_map_of_a_blurred_image_without_small_fragments():
    image = photograph(224, 300)
    form = form_named("edges:1.5", HIGH)
    kept = form.encode(image)
    found = read(kept, (224, 300))
    plain = cv2.Canny(cv2.GaussianBlur(image, (0, 0), 1.5), 60, 120)
    left, expected, dropped = set(zip(*np.nonzero(plain), strict=True)), np.zeros_like(plain), 0
    while left:
        fragment, border = set(), [left.pop()]
        while border:
            y, x = border.pop()
            fragment.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border += near
        dropped += len(fragment) < 30
        for at in fragment if len(fragment) >= 30 else ():
            expected[at] = 255
    assert dropped, "else the test shows nothing"
    assert np.array_equal(found, expected)
    assert form.check(kept, image) is None
    small = form_named("edges:1.5@64", HIGH)
    assert small.edge_size(224, 300) == (64, 86)
    settings = [f.copy_settings() for f in (form, small, form_named("edges:2", HIGH), edges(HIGH))]
    assert all(one != other for i, one in enumerate(settings) for other in settings[:i])
    assert settings[0]["low_threshold"] == form.settings()["low_threshold"] == 60


@pytest.mark.parametrize(("side", "smallest"), [(224, 30), (112, 15)])
def test_the_smallest_fragment_of_a_sketch_grows_with_the_side(side, smallest):
    for width, is_kept in ((smallest // 2 + 3, True), (1, False)):
        image = np.zeros((side, side, 3), np.uint8)
        image[side // 2, side // 3 : side // 3 + width] = 255
        assert sketched(image, 0.5).any() == is_kept


def test_an_edge_map_and_a_picture_in_one_file():
    image = photograph()
    form = form_named("edges+webp:80@40", HIGH)
    edge_map, small = form_named("edges", HIGH).encode(image), form_named("webp:80@40", HIGH).encode(image)
    kept = form.encode(image)
    start = len(kept) - len(small) - len(edge_map)
    assert start <= 2
    old = io.BytesIO()
    Image.fromarray(read(edge_map, (120, 90)) > 0).save(old, "WEBP", lossless=True)
    earlier = struct.pack("<I", len(old.getvalue())) + old.getvalue() + small
    for each in (kept, earlier):
        condition = form.condition(each, image.shape[:2])
        assert condition.size == condition.hint.shape == condition.start.shape[:2] == (704, 512)
        hint = cv2.resize(read(edge_map, (120, 90)), (512, 704), interpolation=cv2.INTER_NEAREST)
        assert np.array_equal(condition.hint, hint)
        assert psnr(cv2.resize(condition.start, (90, 120), interpolation=cv2.INTER_AREA), image) > 22
        assert form.check(each, image) is None
    assert form.check(form.encode(photograph()[::-1].copy()), image)
    swapped = kept[: start + len(edge_map)] + form_named("webp:80@40", HIGH).encode(255 - image)
    assert form.check(swapped, image) == ("made otherwise", "the image gives another picture")
    for broken in (b"", b"\0\0", kept[: len(edge_map)], b"\0" * 20, b"\xff" * 20):
        with pytest.raises(OSError, match=r"\w"):
            form.condition(broken, (120, 90))


@pytest.mark.parametrize("greyscale", [False, True])
def test_an_edge_map_and_colours_in_one_code(greyscale):
    image = photograph()
    image = np.ascontiguousarray(image[:, :, 0]) if greyscale else image
    form, alone = form_named("edges+colour@16", HIGH), form_named("edges", HIGH)
    kept, edge_map = form.encode(image), alone.encode(image)
    assert 5 < len(kept) - len(edge_map) < 60
    condition = form.condition(kept, image.shape[:2])
    assert np.array_equal(condition.hint, alone.condition(edge_map, image.shape[:2]).hint)
    start = cv2.resize(condition.start, (90, 120), interpolation=cv2.INTER_AREA)
    assert psnr(start, image if image.ndim == 3 else np.dstack([image] * 3)) > 20
    assert form.check(kept, image) is None
    for other in (image[::-1].copy(), 255 - image):
        assert form.check(form.encode(other), image)
    for broken in (b"", kept[: len(kept) // 2], kept * 2):
        with pytest.raises(OSError, match=r"\w"):
            form.condition(broken, image.shape[:2])
    assert form.has_start
    assert form_named("edges:1.5@64+colour@8", HIGH).name == "edges:1.5@64+colour@8"


@pytest.mark.parametrize("shape", [(120, 90, 3), (120, 90), (1, 1, 3), (1, 300, 3), (300, 20, 3)])
def test_a_tiny_picture_is_as_long_as_its_share_of_an_edge_map_s_code(shape):
    """And the picture that comes back is the same to the bit."""
    image = cv2.resize(photograph(), shape[1::-1], interpolation=cv2.INTER_AREA)
    image = image if len(shape) == 3 else np.ascontiguousarray(image[:, :, 1])
    form, both, alone = (form_named(name, HIGH) for name in ("colour@8", "edges+colour@8", "edges"))
    kept = form.encode(image)
    start = form.condition(kept, shape[:2]).start
    assert min(start.shape[:2]) == min(8, *shape[:2])
    assert np.array_equal(start, both.decoded(both.encode(image), shape[:2])[0])
    assert 0 < len(kept) <= len(both.encode(image)) <= len(kept) + len(alone.encode(image)) + 1
    assert form.check(kept, image) is None
    assert form.check(kept, 255 - image) == ("made otherwise", "the image gives other colours")
    for broken in (b"", kept * 2):
        with pytest.raises(OSError, match=r"\w"):
            form.condition(broken, shape[:2])


def test_only_copies_that_start_from_a_picture_depend_on_its_strength():
    both = {name: [form_named(name, p).copy_settings() for p in (HIGH, HIGH.changed(start_strength=0.3))]
            for name in ("edges", "text", "edges+webp:80@40")}  # fmt: skip
    assert {name: one == other for name, (one, other) in both.items()} == {
        "edges": True, "text": True, "edges+webp:80@40": False}  # fmt: skip
    with pytest.raises(UserError, match="--start-strength lies above 0"):
        HIGH.changed(start_strength=0)


def test_text_keeps_nothing_and_its_copies_differ_by_image():
    form = form_named("text", LOW)
    assert form.encode(picture(), "disc") == b""
    assert form.raw_bits(90, 120) == 0
    condition = form.condition(b"", (90, 120))
    assert (condition.size, condition.hint, condition.start) == ((256, 320), None, None)
    seeds = {form.seed(Path(f"{name}.jpg"), k) for name in "abcdef" for k in range(5)}
    assert len(seeds) == 30
    assert form.seed(Path("x/a.jpg"), 3) == form.seed(Path("y/a.jpg"), 3)
    drawn = {form.seed(Path(f"{i}.jpg"), k) % 2**32 for i in range(5000) for k in range(2)}  # all that torch reads
    assert len(drawn) > 9990


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("webp", "needs a quality"),
        ("webp:101", "needs a quality"),
        ("webp:x", "needs a quality"),
        ("text@3", "takes no argument"),
        ("edges:x", "sigma of a blur"),
        ("edges:0", "sigma of a blur"),
        ("edges:1.", "sigma of a blur"),
        ("edges+colour", "comes a picture"),
        ("colour", "needs a side in pixels"),
        ("colour:3@8", "needs a side in pixels"),
        ("latent", "needs bits a value, 1 to 8"),
        ("latent:9", "needs bits a value, 1 to 8"),
        ("edges+text", "comes a picture"),
        ("webp:10+webp:10", r"no form 'webp\+'"),
        ("depth", "no form 'depth': choose one of .*edges"),
        ("webp:10@0", "no form's name"),
    ],
)
def test_wrong_names_say_what_is_right(name, words):
    with pytest.raises(UserError, match=words):
        form_named(name, HIGH)
