"""Presets, and prompts: extracting, saving, loading."""

import cv2
import numpy as np
import pytest
from PIL import Image

from compress import prompt as prompts
from compress.presets import HIGH, LOW
from compress.prompt import Prompt
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


def test_high_resolution_edges_have_the_size_of_the_image():
    image = picture()
    prompt = prompts.extract(image, "disc", HIGH)
    assert prompt.text == "disc"
    assert (prompt.edge_map == cv2.Canny(image, 100, 200)).all()
    assert prompt.edge_map.any()


def test_low_resolution_edges_have_the_generated_size():
    for shape, generated, interpolation in (
        ((90, 120), (256, 320), cv2.INTER_LANCZOS4),
        ((300, 300), (256, 256), cv2.INTER_AREA),
        ((600, 800), (512, 704), cv2.INTER_AREA),
    ):
        image = picture(*shape)
        prompt = prompts.extract(image, "disc", LOW)
        resized = cv2.resize(image, generated[::-1], interpolation=interpolation)
        assert prompt.edge_map.shape == generated
        assert (prompt.edge_map == cv2.Canny(resized, 100, 200)).all()


@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("height", "width"), [(90, 120), (33, 17), (7, 8), (1, 1), (2, 2), (1, 3000), (16383, 1)])
def test_an_edge_map_is_kept_bit_for_bit(tmp_path, height, width, density):
    edges = np.where(np.random.default_rng(0).random((height, width)) < density, 255, 0).astype(np.uint8)
    path = tmp_path / "a class" / "ü.webp"
    prompts.save(Prompt(edges, "disc"), path)
    with Image.open(path) as stored:
        assert (stored.format, stored.size) == ("WEBP", (width, height))
    loaded = prompts.load(path, "disc").edge_map
    assert loaded.dtype == np.uint8
    assert np.array_equal(loaded, edges)
    assert path.stat().st_size <= height * (width // 8 + 2) + 200  # no more than a bit a pixel, whatever it shows


@pytest.mark.parametrize(("height", "width"), [(3, 16384), (20000, 1)])
def test_an_edge_map_too_long_for_a_webp_is_kept_bit_for_bit(tmp_path, height, width):
    edges = np.where(np.random.default_rng(0).random((height, width)) < 0.2, 255, 0).astype(np.uint8)
    prompts.save(Prompt(edges, "disc"), tmp_path / "x.webp")
    with Image.open(tmp_path / "x.webp") as stored:
        assert (stored.format, stored.mode, stored.size) == ("PNG", "1", (width, height))
    assert np.array_equal(prompts.load(tmp_path / "x.webp", "disc").edge_map, edges)


def test_real_edges_take_less_than_a_png_of_them(tmp_path):
    prompt = prompts.extract(picture(224, 224), "disc", HIGH)
    prompts.save(prompt, tmp_path / "x.webp")
    Image.fromarray(prompt.edge_map > 0).save(tmp_path / "x.png", optimize=True)
    assert (tmp_path / "x.webp").stat().st_size < 0.9 * (tmp_path / "x.png").stat().st_size


def test_png_edge_maps_of_earlier_versions_are_read(tmp_path):
    edges = cv2.Canny(picture(), 100, 200)
    Image.fromarray(edges > 0).save(tmp_path / "a.png", optimize=True)
    assert np.array_equal(prompts.load(tmp_path / "a.png", "disc").edge_map, edges)


def test_edge_maps_of_the_published_scripts_are_read(tmp_path):
    edges = cv2.Canny(picture(), 100, 200)
    assert cv2.imwrite(str(tmp_path / "a.bmp"), edges)
    loaded = prompts.load(tmp_path / "a.bmp", "disc")
    assert (loaded.edge_map == edges).all()
    assert loaded.edge_map.dtype == np.uint8
    assert loaded.text == "disc"


def test_a_broken_edge_map_is_an_oserror_with_its_path(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"RIFF\x10\0\0\0WEBPVP8L")
    with pytest.raises(OSError, match=r"a\.webp"):
        prompts.load(tmp_path / "a.webp", "disc")


def test_the_hint_is_resized_by_nearest_neighbour():
    prompt = prompts.extract(picture(), "disc", HIGH)
    hint = prompts.hint(prompt, 512, 704)
    assert (hint == cv2.resize(prompt.edge_map, (704, 512), interpolation=cv2.INTER_NEAREST)).all()
    assert set(np.unique(hint)) == {0, 255}
    assert prompts.hint(prompt, 90, 120) is prompt.edge_map
