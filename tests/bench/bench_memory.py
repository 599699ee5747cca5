"""GPU memory of copies at full size and of DER's phases, estimated on the meta device, whose tensors are counted.

    python tests/bench/bench_memory.py [--size 512] [--batch-sizes 1,4,16] [--precisions bf16,fp16] [--device cuda]
    python tests/bench/bench_memory.py --der resnet18 [--size 224] [--batch-sizes 64,128] [--device cuda]

With --device cuda the same is measured there, with random weights.

Counted are weights and all tensors that are alive at a time: of copies in guided sampling with an edge map and in
decoding; of DER, phases of 10 classes each, in two steps of SGD with momentum in float32.
Attention is taken to run in a fused kernel (without N x N scores).  Not counted: CUDA's context (about half a GB), the
workspaces of cuDNN and cuBLAS, and what the allocator can't use because it is in pieces.
"""

import argparse
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from compress.generators.controlnet import PictureGenerator
from compress.presets import HIGH
from ControlNet.cldm.model import MODELS_FOLDER, create_model
from convs.resnet import build_backbone
from models.der import DER
from models.networks import der_net
from tests.test_gpu_path import DTYPES, Strict, on_meta, requests


class Tracker(Strict):
    """Counts the bytes of all storages that are alive.  peak: the most at a time."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self._count(tensor)
        self.weights = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak(size: int, batch_size: int, precision: str) -> tuple[int, int]:
    """(bytes of the weights, most bytes alive) while a batch of copies is made."""
    model = on_meta(MODELS_FOLDER / "cldm_v15.yaml", DTYPES[precision])
    generator = PictureGenerator(HIGH.changed(size=size, steps=2), model, batch_size=batch_size)
    with Tracker(model) as tracker:
        generator(requests(batch_size, (size, size)))
    return tracker.weights, tracker.peak


def measured(size: int, batch_size: int, precision: str, device: str) -> tuple[int, int]:
    """The same, by the allocator of a GPU.  CUDA's context is not in it."""
    with torch.device(device):
        model = create_model(MODELS_FOLDER / "cldm_v15.yaml")
    for name, part in model.named_children():
        part.to(torch.float32 if precision == "fp16" and name == "first_stage_model" else DTYPES[precision])
    generator = PictureGenerator(
        HIGH.changed(size=size, steps=2), model.eval().requires_grad_(False), batch_size=batch_size
    )
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    generator(requests(batch_size, (size, size)))
    return weights, torch.cuda.max_memory_allocated(device)


PHASES = (0, 1, 2, 4, 9)
CLASSES = 10
"""Of each of DER's phases."""


def der_peak(backbone: str, size: int, batch_size: int, phase: int, device: str = "meta") -> tuple[int, int]:
    """(bytes of the weights, most bytes alive) in two training steps of a phase of DER: counted, or a GPU's."""
    is_meta = device == "meta"
    with torch.device(device):
        network = der_net(build_backbone(backbone, "large", stem="7x7")).to(device)
        for _ in range(phase + 1):
            network.grow(CLASSES)
        network.to(device).train()
        images = torch.empty(batch_size, 3, size, size)
        targets = torch.zeros(batch_size, dtype=torch.long)
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        if not is_meta:
            weights = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        with Tracker(network) if is_meta else nullcontext() as tracker:
            for _ in range(2):
                optimizer.zero_grad()
                outputs = network(images)
                loss = DER.loss(SimpleNamespace(nb_old=CLASSES * phase), outputs, images, targets)
                loss.backward()
                optimizer.step()
    return (tracker.weights, tracker.peak) if is_meta else (weights, torch.cuda.max_memory_allocated(device))


def print_der(backbone: str, size: int, batch_sizes: list[int], device: str) -> None:
    print(f"| {backbone}, {size} x {size} | weights | {' | '.join(f'batch {each}' for each in batch_sizes)} |")
    print("|---" * (len(batch_sizes) + 2) + "|")
    for phase in PHASES:
        found = [der_peak(backbone, size, each, phase, device) for each in batch_sizes]
        cells = [f"{found[0][0] / 1e9:.2f} GB", *(f"{most / 1e9:.1f} GB" for _, most in found)]
        print(f"| phase {phase}, {phase + 1} extractor{'s' if phase else ''} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, help="of the pictures [512; of DER 224]")
    parser.add_argument("--batch-sizes", help="[1,4,16; of DER 64,128]")
    parser.add_argument("--der", metavar="BACKBONE", help="training DER with this backbone, in place of copies")
    parser.add_argument("--precisions", default="bf16,fp16")
    parser.add_argument("--device", help="cuda or cuda:N, to measure there")
    options = parser.parse_args()
    options.size = options.size or (224 if options.der else 512)
    sizes = [int(size) for size in (options.batch_sizes or ("64,128" if options.der else "1,4,16")).split(",")]
    if options.der:
        print_der(options.der, options.size, sizes, options.device or "meta")
        return
    print(f"| {options.size} x {options.size} | weights | {' | '.join(f'batch {size}' for size in sizes)} |")
    print("|---" * (len(sizes) + 2) + "|")
    for precision in options.precisions.split(","):
        if options.device:
            found = [measured(options.size, size, precision, options.device) for size in sizes]
        else:
            found = [peak(options.size, size, precision) for size in sizes]
        cells = [f"{found[0][0] / 1e9:.1f} GB", *(f"{most / 1e9:.1f} GB" for _, most in found)]
        print(f"| {precision} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
