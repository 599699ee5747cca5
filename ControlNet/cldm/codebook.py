"""Codes of noise: a picture as the noise of each step of ancestral sampling, chosen from seeded codebooks.

Ohayon et al. 2025, "Compressed Image Generation with Denoising Diffusion Codebook Models" (DDCM): a step's noise is the
one of 2^bits Gaussian codewords that is most aligned with what the predicted clean latents still lack.  Vaisman et al.
2025, "Turbo-DDCM": it is the normalised sum of several signed codewords.  Who knows their numbers repeats the walk.

Beyond the papers:
- The steps lie where they change the picture (`ControlNet.ldm.schedule.ancestral`).
- The encoder looks ahead: it tries the few codewords that are most aligned, and takes the one after which the network's
  next prediction is nearest to the picture.  That changes neither the length of a code nor its decoding.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ControlNet.sampling import Guided, Noise, clean, ddim_mean, make_schedule

SEED = 2**31
"""Codeword k of step i is drawn with the seed SEED + 2^16 i + k, the initial noise with SEED - 1.

torch's CPU generator takes the low 32 bits of a seed.  They are far from the small numbers that copies have as seeds.
"""
MOST_BITS = 16

CHUNK = 2**20
"""Numbers of a codebook that are drawn at a time: 4 MB."""
CHUNKS_KEPT = 32


def noise_of_code(code: Tensor, fresh: Noise) -> Noise:
    """The noise of ancestral sampling that repeats the walk of a code, one for each item of the batch.

    code: as `encode` returns it, B x coded x atoms; fresh: the noise of the steps after the coded ones.
    """
    rows = code.cpu()

    def noise(x: Tensor, i: int) -> Tensor:
        if i >= rows.shape[1]:
            return fresh(x, i)
        words = torch.stack([noise_of(i, row, x[0].numel()) for row in rows[:, i].tolist()])
        return words.to(x).view_as(x)

    return noise


@torch.no_grad()
def encode(
    model, latents: Tensor, cond: dict, *, steps: int, coded: int, bits: int, atoms: int = 1, candidates: int = 1
) -> Tensor:
    """The code of latents: for each step the codewords' numbers, B x coded x atoms, int64, on the latents' device.

    model, cond: as `sample_latents` has them; latents: B x 4 x h x w, as the UNet sees them (scaled);
    steps: of the sampler; coded: how many of them get a code, the first ones, less than steps; bits: a codebook has
    2^bits words; atoms: of the sum that is a step's noise.  One atom is number k >= 0; several are in order of k, and
    the atom -w_k is ~k.  candidates: noises that are tried in each step; 1 takes the most aligned, as published.
    """
    schedule = make_schedule("ancestral", model, steps)
    predict = Guided(model, cond)
    wide = Guided(model, _repeated(cond, candidates))
    batch, shape = latents.shape[0], latents.shape[1:]
    latents = latents.float()
    x, code, eps = initial_noise(shape).to(latents).expand(latents.shape), [], None
    for i in range(coded):
        if eps is None:
            eps = predict(x, schedule.timesteps[i])
        x0 = clean(schedule, i, x, eps)
        numbers, noises = most_aligned((latents - x0).flatten(1), i, bits, atoms, candidates)
        mean, sigma = ddim_mean(schedule, i, x0, eps, eta=1.0)
        tried = mean[:, None] + sigma * noises.view(batch, -1, *shape)
        x, eps = tried[:, 0], None
        if tried.shape[1] > 1:
            flat = tried.flatten(0, 1)
            next_eps = wide(flat, schedule.timesteps[i + 1])
            missing = latents[:, None] - clean(schedule, i + 1, flat, next_eps).view_as(tried)
            best = missing.flatten(2).square().sum(2).argmin(1)
            rows = torch.arange(batch, device=latents.device)
            x, eps, numbers = tried[rows, best], next_eps.view_as(tried)[rows, best], numbers[rows, best]
        else:
            numbers = numbers[:, 0]
        code.append(numbers)
    if not code:
        return torch.zeros((batch, 0, atoms), dtype=torch.int64, device=latents.device)
    return torch.stack(code, 1)


def most_aligned(missing: Tensor, step: int, bits: int, atoms: int, candidates: int) -> tuple[Tensor, Tensor]:
    """(numbers, B x candidates x atoms; noises, B x candidates x size) that are most aligned with `missing` (B x size).

    The first candidate has the `atoms` best codewords; each further one has the next best in place of its last.  There
    are fewer where the codebook has no more words.
    """
    (batch, size), signed, keep = missing.shape, atoms > 1, min(atoms + candidates - 1, 2**bits)
    scores, words = missing.new_empty((batch, 0)), missing.new_empty((batch, 0, size))  # the best so far
    numbers = torch.empty((batch, 0), dtype=torch.int64, device=missing.device)
    for first, chunk in codebook(step, bits, size):
        chunk = chunk.to(missing)
        products = missing @ chunk.T
        best, where = (products.abs() if signed else products).topk(min(keep, len(chunk)), 1)
        minus = (products.gather(1, where) < 0) & signed
        numbers = torch.cat([numbers, torch.where(minus, ~(where + first), where + first)], 1)
        words = torch.cat([words, torch.where(minus[..., None], -chunk[where], chunk[where])], 1)
        scores, where = torch.cat([scores, best], 1).topk(min(keep, scores.shape[1] + best.shape[1]), 1)
        numbers, words = numbers.gather(1, where), words.gather(1, where[..., None].expand(-1, -1, size))
    lists = [[*range(atoms - 1), last] for last in range(atoms - 1, keep)]
    numbers, words = numbers[:, lists], words[:, lists]
    if not signed:
        return numbers, words[:, :, 0]
    order = torch.where(numbers < 0, ~numbers, numbers).argsort(2)
    return numbers.gather(2, order), normalised(words.sum(2))


def normalised(noise: Tensor) -> Tensor:
    """With a mean square of 1, over the last dimension."""
    return noise / noise.square().mean(-1, keepdim=True).sqrt()


def codebook(step: int, bits: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """A step's codewords as (number of the first one, words x size) in chunks of at most about CHUNK numbers."""
    count = max(1, CHUNK // size)
    for first in range(0, 2**bits, count):
        yield first, _drawn(step, first, min(count, 2**bits - first), size)


@lru_cache(CHUNKS_KEPT)
def _drawn(step: int, first: int, count: int, size: int) -> Tensor:
    return torch.stack([codeword(step, first + k, size) for k in range(count)])


def codeword(step: int, number: int, size: int) -> Tensor:
    """Normal noise of `size` numbers, float32, on the CPU."""
    return torch.randn(size, generator=torch.Generator().manual_seed(SEED + (step << MOST_BITS) + number))


def noise_of(step: int, numbers: Sequence[int], size: int) -> Tensor:
    """The noise of a step of a code, on the CPU."""
    if len(numbers) == 1:
        return codeword(step, numbers[0], size)
    words = [codeword(step, k, size) if k >= 0 else -codeword(step, ~k, size) for k in numbers]
    return normalised(sum(words[1:], words[0]))


def initial_noise(shape: Sequence[int]) -> Tensor:
    """Where the walks of all codes begin, on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(SEED - 1))


def _repeated(cond: dict, times: int) -> dict:
    """A conditioning of which each item stands `times` times, one after another."""
    return {
        name: tensors and [tensor.repeat_interleave(times, 0) for tensor in tensors] for name, tensors in cond.items()
    }
