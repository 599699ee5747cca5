"""Pictures by ControlNet, a batch at a time.  Nothing here touches the disk."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from compress.forms import Request
from compress.generators import NoPicture
from compress.presets import Preset, Sampling
from ControlNet.cldm import codebook
from ControlNet.cldm.inference import is_out_of_memory, make_ready, pin, release, visiting
from ControlNet.sampling import Noise, draw, fresh_noise, make_schedule, sample_latents
from utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FULL_SIZE = 300_000_000
"""A model of more parameters than this keeps a CPU busy with one picture at a time."""

MOST_ON_A_GPU = 16
"""Pictures of 512 x 512 keep a large GPU busy long before this; more at a time only take memory."""

PICTURE_BYTES = 1_500_000_000
"""What a picture of 512 x 512 takes of a GPU's memory in 2-byte numbers, most of it in the decoder; a careful guess."""

MOST_BAD = 8
"""Pictures in a row, the first ones, that may hold values that are no numbers before the settings are blamed."""

log = logging.getLogger(__name__)


class Halving:
    """A generator that halves a batch that does not fit the device's memory until it does, and those that follow."""

    batch_size: int
    device: torch.device
    low_memory: bool

    def _in_parts(self, batch: Sequence, size: tuple[int, int], function: Callable[[Sequence], list]) -> list:
        """The function's results for a batch, of as many items at a time as fit.  size: of the pictures."""
        done: list[np.ndarray | NoPicture] = []
        batch_size_before = self.batch_size
        while len(done) < len(batch):
            part = batch[len(done) : len(done) + self.batch_size]
            try:
                done += function(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    mend = "" if self.low_memory else "--low-memory, --precision bf16 or "
                    picture = f"not even one picture of {size[0]} x {size[1]} pixels fits on {self.device}"
                    raise UserError(f"{picture}: use {mend}a smaller --size.") from error
            # Not within `except`: there the error's traceback still holds the tensors that did not fit.
            self.batch_size //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if self.batch_size < batch_size_before:
            log.warning(
                "%d pictures of %d x %d pixels at a time don't fit on %s: %d at a time from now on (--batch-size)",
                *(batch_size_before, *size, self.device, self.batch_size),
            )
        return done

    def _filled(self, batch: Sequence) -> list:
        """A batch of batch_size items, the last one repeated."""
        return [*batch, *[batch[-1]] * (self.batch_size - len(batch))]


class PictureGenerator(Halving):
    """Makes the pictures of copies.

    preset: the settings; model: a ControlLDM as `ControlNet.cldm.model.load_model` returns it; batch_size: copies
    generated together, None to choose it by device and model; engine, precision: as `make_ready` takes them.
    low_memory: for small GPUs.  The model stays where it is, on the CPU; only the part at work is on `device`: the text
    encoder, then UNet and control network, then the decoder, which makes one picture at a time.

    A copy depends on its prompt, its seed, the settings and the model alone: its noise is drawn by a random generator
    of its own, on the CPU.  As kernels may round differently at another batch size, an incomplete batch is padded.
    Measured: bit-exact on a CPU where the number of threads divides the batch size; elsewhere, and between batch
    sizes, a few pixels in ten thousand differ by one level of 255.
    """

    def __init__(
        self,
        preset: Preset,
        model,
        *,
        batch_size: int | None = None,
        engine: str = "torch",
        precision: str = "fp32",
        low_memory: bool = False,
        device: torch.device | str | None = None,
    ):
        self.preset = preset
        self.model = model
        self.low_memory = low_memory
        self._contexts: dict[str, torch.Tensor] = {}
        self._made_one, self._bad = False, 0  # whether a picture was good, and how many were not
        if model is not None:
            self.device = torch.device(device or model.device) if low_memory else model.device
            if low_memory:  # the schedule's tables, which also tell the sampler where the latents are to be
                for name, table in list(model.named_buffers(recurse=False)):
                    setattr(model, name, table.to(self.device))
                if self.device.type == "cuda":
                    pin(*model.children())
            make_ready(model, engine=engine, low_memory=low_memory, precision=precision)
        self.batch_size = batch_size or default_batch_size(model)
        self._decoded_together = 1 if low_memory else self.batch_size

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Request], steps: int | None = None) -> list[np.ndarray | NoPicture]:
        """See `Generator`.  Raises UserError where a single picture does not fit the device, or of MOST_BAD none came
        out as a picture."""
        return self._in_parts(batch, batch[0].condition.size, lambda part: self._pictures(part, steps))

    @torch.inference_mode()
    def encode(self, pictures: Sequence[np.ndarray], texts: Sequence[str], **codes) -> list[np.ndarray]:
        """The codes of pictures (HxWx3 uint8, of one generated size) of classes with these texts: coded x atoms each.

        codes: arguments of `codebook.encode` beside the steps.  Raises UserError as a call does.
        """
        pairs = list(zip(pictures, texts, strict=True))
        return self._in_parts(pairs, pictures[0].shape[:2], lambda part: self._codes(part, **codes))

    def close(self) -> None:
        """Let go of the model, which is not needed any more."""
        if self.model is not None:
            release(self.model)
        self.model = None
        self._contexts.clear()

    def _pictures(self, batch: Sequence[Request], steps: int | None) -> list[np.ndarray | NoPicture]:
        """Pictures of at most batch_size requests."""
        model, sampling = self.model, self.preset.sampling_for(batch[0].text)
        filled = self._filled(batch)
        height, width = batch[0].condition.size
        hints = self._hints(filled)
        starts = [request.condition.start for request in filled if request.condition.start is not None]
        start = self._latents(starts) if starts else None
        texts = [self.preset.prompt_text(request.text) for request in filled]
        contexts = self._encode([self.preset.negative_prompt, *texts])
        model.control_scales = sampling.control_scales(len(model.control_scales))
        schedule = make_schedule(sampling.sampler, model, steps or sampling.steps)
        x, noise = self._noise(filled, (model.channels, height // 8, width // 8))
        unconditional = [contexts[self.preset.negative_prompt].expand(len(filled), -1, -1)]
        with self._at_work("model", "control_model"):
            latents = sample_latents(
                model, sampling.sampler, schedule, x,
                {"c_concat": hints, "c_crossattn": [torch.cat([contexts[text] for text in texts])]},
                {"c_concat": hints if sampling.unconditional_control else None, "c_crossattn": unconditional},
                noise=noise,
                scales=sampling.guidance_scales(len(schedule.timesteps)),
                eta=sampling.eta,
                reuse_every=sampling.reuse_every,
                start=start,
                strength=sampling.start_strength,
            )  # fmt: skip
        decoded = self._decoded(latents)[: len(batch)].float()
        good = decoded.isfinite().flatten(1).all(1).cpu().tolist()
        self._made_one |= any(good)
        self._bad += good.count(False)
        if not self._made_one and self._bad >= MOST_BAD:
            raise UserError(f"none of {self._bad} pictures is one: {self._no_numbers(sampling)}.")
        pictures = (decoded * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        bad = NoPicture(self._no_numbers(sampling))
        return [picture if is_good else bad for picture, is_good in zip(pictures, good, strict=True)]

    def _no_numbers(self, sampling: Sampling) -> str:
        """Why a picture holds values that are no numbers, and what to do."""
        advice = f"lower --guidance ({sampling.guidance:g} now) or the scale of a LoRA, or look at the weights"
        if self.model.dtype != torch.float32:
            advice = "use --precision fp32"
        return f"in {self.model.dtype} the model's picture holds values that are no numbers: {advice}"

    def _noise(self, requests: Sequence[Request], shape: tuple[int, ...]) -> tuple[torch.Tensor, Noise]:
        """(the initial noise, B x shape; the noise of the steps): of each request's own, or of the walk of its code."""
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        fresh = fresh_noise(generators)
        codes = [request.condition.code for request in requests if request.condition.code is not None]
        if not codes:
            return draw((len(requests), *shape), generators, self.device), fresh
        initial = codebook.initial_noise(shape).expand(len(requests), *shape)
        return initial, codebook.noise_of_code(torch.from_numpy(np.stack(codes)), fresh)

    def _codes(self, batch: Sequence[tuple[np.ndarray, str]], **codes) -> list[np.ndarray]:
        """Codes of at most batch_size pictures of classes with these texts."""
        filled = self._filled(batch)
        latents = self._latents([picture for picture, _ in filled])
        texts = [self.preset.prompt_text(text) for _, text in filled]
        contexts = self._encode(texts)
        cond = {"c_concat": None, "c_crossattn": [torch.cat([contexts[text] for text in texts])]}
        if not latents.isfinite().all():
            raise UserError(f"can't encode: {self._no_numbers(self.preset.sampling)}.")
        with self._at_work("model"):
            encoded = codebook.encode(self.model, latents, cond, steps=self.preset.sampling.steps, **codes)
        return list(encoded[: len(batch)].cpu().numpy())

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents' pictures, B x 3 x H x W.  The decoder needs the most memory, and has a batch size of its own."""
        while True:
            try:
                with self._at_work("first_stage_model"):
                    return torch.cat([self.model.decode_first_stage(z) for z in latents.split(self._decoded_together)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._decoded_together == 1:
                    raise
            self._decoded_together //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _hints(self, requests: Sequence[Request]) -> list[torch.Tensor] | None:
        """[B x 3 x H x W, 0 to 1], or None where nothing controls the pictures."""
        pictures = [request.condition.hint for request in requests if request.condition.hint is not None]
        if not pictures:
            return None
        hints = torch.from_numpy(np.stack(pictures)).to(self.device)
        hints = hints[:, None] if hints.ndim == 3 else hints.permute(0, 3, 1, 2)
        return [(hints.to(self.model.dtype) / 255).expand(-1, 3, -1, -1)]

    def _latents(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """Mean latents of pictures of one size, as the UNet sees them: B x 4 x H/8 x W/8, float32."""
        with self._at_work("first_stage_model"):
            scaled = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
            parts = scaled.split(1 if self.low_memory else len(scaled))
            means = torch.cat([self.model.encode_first_stage(part).mode() for part in parts])
        return self.model.get_first_stage_encoding(means.float())

    def _encode(self, texts: Iterable[str]) -> dict[str, torch.Tensor]:
        """Text -> 1 x 77 x D.  Each is encoded once, and by itself: with others it might be rounded differently."""
        new = [text for text in dict.fromkeys(texts) if text not in self._contexts]
        if new:
            with self._at_work("cond_stage_model"):
                self._contexts |= {text: self.model.get_learned_conditioning([text]) for text in new}
        return self._contexts

    def _at_work(self, *parts: str) -> AbstractContextManager:
        """Inside, these parts of the model are on the device."""
        if not self.low_memory:
            return nullcontext()
        return visiting(self.device, *(getattr(self.model, part) for part in parts))


def default_batch_size(model) -> int:
    """Copies to generate together, where nobody said.

    On a CPU 1 with the full-size model, else 8; on a GPU the power of two, 16 at most, that its memory seems to hold
    beside the weights.  The memory that it has, not what is free: a copy should not depend on what else is running.
    """
    if model is None:
        return 8
    if model.device.type != "cuda":
        return 1 if sum(parameter.numel() for parameter in model.parameters()) > FULL_SIZE else 8
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    room = 0.9 * torch.cuda.get_device_properties(model.device).total_memory - weights
    size = MOST_ON_A_GPU
    while size > 1 and size * PICTURE_BYTES * model.dtype.itemsize / 2 > room:
        size //= 2
    return size
