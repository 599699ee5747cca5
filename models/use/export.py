"""A trained network as an ONNX file, and a JSON file beside it that says what the network takes and gives.

The network is exported at the size of picture that it was trained with: `images`, float32, B x 3 x side x side, as the
JSON's `transform` makes them; docs/use.md has the few lines that do so.  The JSON has
    input      name, dtype, shape
    transform  channels, and then, applied in this order: resize (pixels of the shorter side; pictures whose shorter
               side is from not_resized_from to resize keep their size), interpolation (Pillow's, with antialiasing),
               crop (side of the centred square, with a black margin where a side is shorter), mean and std (of each
               channel, of values in 0 ... 1)
    output     name (`probabilities`: softmax of the logits; `similarities`: cosines to the class means), shape
    class_names
"""

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.use.learner import Learner
from utils.data.augment import LargeTest, SmallTest
from utils.errors import UserError
from utils.files import printable, write_atomically, write_text

OPSET = 18


class Classifier(nn.Module):
    """Normalised pictures -> what the learner's classifier says: B x 3 x side x side -> B x classes, float32."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner = learner
        self.network = learner.network
        self.class_means = learner.class_means

    def forward(self, images: Tensor) -> Tensor:
        return self.learner.confidences(self.network(images))


def description(learner: Learner) -> dict[str, Any]:
    """What the JSON beside an exported file says."""
    steps, output = transform(learner), "similarities" if learner.by_means else "probabilities"
    return {
        "input": {"name": "images", "dtype": "float32", "shape": ["batch", 3, steps["crop"], steps["crop"]]},
        "transform": steps,
        "output": {"name": output, "shape": ["batch", len(learner.class_names)]},
        "class_names": [printable(name) for name in learner.class_names],
    }


def transform(learner: Learner) -> dict[str, Any]:
    """The transform of evaluation, as the JSON says it."""
    test, normalise = learner.data.defaults.test_transform, learner.data.defaults.normalise
    if isinstance(test, LargeTest):
        steps = {"resize": test.resize, "not_resized_from": test.resize, "interpolation": test.mode, "crop": test.side}
    else:
        assert isinstance(test, SmallTest)
        side = test.prepare.side
        steps = {"resize": side, "not_resized_from": side * 7 // 8, "interpolation": "bilinear", "crop": side}
    return {"channels": "RGB", **steps, "mean": list(normalise.mean), "std": list(normalise.std)}


def export(learner: Learner, file: Path) -> list[Path]:
    """Write the ONNX file, and FILE.json.  Returns both.  Raises UserError where a package is missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export needs {' and '.join(missing)}: pip install onnx onnxscript")
    about = description(learner)
    learner.network.to("cpu")
    learner.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Classifier(learner).eval(),
            (torch.zeros(2, *about["input"]["shape"][1:]),),
            input_names=[about["input"]["name"]],
            output_names=[about["output"]["name"]],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # dynamo=True
    model = program.model_proto.SerializeToString()
    beside = file.with_name(file.name + ".json")
    write_atomically(file, lambda out: out.write(model))
    write_text(beside, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return [file, beside]
