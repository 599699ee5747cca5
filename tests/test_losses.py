"""Each method's loss against a few lines of plain NumPy."""

import itertools

import numpy as np
import pytest
import torch

from convs.heads import BiasLayer, CosineHead
from models.coil import sinkhorn
from models.foster import effective_number_weights
from models.gem import projected
from models.losses import distillation, newest_or_old, quadratic_penalty
from models.podnet import hinged_nca, nca, pod_flat, pod_spatial
from tests.digits import make_digits
from tests.little_trainer import after_phase_0

RNG = np.random.default_rng(0)
B, OLD, NEW, T = 6, 3, 2, 2.0
LOGITS = RNG.normal(size=(B, OLD + NEW))
OLD_LOGITS = RNG.normal(size=(B, OLD))
AUX_LOGITS = RNG.normal(size=(B, NEW + 1))
TARGETS = np.array([0, 4, 3, 2, 3, 1])


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy(z, y):
    return -log_softmax(z)[np.arange(len(y)), y].mean()


def kd(z, old):
    return -(np.exp(log_softmax(old / T)) * log_softmax(z / T)).sum() / len(z)


def test_distillation():
    ours = distillation(torch.tensor(LOGITS[:, :OLD]), torch.tensor(OLD_LOGITS), T).item()
    assert ours == pytest.approx(kd(LOGITS[:, :OLD], OLD_LOGITS))


def test_auxiliary_targets():
    assert newest_or_old(torch.tensor(TARGETS), OLD).tolist() == [0, 2, 1, 0, 1, 0]


def test_ewc_penalty():
    now, then, fisher = (RNG.normal(size=(3, 4)) for _ in range(3))
    grown = np.concatenate([now, RNG.normal(size=(2, 4))])  # a head with rows for new classes: those are free
    tensors = [torch.tensor(x) for x in (grown, then, fisher)]
    scalar = [torch.tensor(x) for x in (1.5, 1.0, 4.0)]
    ours = quadratic_penalty(*([tensor, number] for tensor, number in zip(tensors, scalar, strict=True))).item()
    assert ours == pytest.approx(0.5 * (fisher * (now - then) ** 2).sum() + 0.5 * 4 * 0.25)


def test_bias_layer():
    layer = BiasLayer()
    logits = torch.tensor(LOGITS)
    assert torch.equal(layer(logits), logits)
    layer.alpha.data.fill_(0.5)
    layer.beta.data.fill_(-1.0)
    np.testing.assert_allclose(layer(logits).detach().numpy(), 0.5 * LOGITS - 1)


