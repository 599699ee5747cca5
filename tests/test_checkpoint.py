"""Checkpoints on a disk that is full: one line, and the one before stays."""

import os
import resource
import signal

import pytest
import torch

from models import checkpoint
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
