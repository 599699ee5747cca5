"""A batch is a batch, whether one process works it off at once, in parts, or several do."""

import json
import os
import shutil
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_flatten

from compress.session import PATIENCE
from models.training import checkpoint
from models.training.epochs import parts
from models.training.run import Run
from tests import processes
from tests.conftest import asked_for, long_but
from tests.little_config import KEYS
from tests.methods import METHODS
from tests.shapes import make_shapes
from tests.test_resume import assert_ends_alike
from utils import devices
from utils.data.batches import EpochBatchSampler
from utils.devices import launch
from utils.errors import UserError

pytestmark = pytest.mark.xdist_group("devices")  # its runs are trained once, not once a worker
CONFIG = {
    **{**KEYS, "memory_per_class": 4, "real_per_class": 2, "syn_per_class": 4, "augmentations_per_image": 2},
    **{"augmentation_prob": 0.4, "init_lr": 0.01, "lrate": 0.01, "init_milestones": [], "milestones": []},
    **{"compression_epochs": 1, "ft_epochs": 1, "logger": ["csv"]},
    # 24 images of two new classes make a batch of 23 and one of a single image, which the second process repeats
    **{"batch_size": 23, "model_seed": 7, "gem_memory_batch": 5, "fishermax": 1.0, "split_ratio": 0.5, "nb_proxy": 2},
    "buffer_size": 256,
}


OWN = {
    "ssre": {"convnet_type": "little_rep", "init_lr": 0.0001, "lrate": 0.0001},
    **{key: {"memory_size": 24, "m_rate_list": [0.2], "c_rate_list": [0, 0.2]} for key in ("rmm-icarl", "rmm-foster")},
    "tagfex": {"proj_hidden_dim": 32, "proj_output_dim": 16},
    "beefiso": {"fusion_epochs": 1},
}
"""Keys that these methods need, or that make them small."""
COMPARED = tuple(METHODS) if asked_for("long") else ("icarl",)
COMPARING = ("il2a", "tagfex")
"""Methods that mix or compare the images that a process has at a time, so that dividing a batch changes the result."""
NEARLY_TIED = ("coil", "podnet")
"""Methods whose features after one epoch are so alike that herding's best two scores are 1e-6 apart, which rounding
decides."""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Writes one config a method, hands them to a function and returns what each method's last checkpoint holds."""
    folder = tmp_path_factory.mktemp("devices")
    make_shapes(folder / "data")

    def call(name, launch, methods=COMPARED, **values):
        files = []
        for method in methods:
            file = folder / name / f"{method}.json"
            file.parent.mkdir(exist_ok=True)
            own = {"data_dir": str(folder / "data"), "output_dir": str(folder / name / method), "model_name": method}
            own["phase0_cache"] = str(folder / name / "cache")
            if method in NEARLY_TIED:
                own["exemplar_selection"] = "random"
            file.write_text(json.dumps({**CONFIG, **own, **OWN.get(method, {}), **values}))
            files.append(file)
        assert launch(files) == 0
        last = {method: folder / name / method / "seed1993" / "checkpoints" / "phase02.pt" for method in methods}
        return {method: checkpoint.load(file) for method, file in last.items()}

    return call


@pytest.fixture(scope="module")
def at_once(train):
    """The methods in one process, each batch at once."""
    return train("at once", processes.run_all)


def in_two_processes(files) -> int:
    ended = processes.ranks("tests.processes", files)
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr[-3000:]
    return 0


