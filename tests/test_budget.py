"""What an exemplar costs, and how many fit a budget (compress.training.exemplars.Cost, utils/memory/budget.py)."""

import re

import pytest

from compress.forms import form_named
from compress.presets import HIGH
from compress.training.exemplars import Cost
from tests.folders import save_noise, save_picture
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.budget import check_budget, check_total, warn_of_small_classes
from utils.memory.exemplars import ExemplarMemory


def edges_cost(paths):
    return Cost(form_named("edges", HIGH), paths)


@pytest.mark.parametrize(
    ("mode", "image_size", "map_mode", "map_size", "units"),
    [
        ("RGB", (64, 48), "1", (64, 48), 1 / 24),
        ("L", (64, 48), "1", (64, 48), 1 / 8),
        ("RGBA", (64, 48), "1", (64, 48), 1 / 24),
        ("RGB", (32, 32), "1", (256, 256), 64 / 24),
        ("L", (28, 28), "1", (256, 256), 256 * 256 / (28 * 28 * 8)),
        ("RGB", (64, 48), "L", (64, 48), 1 / 24),  # the published scripts' 8-bit edge maps hold one bit a pixel too
    ],
)
def test_a_prompt_costs_its_bits_over_the_image_s(tmp_path, mode, image_size, map_mode, map_size, units):
    paths = DatasetPaths(tmp_path, "Toy")
    image = save_picture(paths.folder("train") / "a" / "x.png", 0, image_size, mode)
    save_picture(paths.kept(image).with_suffix(".webp"), 0, map_size, map_mode)
    assert edges_cost(paths).units(image) == pytest.approx(units, rel=1e-12)


@pytest.mark.parametrize(("mode", "units"), [("RGB", 1 / 24), ("L", 1 / 8)])
def test_without_an_edge_map_a_prompt_costs_as_if_it_had_the_image_s_size(tmp_path, mode, units):
    paths = DatasetPaths(tmp_path, "Toy")
    image = save_picture(paths.folder("train") / "a" / "x.png", 0, (9, 7), mode)
    assert edges_cost(paths).units(image) == pytest.approx(units, rel=1e-12)


def test_costs_come_from_the_headers(tmp_path):
    paths = DatasetPaths(tmp_path, "Toy")
    image = save_noise(paths.folder("train") / "a" / "x.png", 0, (64, 64))
    image.write_bytes(image.read_bytes()[:100])
    assert edges_cost(paths).units(image) == pytest.approx(1 / 24)
    image.write_text("no picture")
    with pytest.raises(UserError, match=r"x\.png"):
        edges_cost(paths).units(image)


@pytest.mark.parametrize(
    ("real", "synthetic", "budget", "cost", "fits"),
    [
        (18, 48, 20, 1 / 24, True),  # the paper's experiment, exactly on budget
        (18, 49, 20, 1 / 24, False),
        (19, 48, 20, 1 / 24, False),
        (20, 0, 20, 1 / 24, True),
        (0, 480, 20, 1 / 24, True),
        (0, 481, 20, 1 / 24, False),
        (18, 16, 20, 1 / 8, True),
        (18, 17, 20, 1 / 8, False),
        (13, 7, 13.7, 0.1, True),  # sums of floats: 13 + 7 x 0.1 is a little above 13.7
        (0, 0, 0, 1 / 24, True),
        (1, 0, 0, 1 / 24, False),
        (10**6, 10**6, None, 1 / 24, True),
    ],
)
def test_budget_arithmetic(real, synthetic, budget, cost, fits):
    quotas, costs = [("real", real), ("edges", synthetic)], {"real": 1.0, "edges": cost}
    if fits:
        check_budget(quotas, budget, costs)
    else:
        with pytest.raises(UserError, match="budget"):
            check_budget(quotas, budget, costs)


@pytest.mark.parametrize(
    ("quotas", "budget", "costs", "words"),
    [
        ([("real", 18), ("edges", 72)], 20, {"edges": 1 / 24}, r"18 real \+ 72 edges x 1/24 = 21\.00 units > 20\b"),
        ([("real", 18), ("edges", 48)], 20, {"edges": 1 / 8}, r"18 real \+ 48 edges x 1/8 = 24\.00 units > 20\b"),
        ([("real", 2), ("edges", 3)], 9.5, {"edges": 64 / 24}, r"2 real \+ 3 edges x 8/3 = 10\.00 units > 9\.5\b"),
        ([("real", 1), ("webp", 4), ("edges", 24)], 2, {"edges": 1 / 24, "webp": 0.1}, r"4 webp x 1/10 \+ 24 edges"),
    ],
)
def test_over_budget_shows_the_arithmetic(quotas, budget, costs, words):
    with pytest.raises(UserError, match=words):
        check_budget(quotas, budget, {"real": 1.0, **costs})


@pytest.mark.parametrize(
    ("total", "nb_classes", "quotas", "least"),
    [(7, 6, [("real", 1), ("edges", 0)], 2), (1, 6, [("real", 18), ("edges", 48)], 1), (3, 10, [("real", 1)], 3)],
)
def test_the_advice_on_a_memory_that_is_too_small_works(total, nb_classes, quotas, least):
    costs = {"real": 1.0, "edges": 1 / 24}
    with pytest.raises(UserError) as error:
        check_total(total, nb_classes, quotas, costs, least)
    enough = int(re.search(r"Raise memory_size to at least (\d+)\.", str(error.value))[1])
    check_total(enough, nb_classes, quotas, costs, least)
    with pytest.raises(UserError):
        check_total(enough - 1, nb_classes, quotas, costs, least)


def test_numbers_of_exemplars_are_not_negative():
    with pytest.raises(UserError, match="-1 exemplars of form 'edges'"):
        check_budget([("real", 5), ("edges", -1)], None, {"real": 1.0, "edges": 0.1})
    with pytest.raises(UserError, match="-1 exemplars of form 'real'"):
        ExemplarMemory(DatasetPaths(".", "X"), [("real", -1)], {}, 20, 5)


def test_classes_smaller_than_the_quotas_are_warned_about(caplog):
    quotas = [("real", 18), ("edges", 48)]
    warn_of_small_classes({"a": 66, "b": 70}, quotas)
    assert not caplog.records
    warn_of_small_classes({"a": 66, "b": 65, "c": 3}, quotas)
    (warning,) = caplog.records
    assert "'c' has 3 train images, fewer than 18 real + 48 edges exemplars (2 classes" in warning.message
