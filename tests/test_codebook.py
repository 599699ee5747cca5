"""Codes of noise: the walk against the papers' equations, the codes' bytes, and what comes back."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compress.forms import form_named, resize_back
from compress.generators import batches
from compress.generators.controlnet import PictureGenerator
from compress.options import Machine
from compress.presets import HIGH
from ControlNet.cldm import codebook
from ControlNet.cldm.model import MODELS_FOLDER, create_empty_model, load_model
from ControlNet.sampling import fresh_noise
from tests.conftest import long_but
from tests.little_model import sampled
from tests.test_forms import psnr
from utils.curate.command import DIGIT_NAMES, read_digits
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA_BAR = np.cumprod(1 - BETAS)


class Denoiser:
    """The exact one of latents that are normal around a mean: a model for the samplers, in float64 for the tests."""

    num_timesteps, device, dtype = 1000, torch.device("cpu"), torch.float32
    alphas_cumprod = torch.from_numpy(ALPHA_BAR)
    mean = np.random.default_rng(3).normal(0, 1, (4, 2, 3))
    variance = np.random.default_rng(4).uniform(0.05, 1, (4, 2, 3))

    def eps(self, x, t):
        """E[eps | x_t]: of x = sqrt(a) x0 + sqrt(1 - a) eps with x0 ~ N(mean, variance)."""
        a = ALPHA_BAR[t]
        return (x - a**0.5 * self.mean) * (1 - a) ** 0.5 / (a * self.variance + 1 - a)

    def apply_model(self, x, t, cond):
        return torch.from_numpy(self.eps(x.double().numpy(), int(t[0]))).float()


COND = {"c_concat": None, "c_crossattn": [torch.zeros(5, 77, 8)]}


def word(step, k):
    return torch.randn(24, generator=torch.Generator().manual_seed(2**31 + step * 2**16 + k)).double().numpy()


def walked(code, steps, cond):
    """The latents at the end of a code's walk."""
    noise = codebook.noise_of_code(code, fresh_noise(None))
    shape = (len(code), 4, 2, 3)
    x = codebook.initial_noise(shape[1:]).expand(shape)
    return sampled(Denoiser(), "ancestral", steps, shape, cond, x=x, noise=noise)


def papers_walk(goal, steps, bits, atoms, candidates):
    """(numbers of each step, x0), one picture at a time in float64.

    DDCM: x_{i-1} = mu_i(x_i) + sigma_i C_i(k_i), k_i = argmax_k <C_i(k), x_0 - x0hat_i>, with DDPM's mu and sigma
    (Ho et al. 2020, equations 6 and 7) from one timestep to the next.  Turbo-DDCM: the normalised sum of the `atoms`
    words of the largest |<C_i(k), x_0 - x0hat_i>|, with their signs.  candidates: those of the next best words in the
    last one's place, of which the one with the smallest |x_0 - x0hat_{i-1}| is taken.
    """
    model, timesteps = Denoiser(), np.linspace(850, 50, steps).round().astype(int)
    x = torch.randn((4, 2, 3), generator=torch.Generator().manual_seed(2**31 - 1)).double().numpy()
    taken = []

    def predicted(x, t):
        return (x - (1 - ALPHA_BAR[t]) ** 0.5 * model.eps(x, t)) / ALPHA_BAR[t] ** 0.5

    for i, (t, s) in enumerate(itertools.pairwise(timesteps)):
        alpha = ALPHA_BAR[t] / ALPHA_BAR[s]
        x0 = predicted(x, t)
        mu = (ALPHA_BAR[s] ** 0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - ALPHA_BAR[s]) * x) / (1 - ALPHA_BAR[t])
        sigma = ((1 - ALPHA_BAR[s]) / (1 - ALPHA_BAR[t]) * (1 - alpha)) ** 0.5
        words = [word(i, k) for k in range(2**bits)]
        products = np.array([w @ (goal - x0).ravel() for w in words])
        order = np.argsort(-(np.abs(products) if atoms > 1 else products))
        tried = []
        for c in range(min(candidates, 2**bits - atoms + 1)):
            chosen = sorted([*order[: atoms - 1], order[atoms - 1 + c]])
            signs = [np.sign(products[k]) if atoms > 1 else 1 for k in chosen]
            noise = sum(sign * words[k] for sign, k in zip(signs, chosen, strict=True))
            noise = noise / (np.square(noise).mean() ** 0.5 if atoms > 1 else 1)
            after = mu + sigma * noise.reshape(mu.shape)
            numbers = [int(k) if sign > 0 else ~int(k) for sign, k in zip(signs, chosen, strict=True)]
            tried.append((np.square(goal - predicted(after, s)).sum() if candidates > 1 else 0, numbers, after))
        _, numbers, x = min(tried, key=lambda each: each[0])
        taken.append(numbers)
    return taken, predicted(x, timesteps[-1])


