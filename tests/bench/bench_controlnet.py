"""Seconds a copy: the published scripts' way, ours, and diffusers' pipeline; same weights, steps and noise, in one run.

    python tests/bench/bench_controlnet.py                      # the bundled model, 64x64, a minute
    python tests/bench/bench_controlnet.py --full-size          # Stable Diffusion's size, 256x256, float32
    python tests/bench/bench_controlnet.py --full-size --device cuda --precision bf16 --size 512 \
        --samplers ddim:20:9,lcm:4:1,dpm++2m:20:9 --batch-sizes 1,4,16,32
    python tests/bench/bench_controlnet.py --full-size --device cuda --precision bf16 --size 512 \
        --batch-sizes 16 --skip published,diffusers --contiguous --compile

--model sd15 in place of --full-size: real weights.  --samplers sampler:steps:guidance,...: a table for each.

- published: the loop of the published scripts, on our networks with plain layers: one picture at a time, two passes a
  step for guidance, float32, both texts and (in every pass) the hint encoded each time, attention with all its scores
  in memory.
  DDIM alone.
- ours: `compress.generators.controlnet.PictureGenerator`, as compress/run.py uses it.  Also with torch.compile
  (--compile) or OpenVINO (--openvino), on a GPU without channels-last weights
  (--contiguous), and with TAESD's small decoder, of random weights (--small-decoder; by OpenVINO where that is asked).
- diffusers: StableDiffusionControlNetPipeline with the same sampler, and text encodings made beforehand.

"s once" is what does not depend on the steps: texts, hint, decoder.  "GPU peak" is on top of the weights.  The first
lines compare the pictures with the first contender's: the published loop's are float32 whatever --precision.  Without
it, a sampler's pictures are compared with diffusers'; LCM draws other noise there, so its pictures differ.

The contenders take turns; of each the fastest round counts, as other work on the machine only ever adds time.
--full-size fills the networks with random numbers: no checkpoint is needed, and speed depends on none.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compress.forms import Condition, Request
from compress.generators.controlnet import MOST_ON_A_GPU, PictureGenerator
from compress.presets import HIGH, Preset, Sampling
from ControlNet.cldm.model import MODELS_FOLDER, create_empty_model, load_model
from ControlNet.cldm.small_decoder import SmallDecoder, use_small_decoder
from ControlNet.cldm.weights import find_weights
from ControlNet.ldm.schedule import ddim_timesteps
from tests.bench.contenders import Contender, build, diffusers_pipeline, ours, published, random_state

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DRAWING = ("lcm", "tcd")  # samplers that draw noise in each step
TEXTS = ("digit four", "digit seven", "apple pie", "golden retriever")

# --- measuring ---------------------------------------------------------------------------------------------------


def make_jobs(count: int, size: int) -> list[Request]:
    rng = np.random.default_rng(0)
    hints = (rng.random((count, size, size)) > 0.95).astype(np.uint8) * 255
    return [
        Request(Path(f"{i}.jpg"), i, TEXTS[i % len(TEXTS)], Condition((size, size), hint), (size, size), False, seed=i)
        for i, hint in enumerate(hints)
    ]


def tflop_per_copy(config: Path, size: int, sampling: Sampling) -> float:
    """Multiplications and additions, in 1e12: the steps and the decoder, counted without computing them."""
    passes = 1 if sampling.guidance == 1 else 2
    with torch.device("meta"):
        model = create_empty_model(config).requires_grad_(False)
        x, hint = torch.empty(passes, 4, size // 8, size // 8), torch.empty(passes, 3, size, size)
        context = torch.empty(passes, 77, model.model.diffusion_model._context_dim)
        t = torch.empty(passes, dtype=torch.int64)
        features = model.control_model.encode_hint(hint)
        with FlopCounterMode(display=False) as step:
            model.apply_model(x, t, {"c_concat": [hint], "c_crossattn": [context], "hint_features": features})
        with FlopCounterMode(display=False) as decoder:
            model.decode_first_stage(x[:1])
    return (sampling.steps * step.get_total_flops() + decoder.get_total_flops()) / 1e12


def measure(
    contenders: Mapping[str, Contender],
    preset: Preset,
    jobs: Mapping[str, Sequence[Request]],
    steps: list[int],
    rounds: int,
):
    """{contender: {steps: seconds a copy}}, the least of the rounds, and {contender: peak bytes on the GPU}.

    A contender whose batch does not fit the GPU is left out.
    """
    cuda = torch.cuda.is_available()
    seconds = {name: dict.fromkeys(steps, float("inf")) for name in contenders}
    peaks = dict.fromkeys(contenders, 0)
    for turn in range(rounds + 1):  # the first one loads kernels, packs, compiles
        for name in list(seconds):
            try:
                for count in steps:
                    if cuda:
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    start = time.perf_counter()
                    contenders[name](preset, jobs[name], count)
                    if turn > 0:
                        took = (time.perf_counter() - start) / len(jobs[name])
                        seconds[name][count] = min(seconds[name][count], took)
                    if cuda:
                        peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
            except torch.OutOfMemoryError:
                del seconds[name]
    return seconds, peaks


def real_steps(name: str, preset: Preset, steps: int) -> int:
    """How many steps a contender makes when asked for `steps`: of DDIM, every (1000 // steps)-th timestep.

    The published schedule takes all of them, which may be more (4 for 3); diffusers takes the first `steps`.
    """
    return len(ddim_timesteps(steps)) if preset.sampling.sampler == "ddim" and name != "diffusers" else steps


def whole_copy(name: str, preset: Preset, seconds: Mapping[int, float]) -> tuple[float, float, float]:
    """(seconds of a copy, of a step, of what is done once); from two numbers of steps, or from the whole copy alone."""
    steps = real_steps(name, preset, preset.sampling.steps)
    if len(seconds) == 1:
        (whole,) = seconds.values()
        return whole, whole / steps, float("nan")
    (few, less), (many, more) = ((real_steps(name, preset, count), time) for count, time in sorted(seconds.items()))
    step = (more - less) / (many - few)
    once = less - few * step
    return once + steps * step, step, once


SAME_PSNR = {"fp32": 40, "bf16": 20, "fp16": 30}
"""dB to the first contender's pictures, above which two sets of pictures differ by rounding alone."""


def compare(pictures: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> tuple[float, str]:
    """How far apart two sets of pictures are: PSNR in dB, and in words."""
    difference = np.abs(np.stack(pictures).astype(float) - np.stack(others))
    mean_square = np.square(difference).mean()
    psnr = 10 * np.log10(255**2 / mean_square) if mean_square else float("inf")
    return psnr, f"mean {difference.mean():.3f} and at most {difference.max():.0f} levels of 255, PSNR {psnr:.1f} dB"


def comparable(
    contenders: Mapping[str, Contender], preset: Preset, jobs: Sequence[Request], steps: int, least: float
) -> set[str]:
    """Contenders that make the same pictures as the first one; says how far each is from it.

    Others are not ranked, but for LCM and TCD, where noise that is drawn in each step makes other pictures.
    """
    first, *others = contenders
    expected = contenders[first](preset, jobs[:1], steps)
    same = {first}
    for name in others:
        psnr, words = compare(contenders[name](preset, jobs[:1], steps), expected)
        counts = real_steps(name, preset, steps), real_steps(first, preset, steps)
        if counts[0] == counts[1] and (psnr >= least or preset.sampling.sampler in DRAWING):
            same.add(name)
        else:
            words += f": other pictures ({counts[0]} steps against {counts[1]}), not ranked"
        print(f"{name} against {first}, {steps} steps: {words}")
    return same


# --- the command -------------------------------------------------------------------------------------------------


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = "CPU"
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{os.cpu_count()} cores, {name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="as compress/run.py takes it [tiny]")
    parser.add_argument("--full-size", action="store_true", help="Stable Diffusion 1.5's networks, random weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="ours' and diffusers' [fp32]")
    parser.add_argument("--size", type=int, help="of the pictures [64 for tiny, else 256]")
    parser.add_argument("--samplers", help="sampler:steps:guidance,... [ddim:10:9 for tiny, else ddim:20:9]")
    parser.add_argument("--measured-steps", type=int, help="time 1 and this many, and add up [CPU, full size: 4]")
    parser.add_argument("--batch-sizes", help="ours' and diffusers', such as 1,2,4 [by device]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile as well")
    parser.add_argument("--openvino", action="store_true", help="ours with OpenVINO as well, on a CPU")
    parser.add_argument("--small-decoder", action="store_true", help="ours with TAESD's decoder as well")
    parser.add_argument("--contiguous", action="store_true", help="ours without channels-last weights as well")
    parser.add_argument("--skip", default="", help="contenders to leave out, such as published,diffusers")
    return parser.parse_args()


def make_contenders(config: Path, state: Mapping[str, Tensor], options: argparse.Namespace) -> dict[str, Contender]:
    """A model for each contender, as one may be packed and another compiled; on the same tensors, where these agree."""
    dtype, skipped = PRECISIONS[options.precision], options.skip.split(",")
    exact = build(config, state, options.device, torch.float32)
    state = build(config, exact.state_dict(), options.device, dtype).state_dict()
    contenders: dict[str, Contender] = {}
    if "published" not in skipped:
        contenders["published"] = published(exact)
    if "diffusers" not in skipped:
        contenders["diffusers"] = diffusers_pipeline(config, build(config, state, options.device, dtype))
    wanted = {"ours": True, "ours, contiguous": options.contiguous, "ours, compiled": options.compile}
    wanted |= {"ours, openvino": options.openvino}
    wanted |= {"ours, small dec.": options.small_decoder}
    engines = {"ours, compiled": "compile", "ours, openvino": "openvino"}
    engines |= {"ours, small dec.": "openvino"} if options.openvino else {}
    for name in [name for name, asked in wanted.items() if asked and name not in skipped]:
        engine = engines.get(name, "torch")
        model = build(config, state, options.device, torch.float32 if engine == "openvino" else dtype)
        if name == "ours, small dec.":
            use_small_decoder(model.first_stage_model, model.scale_factor, SmallDecoder().to(model.device, model.dtype))
        generator = PictureGenerator(HIGH, model, engine=engine, precision=options.precision)
        if name == "ours, contiguous":
            model.to(memory_format=torch.contiguous_format)
        contenders[name] = ours(generator)
    return contenders


def table(
    contenders: Mapping[str, Contender], config: Path, preset: Preset, sizes: list[int], options: argparse.Namespace
) -> None:
    """Measure with one sampler, and print a row for each batch size and contender."""
    size, sampling = preset.shorter_side, preset.sampling
    on_gpu, steps = options.device != "cpu", sampling.steps
    few = options.measured_steps or (4 if not on_gpu and steps > 4 and config.stem == "cldm_v15" else None)
    few = few if few and sampling.sampler == "ddim" else None
    measured = [1, few] if few else [steps]
    tflop = tflop_per_copy(config, size, sampling)
    print(f"\n{sampling.sampler}, {steps} steps, guidance {sampling.guidance:g}: {tflop:.3g} TFLOP a copy")
    if few:
        print(f"a copy is added up: what is done once and {steps} steps, from copies of 1 and of {few} steps")
    if sampling.sampler != "ddim":
        contenders = {name: run for name, run in contenders.items() if name != "published"}
    ranked = comparable(contenders, preset, make_jobs(1, size), measured[-1], SAME_PSNR[options.precision])
    row = "{:>5}  {:16} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>9}"
    print(row.format("batch", "", "s/copy", "s/step", "s once", "copies/s", "speed-up", "TFLOP/s", "GPU peak"))
    for batch_size in sizes:
        jobs = make_jobs(batch_size, size)
        work = {name: jobs[:1] if name == "published" else jobs for name in contenders}
        # One picture at a time is the same for every batch size: measured once.
        taking_part = {name: run for name, run in contenders.items() if name != "published" or batch_size == sizes[0]}
        seconds, peaks = measure(taking_part, preset, work, measured, options.rounds)
        if batch_size == sizes[0] or "published" not in contenders:
            baseline = float("nan")
        for name in seconds:
            whole, step, once = whole_copy(name, preset, seconds[name])
            if name == next(iter(contenders)):
                baseline = whole
            figures = [f"{whole:.4g}", f"{step:.3g}", f"{once:.3g}" if few else "", f"{1 / whole:.3g}"]
            figures.append(f"x{baseline / whole:.2f}" if baseline > 0 and name in ranked else "")
            peak = f"{peaks[name] / 1e9:.2f} GB" if peaks[name] else ""
            print(row.format(len(work[name]), name, *figures, f"{tflop / whole:.3g}", peak).rstrip(), flush=True)


def main() -> None:
    options = arguments()
    tiny = options.model == "tiny" and not options.full_size
    size = options.size or (64 if tiny else 256)
    presets = []
    for text in (options.samplers or ("ddim:10:9" if tiny else "ddim:20:9")).split(","):
        sampler, steps, guidance = text.split(":")
        presets.append(HIGH.changed(size=size, sampler=sampler, steps=int(steps), guidance=float(guidance)))
    if options.full_size:
        config = MODELS_FOLDER / "cldm_v15.yaml"
        state = random_state(config, options.device)
    else:
        config, state = find_weights(options.model).config, load_model(options.model).state_dict()
    contenders = make_contenders(config, state, options)
    del state
    default = 8 if tiny else 1 if options.device == "cpu" else MOST_ON_A_GPU
    sizes = [int(number) for number in options.batch_sizes.split(",")] if options.batch_sizes else [default]
    what = "full size, random weights" if options.full_size else f"{options.model} model"
    print(f"{machine()}\n{what}, {size}x{size}, {options.precision}; speed-up against the first contender")
    for preset in presets:
        table(contenders, config, preset, sizes, options)


if __name__ == "__main__":
    main()
