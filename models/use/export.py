"""A trained network as one file, with its class names and the test transform inside: ONNX or TorchScript.

Input `images`: B x 3 x H x W, uint8, RGB, of any size (all of a batch alike).  Output `probabilities`: B x classes, of
the classes in the file's `class_names`: ONNX's metadata has them as JSON, and so has TorchScript's extra file
`class_names.json`; a loaded TorchScript module also lists them as its attribute `class_names`.

The transform is the one of evaluation: the shorter side resized, the centre cropped, normalised.  Resizing is written
out as two matrix products, because neither format has Pillow's antialiased resize for sizes that are not known yet; a
pixel may differ by one level where rounding does.
"""

import importlib.util
import io
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from models.networks import GrowingNet
from models.use.learner import Learner
from utils.data.augment import Normalise, SmallTest
from utils.data.images import write_atomically
from utils.errors import UserError
from utils.results.show import printable

ENDINGS = {"onnx": ".onnx", "torchscript": ".pt"}
OPSET = 18


class TestPictures(nn.Module):
    """The transform of evaluation, on whole batches: uint8 B x 3 x H x W -> float32 B x 3 x side x side.

    resize: pixels of the shorter side, before the centre is cropped; keep_from: a shorter side from this to `resize` is
    not resized, and gets a black margin where it is less than `side`.
    """

    def __init__(self, side: int, resize: int, keep_from: int, cubic: bool, normalise: Normalise):
        super().__init__()
        self.side, self.resize, self.keep_from, self.cubic = side, resize, keep_from, cubic
        mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in normalise)
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, images: Tensor) -> Tensor:
        # The sizes as tensors: as numbers, tracing would keep those of its example.
        rows = torch.arange(images.size(2), device=images.device)
        columns = torch.arange(images.size(3), device=images.device)
        height, width = rows.max() + 1, columns.max() + 1
        shorter = torch.minimum(height, width)
        keeps = torch.logical_and(shorter >= self.keep_from, shorter <= self.resize)
        goal = torch.where(keeps, shorter, torch.full_like(shorter, self.resize))
        x = self.rounded(images.float() @ self.weights(width, columns, shorter, goal).t())
        x = self.rounded(self.weights(height, rows, shorter, goal) @ x)
        return x * self.scale + self.shift

    def rounded(self, levels: Tensor) -> Tensor:
        return torch.floor(levels + 0.5).clamp(0.0, 255.0)

    def weights(self, length: Tensor, places: Tensor, shorter: Tensor, goal: Tensor) -> Tensor:
        """Pillow's filter from `length` pixels to those of the centre: side x length, each row of sum 1 (0: black).

        places: 0 ... length - 1; the shorter side becomes `goal`.
        """
        resized = torch.div(length * goal, shorter, rounding_mode="floor")
        room = resized - self.side
        half = torch.div(room, 2, rounding_mode="floor")
        first = half + (room - 2 * half) * torch.remainder(half, 2)  # half the room, rounded to even
        if self.keep_from < self.resize:  # a margin is wider at the end
            first = torch.where(room < 0, -torch.div(-room, 2, rounding_mode="floor"), first)
        rows = torch.arange(self.side, device=places.device) + first
        ratio = length.double() / resized.double()
        centres = (rows.double() + 0.5) * ratio
        distance = (places.double()[None, :] + 0.5 - centres[:, None]).abs() / ratio.clamp(min=1.0)
        if self.cubic:
            near = (1.5 * distance - 2.5) * distance * distance + 1
            far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
            weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
        else:
            weights = (1 - distance).clamp(min=0.0)
        inside = torch.logical_and(rows >= 0, rows < resized)
        sums = torch.where(inside, weights.sum(dim=1), torch.ones_like(centres))
        return (weights * (inside.double() / sums)[:, None]).float()


class Logits(nn.Module):
    """A network's logits alone: formats for exchange know no named tuples."""

    def __init__(self, network: GrowingNet):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).logits


class Classifier(nn.Module):
    """Pictures -> probabilities: uint8 B x 3 x H x W -> B x classes."""

    def __init__(self, transform: nn.Module, logits: nn.Module, class_names: list[str]):
        super().__init__()
        self.transform, self.logits, self.class_names = transform, logits, class_names

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.transform(images)).softmax(dim=1)


def classifier(learner: Learner) -> Classifier:
    """What is exported, as a module, on the CPU."""
    test, normalise = learner.data.test_transform, learner.data.normalise
    if isinstance(test, SmallTest):
        side = test.prepare.side
        sizes = (side, side, side * 7 // 8, False)
    else:
        sizes = (test.side, test.resize, test.resize, test.mode == "bicubic")
    transform = TestPictures(*sizes, (normalise.mean, normalise.std))
    network = learner.network.to(device="cpu", memory_format=torch.contiguous_format)
    return Classifier(transform, Logits(network), [printable(name) for name in learner.class_names]).eval()


def export(learner: Learner, kind: str, file: Path) -> Path:
    """Write the file, in one piece.  kind: "onnx" or "torchscript".  Returns the file.

    Raises UserError where a package is missing, or the network has something that the format has not.
    """
    whole = classifier(learner)
    names = json.dumps(whole.class_names, ensure_ascii=False)
    side = whole.transform.side
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write = _onnx(whole, side, names) if kind == "onnx" else _torchscript(whole, side, names)
    write_atomically(file, write)
    return file


def _torchscript(whole: Classifier, side: int, names: str):
    whole.logits = torch.jit.trace(whole.logits, torch.zeros(2, 3, side, side))
    module = torch.jit.script(whole)
    whole_file = io.BytesIO()  # torch's own writer says nothing of a full disk
    torch.jit.save(module, whole_file, _extra_files={"class_names.json": names})
    return lambda file: file.write(whole_file.getbuffer())


def _onnx(whole: Classifier, side: int, names: str):
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install onnx onnxscript")
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch, height, width = (torch.export.Dim(name, min=1) for name in ("batch", "height", "width"))
    example = torch.zeros(2, 3, side + 3, side + 5, dtype=torch.uint8)
    program = torch.onnx.export(
        whole,
        (example,),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: batch, 2: height, 3: width}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    onnx.helper.set_model_props(model, {"class_names": names})
    return lambda file: file.write(model.SerializeToString())
