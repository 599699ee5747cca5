"""A checkpoint of the official size: its names, its shapes, 5.7 GB of float32.  Switched on with ESCORT_SLOW=1."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ControlNet.cldm.model import MODELS_FOLDER, create_empty_model, load_state_dict
from tests.reference.reference_weights import reference_tensor

pytestmark = [
    pytest.mark.slow(reason="needs 12 GB of disk, 7 GB of memory, minutes"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]
ROOT = Path(__file__).parent.parent
OFFICIAL = ROOT / "tests" / "reference" / "control_sd15_canny.keys.json"

# What a user's process does: load, then touch every weight.  VmHWM is the process's own peak of resident memory.
PROGRAM = """
import json, sys, time
start = time.perf_counter()
import torch
from ControlNet.cldm.model import load_model
def peak():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024
imported, before = time.perf_counter(), peak()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
loaded, after = time.perf_counter(), peak()
total = sum(tensor.sum().item() for tensor in model.parameters())
print(json.dumps({
    "import seconds": imported - start, "load seconds": loaded - imported,
    "touch seconds": time.perf_counter() - loaded,
    "peak at import": before, "peak after loading": after, "peak after touching all": peak(),
    "finite": total == total, "fingerprint": model.fingerprint, "tensors": len(model.state_dict()),
    "parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype),
}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same weights as .safetensors and .pth, written without holding more than one tensor in memory."""
    folder = tmp_path_factory.mktemp("full")
    safe, plain = folder / "control_sd15_canny.safetensors", folder / "control_sd15_canny.pth"
    shapes = json.loads(OFFICIAL.read_text())
    tables = create_empty_model(MODELS_FOLDER / "cldm_v15.yaml").state_dict()
    header, end = {}, 0
    for name, shape in shapes.items():
        kind, width = ("I64", 8) if name.endswith("position_ids") else ("F32", 4)
        begin, end = end, end + width * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with safe.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            counted = "." not in name or name.endswith("position_ids")
            file.write((tables[name].numpy() if counted else reference_tensor(name, tuple(shape))).tobytes())
    torch.save(load_state_dict(safe), plain)  # from the memory map
    yield {"pth": plain, "safetensors": safe}
    safe.unlink()
    plain.unlink()


def load_in_a_process_of_its_own(path, dtype="float32"):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path, dtype], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_official_checkpoint_loads_strictly_and_leanly(ending, checkpoints):
    path = checkpoints[ending]
    size = path.stat().st_size
    figures = load_in_a_process_of_its_own(path)
    report(path, size, figures)
    assert 5.69e9 < size < 5.72e9
    assert (figures["tensors"], figures["parameters"]) == (1484, 859520964 + 361279120 + 83653863 + 123060480)
    assert figures["finite"]
    assert figures["peak after touching all"] <= 1.15 * size


def test_lower_precision_takes_its_own_size_on_top(checkpoints):
    """The file's pages, which the system takes back when it needs them, and the converted networks: no second copy."""
    path = checkpoints["pth"]
    size = path.stat().st_size
    figures = load_in_a_process_of_its_own(path, "bfloat16")
    report(path, size, figures)
    assert figures["dtype"] == "torch.bfloat16"
    assert figures["peak after touching all"] <= 1.65 * size


def test_both_forms_have_the_same_fingerprint(checkpoints):
    program = (
        "import sys; from ControlNet.cldm.model import weights_fingerprint;"
        "print(*{weights_fingerprint(path) for path in sys.argv[1:]})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *checkpoints.values()], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert len(done.stdout.split()) == 1


def report(path, size, figures):
    peak = {name: value for name, value in figures.items() if name.startswith("peak")}
    print(
        f"\n{path.name} ({size / 1e9:.2f} GB) as {figures['dtype']}: "
        + ", ".join(f"{name} {value / size:.3f}x" for name, value in peak.items())
        + "; "
        + ", ".join(f"{name} {value:.1f}" for name, value in figures.items() if name.endswith("seconds"))
    )