@pytest.mark.parametrize(
    ("steps", "bits", "atoms", "candidates"),
    [(6, 5, 1, 1), (9, 3, 1, 4), (4, 7, 3, 1), (5, 4, 2, 3), (3, 2, 4, 2), (4, 1, 1, 4)],
)
def test_a_code_is_that_of_the_papers_equations(steps, bits, atoms, candidates, monkeypatch):
    goals = np.random.default_rng(0).normal(0, 1, (5, 4, 2, 3))
    expected = [papers_walk(goal, steps, bits, atoms, candidates) for goal in goals]
    how = {"steps": steps, "coded": steps - 1, "bits": bits, "atoms": atoms, "candidates": candidates}
    code = codebook.encode(Denoiser(), torch.from_numpy(goals), COND, **how)
    assert code.tolist() == [numbers for numbers, _ in expected]
    latents = walked(code, steps, COND)
    np.testing.assert_allclose(latents.numpy(), np.stack([x0 for _, x0 in expected]), rtol=1e-4, atol=1e-4)
    part = codebook.encode(Denoiser(), torch.from_numpy(goals), COND, **{**how, "coded": 2})
    assert torch.equal(part, code[:, :2])
    codebook._drawn.cache_clear()
    monkeypatch.setattr(codebook, "CHUNK", 50)  # two codewords at a time
    assert torch.equal(codebook.encode(Denoiser(), torch.from_numpy(goals), COND, **how), code)
    codebook._drawn.cache_clear()