def test_cosine_head():
    head = CosineHead(4, 3)
    head.grow(2)
    head.grow(1)
    head.eta.data.fill_(2.0)
    features = RNG.normal(size=(5, 4)).astype(np.float32)
    proxies = np.concatenate([p.detach().numpy() for p in head.proxies])
    assert proxies.shape == (9, 4)
    assert np.abs(proxies).max() <= 0.5  # uniform in +-1/sqrt(4)
    cosines = features @ proxies.T / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(proxies, axis=1)
    expected = []
    for row in cosines:
        of_classes = row.reshape(3, 3)
        weights = np.exp(of_classes) / np.exp(of_classes).sum(axis=1, keepdims=True)
        expected.append(2 * (weights * of_classes).sum(axis=1))
    np.testing.assert_allclose(head(torch.tensor(features)).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_nca():
    """PyCIL's: the right class is in the sum as exp(0), and a margin cancels; the paper's: a margin and a hinge."""
    published, papers = [], []
    for z, y in zip(LOGITS, TARGETS, strict=True):
        others = np.exp(np.delete(z, y) - z.max()).sum()
        published.append(-(z[y] - z.max() - np.log(1 + others)))
        papers.append(max(0.0, -np.log(np.exp(z[y] - 0.6) / np.exp(np.delete(z, y)).sum())))
    logits, targets = torch.tensor(LOGITS), torch.tensor(TARGETS)
    assert nca(logits, targets).item() == pytest.approx(np.mean(published))
    assert hinged_nca(logits, targets).item() == pytest.approx(np.mean(papers))
    assert hinged_nca(torch.eye(5)[:3] * 100, torch.arange(3)) == 0
    assert hinged_nca(torch.ones(2, 1, requires_grad=True), torch.zeros(2, dtype=torch.long)) == 0


def test_pod():
    shapes = [(B, 2, 4, 3), (B, 5, 2, 2)]
    new, old = ([RNG.normal(size=shape) for shape in shapes] for _ in range(2))
    distances = []
    for a, b in zip(new, old, strict=True):
        for i in range(B):
            squares = [x[i] ** 2 for x in (a, b)]
            pooled = [np.concatenate([x.sum(axis=2).ravel(), x.sum(axis=1).ravel()]) for x in squares]
            unit = [p / np.linalg.norm(p) for p in pooled]
            distances.append(np.linalg.norm(unit[0] - unit[1]))
    tensors = ([torch.tensor(x) for x in maps] for maps in (new, old))
    assert pod_spatial(*tensors).item() == pytest.approx(np.mean(distances))
    a, b = RNG.normal(size=(2, B, 7))
    half_squared = [np.sum((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2) / 2 for x, y in zip(a, b, strict=True)]
    assert pod_flat(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(np.mean(half_squared))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("data"), train=8, test=1, classes=4, copies=0)


@pytest.fixture
def phase_1(paths, tmp_path):
    """(a method that trains phase 1, images of all four classes, their targets); its network differs from the old one.

    Two old classes have 4 exemplars each, two new ones 8 images.
    """

    def call(name, **values):
        trainer = after_phase_0(paths, tmp_path / "run", name, **values)
        trainer.start_phase(1)
        method = trainer.method
        list(method.stages())
        with torch.no_grad():
            for parameter in method.network.parameters():
                parameter += 0.1 * torch.randn_like(parameter) * parameter.std(correction=0)
        return method, torch.randn(B, 3, 32, 32), torch.tensor(TARGETS % 4)

    return call


def arrays(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.mark.parametrize(("key", "classification"), [("pycil", nca), ("paper", hinged_nca)])
def test_podnet(phase_1, key, classification):
    method, images, targets = phase_1("podnet", lambda_c_base=5.0, lambda_f_base=2.0, nca=key, nb_proxy=2)
    now, old = method.network.train()(images), method.old_network(images)
    held = 5 * pod_spatial(now.maps, old.maps) + 2 * pod_flat(now.features, old.features)
    expected = classification(now.logits, targets) + np.sqrt(4 / 2) * held
    assert held > 0.01
    assert method.loss(now, images, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def class_weights(counts, beta):
    weights = (1 - beta) / (1 - beta ** np.array(counts, dtype=float))
    return weights / weights.mean()


def test_effective_number_weights():
    counts = [20, 20, 500]
    ours = effective_number_weights(torch.tensor(counts), 0.96)
    np.testing.assert_allclose(ours, class_weights(counts, 0.96), rtol=1e-6)
    assert effective_number_weights(torch.tensor([5, 5]), 0.9).tolist() == [1, 1]
    assert effective_number_weights(torch.tensor([0, 5]), 0.9).isfinite().all()


def test_foster_s_boosting_and_compression(phase_1):
    method, images, y = phase_1("foster", beta1=0.9, beta2=0.8, lambda_okd=0.7)
    boosting, compression = (class_weights([4, 4, 8, 8], beta) for beta in (0.9, 0.8))
    pair = method.network.train()(images)
    logits, fe_logits, old, taught = arrays(
        pair.logits, pair.aux_logits, method.network.pair.old(images).logits, method.network.pair(images).logits
    )
    expected = cross_entropy(logits / boosting, y) + cross_entropy(fe_logits, y) + 0.7 * kd(logits[:, :2], old)
    assert method.boosting_loss(pair, images, y).item() == pytest.approx(expected, rel=1e-5)
    method.network.compressing = True
    student = method.network(images)
    (logits,) = arrays(student.logits)
    taught = np.exp(log_softmax(taught / T)) * compression
    taught /= taught.sum(axis=1, keepdims=True)
    expected = -(taught * log_softmax(logits / T)).sum() / B
    assert method.compression_loss(student, images, y).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("epoch", [0, 3])
def test_coil(phase_1, epoch):
    """(1 - l) CE + l KD, and the prospective term in the first epoch, the retrospective one in later epochs."""
    method, images, y = phase_1("coil", reg_term=0.3, epochs=4)
    carried, new = method.carried, method.network.head.proxies[-1]
    method.epoch = epoch

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def means(pictures_of_classes):
        features = [
            arrays(method.run.predict(method.network, pictures).features)[0] for pictures in pictures_of_classes
        ]
        return torch.tensor(unit(np.stack([unit(rows).mean(axis=0) for rows in features])))

    of_old = [[item.image for item in method.memory.items() if item.target == target] for target in range(2)]
    of_new = [method.data.train_images(target) for target in (2, 3)]
    plan = sinkhorn(torch.cdist(means(of_old), means(of_new), p=3), 0.464).numpy()
    now = method.network.train()(images)
    logits, old_logits, features, new, carried = arrays(
        now.logits, method.old_network(images).logits, now.features, new, carried
    )
    expected = 0.5 * cross_entropy(logits, y) + 0.5 * kd(logits[:, :2], old_logits)
    if epoch == 0:
        expected += 0.001 * kd(logits[:, 2:], unit(features) @ unit(carried).T)
    else:
        expected += 0.3 * (3 / 4) ** 2 * kd(unit(features) @ unit(plan @ unit(new)).T, old_logits)
    assert method.loss(now, images, y).item() == pytest.approx(expected, rel=1e-5)


def test_sinkhorn():
    cost = np.random.default_rng(0).random((3, 4))
    plan = sinkhorn(torch.tensor(cost), 0.2).numpy()
    np.testing.assert_allclose(plan.sum(axis=1), np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(plan.sum(axis=0), np.full(4, 1 / 4), rtol=1e-6)
    # The one plan of these sums that is diag(u) exp(-cost / reg) diag(v): its logarithm is -cost / reg + a_i + b_j.
    rest = np.log(plan) + cost / 0.2
    np.testing.assert_allclose(rest - rest[:1] - rest[:, :1] + rest[0, 0], 0, atol=1e-6)
    matched = sinkhorn(torch.tensor(cost[:, :3]), 1e-3).numpy()  # nearly unregularised: the cheapest assignment
    best = min(itertools.permutations(range(3)), key=lambda order: sum(cost[i, j] for i, j in enumerate(order)))
    assert matched.argmax(axis=1).tolist() == list(best)
    np.testing.assert_allclose(matched.max(axis=1), 1 / 3, rtol=1e-3)


def nearest_allowed(g, G, margin):
    """GEM's dual by trying every set of active constraints."""
    best, step = np.inf, None
    for k in range(len(G) + 1):
        for free in itertools.combinations(range(len(G)), k):
            v, free = np.full(len(G), margin), list(free)
            if free:
                P, fixed = G @ G.T, [i for i in range(len(G)) if i not in free]
                v[free] = np.linalg.solve(P[np.ix_(free, free)], -(G @ g)[free] - P[np.ix_(free, fixed)] @ v[fixed])
            value = 0.5 * v @ G @ G.T @ v + (G @ g) @ v
            if (v >= margin - 1e-12).all() and value < best:
                best, step = value, g + G.T @ v
    return step


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_gem_s_projection_against_brute_force(seed, margin):
    rng = np.random.default_rng(seed)
    G, g = rng.normal(size=(4, 12)), rng.normal(size=12)
    ours = projected(torch.tensor(g), torch.tensor(G), margin).numpy()
    if (G @ g >= 0).all():
        np.testing.assert_array_equal(ours, g)
    else:
        np.testing.assert_allclose(ours, nearest_allowed(g, G, margin), rtol=1e-5, atol=1e-7)
        assert (G @ ours >= -1e-6).all()


def test_gem_s_projection_by_hand():
    g = torch.tensor([1.0, -1.0])
    assert projected(g, torch.tensor([[0.0, 2.0]])).tolist() == [1, 0], "what hurts the memory is taken out"
    assert projected(g, torch.tensor([[1.0, 0.0]])).tolist() == [1, -1], "what does not is left"
    assert projected(g, torch.tensor([[0.0, 0.0], [0.0, 2.0]])).tolist() == [1, 0], "no exemplars, no constraint"