def assert_alike(ours, theirs):
    """Exemplars are the same; all weights, and what a method carries on, differ by rounding."""
    apart = {}
    for method, state in theirs.items():
        assert ours[method]["memory"] == state["memory"], method
        groups = {"weights": (state["network"], ours[method]["network"])}
        groups |= {key: (value, ours[method]["method"][key]) for key, value in state["method"].items()}
        for name, (a, b) in groups.items():
            (a, like_a), (b, like_b) = tree_flatten(a), tree_flatten(b)
            assert like_a == like_b
            a, b = (torch.cat([torch.as_tensor(leaf).flatten().double() for leaf in leaves]) for leaves in (a, b))
            apart[f"{method}'s {name}"] = ((a - b).norm() / a.norm()).item()
    # In float64 SSRE agrees to 1e-10.  Adam's first steps are as long for a gradient of rounding as for any other.
    # At a phase's start PODNet's maps are those of before: the gradient of their distance is that of rounding, of any
    # direction and of unit length.  EWC's Fisher information is of squares, which are twice as far apart.
    limits = {"podnet's weights": 1e-3, "ewc's fisher": 5e-5}
    limits |= {"ssre's weights": 5e-4, "ssre's prototypes": 5e-4}
    loose = {name: error for name, error in apart.items() if error > limits.get(name, 1e-5)}
    assert not loose, loose


@pytest.mark.parametrize(("device", "accelerator", "indices"), [("cuda:1", "cuda", [1]), ([0, 2], "cuda", [0, 2])])
def test_named_gpus_are_those_that_fabric_gets(device, accelerator, indices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(devices, "_device", None)
    asked = {}

    def fabric(**arguments):
        asked.update(arguments)
        return SimpleNamespace(launch=lambda: None, device=torch.device("cpu"))

    monkeypatch.setattr(devices, "Fabric", fabric)
    launch(device)
    assert (asked["accelerator"], asked["devices"]) == (accelerator, indices)


@pytest.mark.long
def test_batches_in_parts(train, at_once):
    divisible = {method: state for method, state in at_once.items() if method not in COMPARING}
    assert_alike(train("in parts", processes.run_all, (*divisible,), accumulate_batches=3), divisible)


def test_two_processes(train, at_once):
    ours = train("two processes", in_two_processes)
    assert_alike(ours, {method: state for method, state in at_once.items() if method not in COMPARING})


@pytest.mark.long
def test_sixteen_bits(train, at_once):
    """Each phase's loss is about what it is in float32."""
    half = train("bfloat16", processes.run_all, ("der",), precision="bf16-mixed")["der"]
    for ours, theirs in zip(half["records"], at_once["der"]["records"], strict=True):
        assert ours["training"]["loss"] != theirs["training"]["loss"]
        assert ours["training"]["loss"] == pytest.approx(theirs["training"]["loss"], rel=0.02)
    with pytest.raises(UserError, match="precision: 16-mixed needs a GPU"):
        launch("cpu", "16-mixed")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_networks(train, at_once):
    """They grow, take turns in stages, and meet batches of several sizes."""
    methods = ("der", "foster")
    assert_alike(train("compiled", processes.run_all, methods, compile=True), {m: at_once[m] for m in methods})


def is_within_phase_1(checkpoints: Path) -> bool:
    """Whether the unfinished checkpoint is phase 1's: phase 0's stays until phase 0 is safe on disk."""
    try:
        times = [(checkpoints / name).stat().st_mtime_ns for name in ("phase00.pt", "unfinished.pt")]
    except FileNotFoundError:
        return False
    return times[1] > times[0]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find torchrun's children")
def test_two_processes_that_are_killed_go_on(tmp_path):
    """SIGKILL in the middle of phase 1: the end is that of two processes that nobody disturbed, to the last bit."""
    make_shapes(tmp_path / "data")
    files = []
    for name in ("killed", "whole"):
        own = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / name), "model_name": "icarl"}
        often = {"checkpoint_every": 1e-9 if name == "killed" else 0}
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({**CONFIG, **own, **often, "batch_size": 5, "epochs": 2}))

    def begin(file) -> subprocess.Popen:
        return processes.start(
            processes.torchrun("main.py", "--config", file), os.environ, stdout=subprocess.PIPE, text=True
        )

    process = begin(files[0])
    checkpoints = tmp_path / "killed" / "seed1993" / "checkpoints"
    while not is_within_phase_1(checkpoints):
        assert process.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    for file in files:
        process = begin(file)
        said, _ = process.communicate()
        assert process.returncode == 0
        assert ("going on in phase 1" in said) == (file == files[0]), said
    assert_ends_alike(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [1, 2, 3, 9])
