"""Every method's phases on a device of its own: nothing is left on the CPU that a step needs, and numbers are alike."""

import math

import pytest
import torch

from models.training.run import Run
from tests.conftest import long_but
from tests.little_trainer import SHORT, keys_of, new_trainer
from tests.methods import METHODS
from tests.other_device import DEVICE, Elsewhere, other_device
from tests.shapes import make_shapes


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data"), train=4, test=1, copies=0)


@pytest.fixture
def trained(paths, tmp_path, monkeypatch):
    """Three phases of a method.  -> (its trainer, the records of its phases)."""
    monkeypatch.setattr("models.training.phase0.load", lambda *_: None)
    monkeypatch.setattr("models.training.phase0.save", lambda *_: None)

    def call(method, device):
        keys = {**SHORT, **keys_of(method), "batch_size": 4, "nme": True}
        trainer = new_trainer(paths, tmp_path / "run", method, exemplars=2, **keys)
        fabric = trainer.run.fabric
        fabric.strategy._root_device = device
        monkeypatch.setattr(fabric.strategy.accelerator, "setup_device", lambda device: None)
        return trainer, [trainer.do_phase(phase) for phase in range(3)]

    def drawn(self, *_):  # there are no generators for the other device: its operations take the CPU's
        device = self.fabric.device
        return torch.Generator("cpu" if device == DEVICE else device).manual_seed(0)

    monkeypatch.setattr(Run, "generator", drawn)
    return call


def test_mixing_devices_fails():
    with other_device():
        there = torch.ones(2, device=DEVICE)
        assert (there + torch.tensor(1.0)).tolist() == [2, 2], "a number is no tensor"
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            there + torch.ones(2)


@pytest.mark.parametrize("method", long_but(METHODS, "icarl"))
def test_three_phases_elsewhere(trained, method):
    here, expected = trained(method, torch.device("cpu"))
    with other_device():
        there, records = trained(method, DEVICE)
    assert all(isinstance(parameter, Elsewhere) for parameter in there.method.network.parameters())
    for name, tensor in there.method.network.state_dict().items():
        torch.testing.assert_close(tensor.inner, here.method.network.state_dict()[name], rtol=1e-4, atol=1e-5)
    for record, other in zip(records, expected, strict=True):
        if other.training.loss is not None:
            assert record.training.loss == pytest.approx(other.training.loss, rel=1e-4)
        assert record.cnn.top1 == pytest.approx(other.cnn.top1)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_three_phases_on_a_gpu(trained, method):
    """Later phases go on from weights whose rounding differs, so numbers are compared in the first one alone."""
    _, expected = trained(method, torch.device("cpu"))
    there, records = trained(method, torch.device("cuda", 0))
    assert all(parameter.is_cuda for parameter in there.method.network.parameters())
    losses, others = ([record.training.loss for record in each] for each in (records, expected))
    assert [loss is None for loss in losses] == [loss is None for loss in others]
    assert all(math.isfinite(loss) for loss in losses if loss is not None)
    if losses[0] is not None:
        assert losses[0] == pytest.approx(others[0], rel=0.02)
