"""A total for all classes, and the ways to choose exemplars (utils/memory)."""

import numpy as np
import pytest

from compress.training.exemplars import Cost
from tests.conftest import long_but
from tests.folders import save_noise, save_picture
from tests.test_budget import edges_cost
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.budget import check_total, counts_within, moved_boundaries
from utils.memory.exemplars import ExemplarMemory
from utils.memory.selection import SELECTIONS, closest_to_mean, herding

LABELS = ("a", "b", "c", "d")
N = 30


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    paths = DatasetPaths(tmp_path_factory.mktemp("data"), "Toy")
    for c, label in enumerate(LABELS):
        for i in range(N):
            image = save_noise(paths.folder("train") / label / f"{i:02d}.png", 100 * c + i, (12, 12))
            save_picture(paths.kept(image).with_suffix(".webp"), 0, (12, 12), "1")
    return paths


def features_of(target):
    return np.random.default_rng(target).normal(size=(N, 5))


COSTS = {"real": 1.0, "edges": 1 / 24}


def quotas(real=2, synthetic=6):
    return [("real", real), ("edges", synthetic)]


def shared(paths, total, **options):
    forms = {"real": Cost(None, paths), "edges": edges_cost(paths)}
    return ExemplarMemory(paths, quotas(), forms, options.pop("budget", None), 2, total=total, **options)


def filled(paths, memory, phases=(1, 1, 1, 1)):
    """The memory after phases of so many classes."""
    seen = 0
    for nb_new in phases:
        targets = range(seen, seen + nb_new)
        memory.update({t: paths.images(LABELS[t]) for t in targets}, [features_of(t) for t in targets])
        seen += nb_new
    return memory


@pytest.mark.parametrize(
    ("units", "real", "synthetic", "cost", "expected"),
    [
        (20, 18, 48, 1 / 24, (18, 48)),
        (200, 18, 48, 1 / 24, (180, 480)),
        (50, 18, 48, 1 / 24, (45, 120)),
        (2000 / 30, 20, 0, 1 / 24, (66, 0)),  # PyCIL's memory_size // classes
        (10, 0, 48, 1 / 24, (0, 240)),
        (3, 1, 1, 1 / 2, (2, 2)),
        (1, 2, 8, 1 / 8, (0, 2)),
        (0.01, 1, 1, 1, (0, 0)),
        (5, 0, 0, 1, (0, 0)),
    ],
)
def test_a_share_is_whole_exemplars_in_the_ratio_given(units, real, synthetic, cost, expected):
    assert counts_within(units, quotas(real, synthetic), {"real": 1.0, "edges": cost}) == list(expected)
    assert expected[0] + expected[1] * cost <= units + 1e-9


def test_boundaries_between_forms_move_towards_the_start_alone():
    assert moved_boundaries([2, 6], [1, 3]) == [1, 3]
    assert moved_boundaries([2, 1], [1, 4]) == [1, 2]
    assert moved_boundaries([2, 6], [3, 7]) == [2, 6]
    assert moved_boundaries([2, 6], [0, 0]) == [0, 0]


def test_a_share_of_many_forms_keeps_their_ratio():
    """50 units: 2.5 times 20, of 10 real + 20 x 1/4 + 120 x 1/24 each."""
    three, costs = [("real", 10), ("webp", 20), ("edges", 120)], {"real": 1.0, "webp": 0.25, "edges": 1 / 24}
    assert counts_within(20, three, costs) == [10, 20, 120]
    assert counts_within(50, three, costs) == [25, 50, 300]
    assert counts_within(1, three, costs) == [0, 1, 6]


def test_every_class_must_get_an_exemplar():
    check_total(100, 100, quotas(1, 0), COSTS)
    check_total(5, 100, quotas(0, 1), COSTS)
    with pytest.raises(UserError, match=r"memory_size = 99 units are 0\.99 for each of 100 classes.*Raise memory_size"):
        check_total(99, 100, quotas(1, 0), COSTS)
    check_total(200, 100, quotas(1, 0), COSTS, least=2)
    with pytest.raises(UserError, match=r"less than the 2 exemplars that the method needs"):
        check_total(199, 100, quotas(1, 0), COSTS, least=2)


