"""What holds on GPUs and with several processes, tested without them: where numbers are drawn, shared and added up."""

from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.plugins import MixedPrecision

from convs.heads import CosineHead
from models import coil
from models.training import run as run_module
from models.training.run import Run
from models.training.trainer import Trainer
from tests.little_trainer import SHORT, after_phase_0, new_trainer
from tests.shapes import make_shapes


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data"), train=6, test=1, copies=0)


def test_what_a_network_draws_in_a_step_goes_by_the_step_and_the_process(paths, tmp_path):
    run = after_phase_0(paths, tmp_path / "run", "icarl").run

    def drawn(*place, rank=0):
        run.fabric = SimpleNamespace(global_rank=rank)
        run.seed_step(*place)
        return torch.rand(4).tolist()

    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    first = [drawn(*place) for place in places] + [drawn(0, 0, 0, rank=1)]
    assert len({tuple(numbers) for numbers in first}) == 5
    assert [drawn(*place) for place in reversed(places)] == first[3::-1]


def test_fresh_proxies_are_drawn_on_the_cpu():
    """So they are the same on all devices: a head elsewhere takes as many numbers of the CPU's as one here."""
    after = []
    for device in ("cpu", "meta"):
        head = CosineHead(8).to(device)
        torch.manual_seed(0)
        head.grow(3)
        assert head.proxies[0].device.type == device
        after.append(torch.rand(1).item())
    assert after[0] == after[1]


def test_a_class_order_begins_with_a_fresh_gradient_scale(paths, tmp_path):
    first = new_trainer(paths, tmp_path / "run", "icarl")
    precision = first.run.fabric.strategy.precision = MixedPrecision("16-mixed", "cpu")
    fresh = precision.scaler.get_scale()
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    Trainer(type(first.method), first.run)
    assert precision.scaler.get_scale() == fresh != 8


def test_beef_s_noise_goes_by_the_step(paths, tmp_path):
    method = after_phase_0(paths, tmp_path / "run", "beefiso").method
    images = torch.zeros(2000, 3, 2, 2)

    def noise(step):
        method.step = step
        method.before_batch()
        return method.noise(images), method.noise(images)

    (first, second), (again, _), (other, _) = noise(0), noise(0), noise(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert abs(first.mean()) < 0.05
    assert first.std().item() == pytest.approx(1, abs=0.05)
    assert first.dtype == images.dtype


def test_coil_keeps_its_loaders_for_a_phase(paths, tmp_path, monkeypatch):
    """However many plans are made: a loader starts its worker processes anew."""
    made, loader = [], Run.test_loader
    monkeypatch.setattr(coil, "STEPS_A_PLAN", 1)
    monkeypatch.setattr(Run, "test_loader", lambda self, images: (made.append(len(images)), loader(self, images))[1])
    numbers = []
    for epochs in (1, 2):
        keys = {**SHORT, "epochs": epochs, "batch_size": 4}
        trainer = new_trainer(paths, tmp_path / "run", "coil", exemplars=2, **keys)
        trainer.do_phase(0)
        made.clear()
        trainer.do_phase(1)
        numbers.append(len(made))
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("method", ["fetril", "acil", "simplecil"])
def test_processes_share_what_is_worked_out_after_training(paths, tmp_path, monkeypatch, method):
    """The last thing that happens to a phase's network before it is evaluated."""
    shared = []
    monkeypatch.setattr(Run, "broadcast_network", lambda self, network: shared.append(state_of(network)))
    trainer = new_trainer(paths, tmp_path / "run", method, **SHORT)
    for phase in range(2):
        trainer.do_phase(phase)
        assert same(shared[-1], state_of(trainer.method.network))


def state_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def test_predictions_are_added_up_a_few_rows_at_a_time(paths, tmp_path, monkeypatch):
    run, sent = after_phase_0(paths, tmp_path / "run", "icarl").run, []
    monkeypatch.setattr(run_module, "_ROWS", 4)

    def all_reduce(rows, reduce_op):
        sent.append(len(rows))
        return 2 * rows

    run.fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"), all_reduce=all_reduce)
    rows = torch.arange(20.0).view(10, 2)
    assert torch.equal(run._sum_over_processes(rows.clone()), 2 * rows)
    assert sent == [4, 4, 2]
