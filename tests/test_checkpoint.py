"""Checkpoints on a disk that is full: one line, and the one before stays."""

import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.training import checkpoint
from models.training.checkpoint import Checkpoints
from models.training.phase0 import fingerprint
from tests.folders import save_picture
from utils.errors import UserError


def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path):
    path = tmp_path / "phase00.pt"
    checkpoint.save(path, {"network": {"weight": torch.ones(3)}})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # writing beyond fails, as on a full disk
    try:
        with pytest.raises(UserError, match=r"phase00\.pt could not be written .* goes on from the last checkpoint"):
            checkpoint.save(path, {"network": {"weight": torch.ones(1_000_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(checkpoint.load(path)["network"]["weight"], torch.ones(3))
    assert os.listdir(tmp_path) == ["phase00.pt"]


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"tasks": 3, "model_state_dict": {}}, "it has no class_means"),  # PyCIL's
        ([1, 2], "of another kind"),
        (Code(), "or one that holds code, which is never run"),
        ({**dict.fromkeys(checkpoint.AFTER_PHASE), "records": Code()}, "or one that holds code, which is never run"),
        (b"", "damaged"),
        (b"some text", "no checkpoint of this program"),
        (None, "No such file"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, capsys, content, words):
    path = tmp_path / "phase00.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, checkpoint.AFTER_PHASE)
    said = str(caught.value)
    assert said.startswith(f"{path} is no checkpoint of this program (")
    assert words in said
    for advice in ("weights_only", "arbitrary code", "elete"):
        assert advice not in said
    assert capsys.readouterr().out == ""


def test_a_fingerprint_lists_each_folder_once_and_reads_three_files_of_it(tmp_path, monkeypatch):
    """A million files must not take minutes."""
    files = [save_picture(tmp_path / label / f"{i}.png") for label in "ab" for i in range(7)]
    listed, scandir, read, read_bytes = [], os.scandir, [], Path.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda folder: (listed.append(folder), scandir(folder))[1])
        patch.setattr(Path, "read_bytes", lambda file: (read.append(file), read_bytes(file))[1])
        first = fingerprint({}, files, tmp_path)
    assert listed == [tmp_path / "a", tmp_path / "b"]
    assert sorted(read) == [tmp_path / label / f"{i}.png" for label in "ab" for i in (0, 3, 6)]
    assert fingerprint({}, [*files, tmp_path / "b" / "9.png"], tmp_path) != first


def test_the_first_process_decides_where_to_go_on(tmp_path):
    """Two that look at a network disk at two moments may see different files."""
    checkpoint.save(checkpoint.phase_path(tmp_path, 0), {"network": {}})
    fabric = SimpleNamespace(broadcast=lambda seen: ([], False), barrier=lambda: None, is_global_zero=False)
    config, data = SimpleNamespace(checkpoint_every=0), SimpleNamespace(nb_phases=3)
    run = SimpleNamespace(config=config, folder=tmp_path, fabric=fabric, data=data)
    assert Checkpoints(run).load() == (None, None)


def test_file_and_folder_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))
    )
    checkpoint.save(tmp_path / "phase00.pt", {"network": {}})
    assert len(synced) == 2
    assert synced[0].endswith(".tmp")
    assert synced[1] == str(tmp_path)