def test_looking_ahead_brings_the_picture_nearer():
    goals = np.random.default_rng(0).normal(Denoiser.mean, Denoiser.variance**0.5, (200, 4, 2, 3))
    goals = torch.from_numpy(goals)
    cond, errors = {"c_concat": None, "c_crossattn": [torch.zeros(200, 77, 8)]}, []
    for candidates in (1, 4):
        code = codebook.encode(Denoiser(), goals, cond, steps=7, coded=6, bits=4, candidates=candidates)
        latents = walked(code, 7, cond)
        errors.append((latents - goals).square().mean().item())
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.long
def test_at_stable_diffusions_size_a_codebook_is_never_held_whole(monkeypatch):
    """On the meta device, all but the codewords: 2^12 of 16,384 numbers, 268 MB a step."""
    model = create_empty_model(MODELS_FOLDER / "cldm_v15.yaml").to("meta")
    table = SimpleNamespace(  # the schedule is read on the CPU
        **{"apply_model": model.apply_model, "num_timesteps": 1000, "alphas_cumprod": torch.from_numpy(ALPHA_BAR)},
        **{"device": torch.device("meta"), "dtype": torch.float32},
    )
    drawn, draw = [], codebook._drawn
    monkeypatch.setattr(codebook, "_drawn", lambda *args: drawn.append(draw(*args)) or drawn[-1].to("meta"))
    sizes = []
    monkeypatch.setattr(codebook, "codeword", lambda step, k, size: sizes.append(size) or torch.empty(size))
    cond = {"c_concat": None, "c_crossattn": [torch.empty((2, 77, 768), device="meta")]}
    latents = torch.empty((2, 4, 64, 64), device="meta")
    code = codebook.encode(table, latents, cond, steps=2, coded=1, bits=12, candidates=2)
    assert (tuple(code.shape), code.device.type) == ((2, 1, 1), "meta")
    assert sizes == [16384] * 4096
    assert max(chunk.numel() for chunk in drawn) <= codebook.CHUNK
    assert draw.cache_info().currsize * codebook.CHUNK * 4 <= 2**27  # bytes, less than one step's codebook
    draw.cache_clear()


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "length"),
    [("codebook:6@20", 15), ("codebook:12@10", 15), ("codebook:1@3", 1), ("codebook:16@999", 1998),
     ("codebook:6@20/10", 8), ("codebook:6@20/0", 0), ("codebook:8x4@20", 79), ("codebook:1x2@9", 3),
     ("codebook:10x64@2", 102)],
)  # fmt: skip
def test_a_code_is_kept_in_as_many_bytes_as_its_numbers_need(name, length):
    form = form_named(name, HIGH)
    assert form.fixed_bytes == length == math.ceil(form.coded * math.log2(form.radix) / 8 - 1e-9)
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = [np.sort(rng.choice(2**form.bits, form.atoms, replace=False)) for _ in range(form.coded)]
        code = np.array(words).reshape(form.coded, form.atoms)
        code = np.where(rng.random(code.shape) < 0.5, ~code, code) if form.atoms > 1 else code
        kept = form.packed(code)
        assert len(kept) == length
        if form.coded:
            assert np.array_equal(form.unpacked(kept), code)
        else:
            assert form.unpacked(kept) is None
    assert form.raw_bits(28, 28) == 8 * length


def test_every_noise_of_a_step_has_a_code_of_its_own():
    form = form_named("codebook:3x3@2", HIGH)
    assert form.radix == math.comb(8, 3) * 8
    noises = {
        tuple(~k if minus else k for k, minus in zip(words, signs, strict=True))
        for words in itertools.combinations(range(8), 3)
        for signs in itertools.product((False, True), repeat=3)
    }
    assert {form._digit(noise) for noise in noises} == set(range(form.radix))
    assert {tuple(form._numbers(digit)) for digit in range(form.radix)} == noises


def test_what_is_no_code_is_an_oserror():
    form = form_named("codebook:5@3", HIGH)  # 15 bits
    for broken in (b"", b"\0", b"\0\0\0", b"\xff\xff"):
        with pytest.raises(OSError, match=r"\w"):
            form.condition(broken, (28, 28))
        with pytest.raises(OSError, match=r"\w"):
            form.check(broken, np.zeros((28, 28), np.uint8))
    assert form.check(b"\x7f\xff", np.zeros((28, 28), np.uint8)) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *(
            (name, "needs bits")
            for name in ("codebook", "codebook:6", "codebook:0@3", "codebook:6@1000", "codebook:2x5@3")
        ),
        *(("codebook:6x@20", "needs bits"), ("codebook:17@3", "1 to 16"), ("codebook:6@20/21", "has 20 steps")),
        *(("codebook:6@20+webp:10", "no form"), ("codebook:6@20/", "is no form's name")),
        *(("webp:10/3", "takes no part"), ("edges/3", "takes no part")),
    ],
)
def test_names_of_no_code(name, words):
    with pytest.raises(UserError, match=words):
        form_named(name, HIGH)


def test_a_name_and_what_it_stands_for():
    whole, part = form_named("codebook:6@20/20", HIGH), form_named("codebook:6@20/7", HIGH)
    assert (whole.name, whole.deterministic, whole.files.kept) == ("codebook:6@20", True, "codebook-6@20")
    assert (part.name, part.deterministic, part.files.kept) == ("codebook:6@20/7", False, "codebook-6@20-7")
    assert (whole.files.copy_ending, part.files.copy_ending) == (".png", ".jpg")
    assert whole.settings() != part.settings()
    other = form_named("codebook:6@20", HIGH.changed(prompt_template="a {label}"))
    assert whole.settings() != other.settings()  # the text steers the walk