@pytest.mark.parametrize("nb_processes", [1, 2, 3])
def test_the_parts_of_all_processes_weigh_as_much_as_the_batch(number, nb_processes):
    samplers = [EpochBatchSampler(15, 7, 1, 0, rank=rank, world_size=nb_processes) for rank in range(nb_processes)]
    steps = [list(sampler) for sampler in samplers]
    losses = torch.rand(15, dtype=torch.float64)
    for step, of_ranks in enumerate(zip(*steps, strict=True)):
        whole, mean = set(), 0.0
        for sampler, batch in zip(samplers, of_ranks, strict=True):
            index = torch.tensor([i for _, i in batch])
            pieces = list(parts(index, index, number, sampler.sizes(step), nb_processes))
            assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            assert len(pieces) <= number
            assert torch.equal(torch.cat([piece.images for piece in pieces]), index)
            mean += sum(piece.share * losses[piece.images].mean() for piece in pieces) / nb_processes
            whole |= set(index.tolist())
            assert sum(piece.size for piece in pieces) == sampler.sizes(step)[0]
        assert len(whole) == samplers[0].sizes(step)[1]
        assert mean.item() == pytest.approx(losses[sorted(whole)].mean().item())


def test_a_process_without_an_image_of_its_own_weighs_nothing():
    sampler = EpochBatchSampler(9, 8, 1, 0, rank=1, world_size=2)
    assert sampler.sizes(0) == (4, 8)
    assert sampler.sizes(1) == (0, 1)
    (only,) = parts(torch.zeros(1, 3, 2, 2), torch.zeros(1), 3, sampler.sizes(1), 2)
    assert (only.size, only.share, only.last) == (0, 0.0, True)


def test_processes_wait_for_each_other_for_days(monkeypatch):
    """One makes copies while the others wait: torch's own limit is 30 minutes."""
    asked = {}
    monkeypatch.setattr(devices, "DDPStrategy", lambda **options: asked.update(options))
    monkeypatch.setattr(devices, "Fabric", lambda **_: SimpleNamespace(launch=lambda: None, device=torch.device("cpu")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    for patience in (None, PATIENCE):
        launch("cpu", patience=patience)
        assert asked["timeout"] >= timedelta(days=1)


def test_weights_are_sent_tensor_by_tensor_to_where_they_are(monkeypatch):
    """A pickled tensor of a GPU would be unpickled onto that GPU in every process."""
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.data_ptr()))
    fabric = SimpleNamespace(world_size=2, broadcast=None)
    network = torch.nn.BatchNorm2d(3)
    Run.broadcast_network(SimpleNamespace(fabric=fabric), network)
    assert sent == [tensor.data_ptr() for tensor in network.state_dict().values()]


def test_float32_is_float32_on_a_gpu_too_and_kernels_are_not_chosen_by_timing():
    """cuDNN's convolutions would round it to TensorFloat-32's 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    launch("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("values", [{"dataset": "Nowhere"}, {"lrate": -1}, {"init_cls": 99}])
def test_an_error_that_all_processes_find_is_printed_once(tmp_path, values):
    make_shapes(tmp_path / "data", train=1, test=1, copies=0)
    own = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"), "model_name": "icarl"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIG, **own, "syn_per_class": 0, "augmentation_prob": 0, **values}))
    ended = processes.ranks("main", ["--config", file])
    assert [each.returncode for each in ended] == [2, 2]
    said = "".join(each.stderr for each in ended)
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said


@pytest.mark.parametrize("workers", long_but((1, 0), 1))
def test_an_error_of_one_process_is_one_line_and_ends_both(tmp_path, workers):
    """A broken image, which one of two processes meets, as srun would start them."""
    paths = make_shapes(tmp_path / "data")
    broken = paths.images("red disc")[5]
    broken.write_bytes(broken.read_bytes()[:-200])
    own = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"), "model_name": "icarl"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIG, **own, "num_workers": workers, "cache": "none", "init_cls": 6}))
    ended = processes.ranks("main", ["--config", file])
    said = "".join(each.stderr for each in ended)
    assert [each.returncode for each in ended] == [2, 2]
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert str(broken) in line