@pytest.mark.parametrize("selection", long_but(SELECTIONS, "herding"))
def test_classes_shrink_in_the_order_of_choice_and_end_as_if_chosen_at_once(paths, selection):
    total = 18 + 1e-9  # of 2 + 6/24 units a class at the ratio's own size: 8 times that
    memory, before = shared(paths, total, selection=selection, seed=3), {}
    for seen in (1, 2, 3, 4):
        memory.update({seen - 1: paths.images(LABELS[seen - 1])}, [features_of(seen - 1)])
        real, synthetic = counts_within(total / seen, quotas(), COSTS)
        assert memory.report()["units_total"] <= total
        for target in range(seen):
            items = [item for item in memory.items() if item.target == target]
            chosen = [item.image for item in items]
            assert [item.role for item in items] == (["real"] * real + ["edges"] * synthetic)[:N]
            assert chosen == before.get(target, chosen)[: len(chosen)]
            before[target] = chosen
    at_once = filled(paths, shared(paths, total, selection=selection, seed=3), (4,))
    assert at_once.items() == memory.items()
    assert at_once.report() == memory.report()


def test_the_report_tells_the_share_at_each_phase(paths):
    memory = shared(paths, 6)
    for seen in (1, 2, 3, 4):
        memory.update({seen - 1: paths.images(LABELS[seen - 1])}, [features_of(seen - 1)])
        report = memory.report()
        assert report["units_budget"] == pytest.approx(6 / seen)
        assert report["units_budget_total"] == 6
        assert report["units_per_class_max"] <= report["units_budget"] + 1e-9
        assert (report["nb_real"], report["nb_synthetic"]) == tuple(
            seen * n for n in counts_within(6 / seen, quotas(), COSTS)
        )
    own = shared(paths, None, budget=3)
    assert filled(paths, own).report()["units_budget_total"] == 12
    assert own.report()["units_budget"] == 3


def test_a_small_class_gives_what_it_has(paths):
    memory = filled(paths, shared(paths, 1000), (4,))
    assert [len(memory.of(target)) for target in range(4)] == [N] * 4


def test_prompts_that_cost_more_than_was_foreseen_are_dropped_without_a_word(tmp_path, caplog):
    paths = DatasetPaths(tmp_path, "Toy")
    images = [save_noise(paths.folder("train") / "a" / f"{i:02d}.png", i, (12, 12)) for i in range(N)]
    memory = shared(paths, 3)
    memory.update({0: images}, [features_of(0)])
    assert len(memory.of(0)) == 2 + 8  # 3 / (2 + 6/24) times 2 and 6, whole ones
    for image in images:
        save_picture(paths.kept(image).with_suffix(".webp"), 0, (24, 24), "1")  # 4/24 units each
    memory.enforce_budget()
    assert len(memory.of(0)) == 2 + 6
    assert not caplog.records


def test_the_state_goes_on_with_its_share(paths):
    memory = filled(paths, shared(paths, 9), (2, 1))
    other = shared(paths, 9)
    other.load_state_dict(memory.state_dict())
    assert other.report() == memory.report()
    for each in (memory, other):
        each.update({3: paths.images("d")}, [features_of(3)])
    assert other.items() == memory.items()


def test_closest_to_the_mean():
    rows = np.random.default_rng(0).normal(size=(20, 4)) * np.random.default_rng(1).uniform(0.1, 9, (20, 1))
    unit = [row / np.linalg.norm(row) for row in rows]
    mean = sum(unit) / len(unit)
    expected = sorted(range(20), key=lambda i: np.linalg.norm(unit[i] - mean))
    assert closest_to_mean(rows, 20) == expected
    assert closest_to_mean(rows, 3) == expected[:3]
    assert closest_to_mean(np.ones((5, 2)), 5) == [0, 1, 2, 3, 4], "of equals, the first"
    with pytest.raises(ValueError, match="6 of 5"):
        closest_to_mean(np.ones((5, 2)), 6)
    with pytest.raises(UserError, match="diverged"):
        closest_to_mean(np.full((5, 2), np.nan), 2)


def own_budget(paths, selection, seed):
    forms = {"real": Cost(None, paths), "edges": edges_cost(paths)}
    return ExemplarMemory(paths, quotas(2, 3), forms, None, 2, selection=selection, seed=seed)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_each_way_to_choose_keeps_real_and_synthetic_exemplars(paths, selection):
    images = paths.images("b")
    memory = own_budget(paths, selection, 5)
    memory.update({1: images}, [features_of(1)])
    items = memory.items()
    assert [item.role for item in items] == ["real"] * 2 + ["edges"] * 3
    chosen = [images.index(item.image) for item in items]
    if selection == "random":
        again, other = (own_budget(paths, selection, seed) for seed in (5, 6))
        for each in (again, other):
            each.update({1: images}, [features_of(9)])
        assert again.items() == items, "a function of the seed and the class alone"
        assert other.items() != items
    else:
        assert chosen == {"herding": herding, "closest": closest_to_mean}[selection](features_of(1), 5)


def test_an_unknown_way_to_choose(paths):
    with pytest.raises(ValueError, match="'best' is none of herding, random, closest"):
        shared(paths, 9, selection="best")