# --- the bundled model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def digits():
    """Four digits that the bundled model has not seen, and their texts."""
    images, labels = read_digits()
    chosen = [np.flatnonzero(labels == digit)[410] for digit in (0, 2, 5, 7)]
    return [images[i] for i in chosen], [DIGIT_NAMES[digit] for digit in (0, 2, 5, 7)]


PRESET = HIGH.changed(size=64)


def encoded(form, model, digits, batch_size, **how):
    generator = PictureGenerator(form.preset, model, batch_size=batch_size, **how)
    return form.encode_batch([form.prepared(image) for image in digits[0]], digits[1], generator)


def decoded(form, model, codes, texts, numbers, batch_size=4, **how):
    """The copies with these numbers of each code, 28 x 28."""
    generator = PictureGenerator(form.preset, model, batch_size=batch_size, **how)
    requests = []
    for i, (code, text) in enumerate(zip(codes, texts, strict=True)):
        condition = form.condition(code, (28, 28))
        requests += [
            SimpleNamespace(text=text, condition=condition, seed=form.seed(SimpleNamespace(stem=str(i)), k))
            for k in numbers
        ]
    pictures = [picture for batch in batches(requests, batch_size) for picture in generator(batch)]
    return [resize_back(picture, 28, 28)[:, :, 0] for picture in pictures]


@pytest.mark.parametrize(
    ("name", "length", "batch_size", "bound"),
    long_but([("codebook:12@6", 9, 4, 19), ("codebook:12@10", 15, 8, 21)], ("codebook:12@6", 9, 4, 19)),
)
def test_a_digit_comes_back_whatever_its_batch(model, digits, name, length, batch_size, bound):
    form = form_named(name, PRESET).using(Machine(model="tiny"))
    codes = encoded(form, model, digits, batch_size)
    assert {len(code) for code in codes} == {length}
    assert encoded(form, model, digits, 1) == codes
    back = decoded(form, model, codes, digits[1], [0], batch_size)
    assert np.mean([psnr(picture, image) for picture, image in zip(back, digits[0], strict=True)]) > bound
    alone = decoded(form, model, codes, digits[1], [0], batch_size=1)
    assert np.abs(np.array(back, int) - np.array(alone, int)).max() <= 1
    twice = decoded(form, model, codes[:2], digits[1][:2], [0, 1])
    assert np.array_equal(twice[0], twice[1])


@pytest.mark.long
def test_a_code_of_float32_decodes_in_bfloat16_to_nearly_the_same_picture(model, digits):
    """Between devices float32 rounds differently by far less."""
    form = form_named("codebook:12@4", PRESET)
    codes = encoded(form, model, digits, 4)
    exact = decoded(form, model, codes, digits[1], [0])
    rounded = decoded(form, load_model("tiny", dtype=torch.bfloat16), codes, digits[1], [0], precision="bf16")
    assert np.mean([psnr(one, other) for one, other in zip(exact, rounded, strict=True)]) > 30


def test_copies_of_a_part_of_a_code_differ_the_less_the_more_is_kept(model, digits):
    spread, error = [], []
    for kept in (0, 2, 4):
        form = form_named(f"codebook:12@6/{kept}", PRESET)
        codes = encoded(form, model, digits, 4)
        assert {len(code) for code in codes} == {12 * kept // 8}
        back = np.array(decoded(form, model, codes, digits[1], [0, 1, 2]), float).reshape(4, 3, 28, 28)
        spread.append(back.std(1).mean())
        error.append(np.square(back - np.array(digits[0])[:, None]).mean())
    assert spread[0] > 1.5 * spread[1] > 3 * spread[2] > 0
    assert error[0] > 1.5 * error[1] > 2 * error[2]
