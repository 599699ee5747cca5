"""Fixtures that several test files share."""

import torchvision_compat  # noqa: F401  (before torchvision, which some tests import first)

# isort: split
import gc
import os
import shutil
from collections.abc import Iterable

import pytest
import torch

from compress import run
from tests.little_model import little_model, save_checkpoint
from tests.little_run import arguments, command, little_dataset
from tests.shapes import make_shapes

ON_DEMAND = {
    "long": ("ESCORT_LONG", "takes five seconds or more, or repeats a quicker test"),
    "slow": ("ESCORT_SLOW", "takes minutes"),
}
"""Marker: (the variable that asks for its tests, why they are not run without)."""


def asked_for(name: str) -> bool:
    return os.environ.get(ON_DEMAND[name][0]) == "1"


def long_but(values: Iterable, *quick) -> list:
    """Values for `pytest.mark.parametrize`, tuples where it has several names; all but those of `quick` are long."""
    return [
        value
        if value in quick
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)
        for value in values
    ]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for name, (variable, why) in ON_DEMAND.items():
            marker = item.get_closest_marker(name)
            if marker is not None and not asked_for(name):
                item.add_marker(pytest.mark.skip(reason=f"{marker.kwargs.get('reason', why)}: {variable}=1 runs it"))


def pytest_collection_finish():
    """Keep collections, such as those of commands that free a model, away from the objects of imported modules."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """What pytest-xdist sends between processes is UTF-8, and names of files in a log or a failure need not be."""
    return in_utf_8((yield))


def in_utf_8(value):
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {key: in_utf_8(of_key) for key, of_key in value.items()}
    return type(value)(map(in_utf_8, value)) if type(value) in (list, tuple) else value


@pytest.fixture(scope="session")
def state():
    """The little model's tensors by official names."""
    return little_model().state_dict()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The little model's weights as a file, its config beside it."""
    return save_checkpoint(little_model(), tmp_path_factory.mktemp("models") / "little.safetensors")


@pytest.fixture(scope="session")
def finished(checkpoint, tmp_path_factory):
    """A little dataset with the edge maps and copies that the command makes of it."""
    paths = little_dataset(tmp_path_factory.mktemp("finished"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    code = run.main([*arguments(paths, checkpoint), "--precision", "fp32"])
    torch.set_num_threads(threads)
    assert code == 0
    return paths


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A data folder with the coloured shapes; no test writes to it."""
    return make_shapes(tmp_path_factory.mktemp("shapes")).data_dir


@pytest.fixture
def paths(tmp_path):
    """A little dataset of noise; some files have another one."""
    return little_dataset(tmp_path)


@pytest.fixture
def compress(paths, checkpoint, capsys):
    """`little_run.command` of the dataset."""
    return command(paths, checkpoint, capsys)


@pytest.fixture
def made(paths, finished):
    """Give the little dataset what `finished` has."""
    shutil.copytree(finished.root, paths.root, dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def a_cpu_without_bf16(monkeypatch):
    """Whatever the CPU, so that what is expected of "auto" precision is the same on all of them."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


@pytest.fixture(autouse=True)
def a_fast_disk(monkeypatch):
    """Nothing that a test writes has to outlast a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def one_thread():
    """Torch with one thread, in which copies are the same to the last byte whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
