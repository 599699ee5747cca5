"""Herding, the budget, and the exemplar memory with a budget for each class (utils/memory)."""

import json
import logging
import re
import tracemalloc

import numpy as np
import pytest
import torch

from compress.forms import Cost, form_named
from compress.presets import HIGH
from tests.folders import save_noise, save_picture
from utils.data.items import Item
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.budget import FILL, check_budget, check_total, warn_of_small_classes
from utils.memory.exemplars import ExemplarMemory
from utils.memory.selection import herding

# --- herding ---


def herding_by_hand(features, m):
    """iCaRL's Algorithm 4, one candidate after another."""
    rows = [np.asarray(row, dtype=np.float64) for row in features]
    rows = [row / np.linalg.norm(row) if np.linalg.norm(row) > 0 else row for row in rows]
    mean = sum(rows) / len(rows)
    chosen = []
    for _ in range(m):
        best, best_distance = None, np.inf
        for i, row in enumerate(rows):
            if i in chosen:
                continue
            mean_with_i = (sum((rows[j] for j in chosen), np.zeros_like(mean)) + row) / (len(chosen) + 1)
            distance = np.linalg.norm(mean - mean_with_i)
            if distance < best_distance - 1e-12:
                best, best_distance = i, distance
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["normal", "relu", "float32", "scaled"])
def test_herding_agrees_with_the_algorithm_written_out(seed, kind):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(int(rng.integers(5, 40)), int(rng.integers(2, 20))))
    if kind == "relu":
        features = np.maximum(features, 0)  # as a ResNet's are; some rows may be all zero
    if kind == "float32":
        features = features.astype(np.float32)
    if kind == "scaled":
        features *= rng.uniform(0.01, 100, size=(len(features), 1))
    m = int(rng.integers(1, len(features) + 1))
    assert herding(features, m) == herding_by_hand(features, m)


def test_herding_does_not_mind_how_long_the_features_are():
    features = np.random.default_rng(0).normal(size=(30, 6))
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(30, 1))
    assert herding(features, 12) == herding(features * lengths, 12)
    assert herding(features * 1e-6, 12) == herding(features * 1e6, 12)


def test_herding_picks_each_row_once_and_a_shorter_pick_is_the_start_of_a_longer():
    features = np.random.default_rng(0).normal(size=(25, 4))
    everything = herding(features, 25)
    assert sorted(everything) == list(range(25))
    for m in (0, 1, 7, 24):
        assert herding(features, m) == everything[:m]


@pytest.mark.parametrize("shape", [(5, 11), (6, 33), (7, 63), (37, 513)])
def test_of_equal_rows_the_first_is_picked(shape):
    """Odd shapes: products of equal rows then differ by rounding, from row to row."""
    row = np.random.default_rng(0).normal(size=shape[1])
    assert herding(np.tile(row, (shape[0], 1)).astype(np.float32), shape[0]) == list(range(shape[0]))


def test_of_equal_pairs_the_first_is_picked():
    pair = np.random.default_rng(1).normal(size=(6, 11))
    assert [i % 6 for i in herding(np.concatenate([pair, pair]), 2)] == [
        i % 6 for i in herding_by_hand([*pair, *pair], 2)
    ]
    assert herding(np.concatenate([pair, pair]), 1)[0] < 6


def test_the_first_pick_is_the_row_nearest_to_the_mean():
    angles = np.array([0.0, 0.1, 0.35, 0.5, 0.9])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert herding(features, 1) == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_herding_takes_tensors(dtype):
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert herding(features.clone().requires_grad_(), 9) == herding_by_hand(features.double().numpy(), 9)


def test_herding_holds_no_more_than_a_few_times_the_features():
    features = np.random.default_rng(0).normal(size=(2000, 128))
    tracemalloc.start()
    herding(features, 300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * features.nbytes  # n x m x d would be 300 times


@pytest.mark.parametrize("m", [-1, 6])
def test_herding_can_not_pick_more_than_there_are(m):
    with pytest.raises(ValueError, match=f"{m} of 5"):
        herding(np.ones((5, 2)), m)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_diverged_features_are_a_message(value):
    features = np.ones((5, 2))
    features[3, 1] = value
    with pytest.raises(UserError, match="diverged"):
        herding(features, 2)


# --- costs and budget ---


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
    save_picture(paths.edge_map(image), 0, map_size, map_mode)
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


# --- the memory ---

R, S, K = 2, 3, 4


@pytest.fixture
def paths(tmp_path):
    paths = DatasetPaths(tmp_path / "train", "Toy")
    for label in ("a b", "ü"):
        for i in range(8):
            image = save_noise(paths.folder("train") / label / f"{i}.png", i, (24, 24))
            save_picture(paths.edge_map(image), 0, (24, 24), "1")
    return paths


def features_of(seed):
    return np.random.default_rng(seed).normal(size=(8, 5))


def memory_of(paths, quotas=(("real", R), ("edges", S)), budget=20, **options):
    return ExemplarMemory(paths, quotas, {"real": Cost(None, paths), "edges": edges_cost(paths)}, budget, K, **options)


def filled(paths, **options):
    memory = memory_of(paths, **options)
    memory.add_class(1, paths.images("ü"), features_of(1))
    memory.add_class(0, paths.images("a b"), torch.from_numpy(features_of(0)))
    return memory


def expected_images(paths, label, seed, count=R + S):
    images = paths.images(label)
    return [images[i] for i in herding_by_hand(features_of(seed), count)]


def test_the_first_r_of_herding_stay_real_and_the_next_s_are_prompts(paths):
    memory = filled(paths)
    first, second = expected_images(paths, "a b", 0), expected_images(paths, "ü", 1)
    assert memory.items() == [
        *(Item(image, 0, "real") for image in first[:R]),
        *(Item(image, 0, "edges") for image in first[R:]),
        *(Item(image, 1, "real") for image in second[:R]),
        *(Item(image, 1, "edges") for image in second[R:]),
    ]
    assert memory.targets == [0, 1]
    assert [memory.nb_exemplars(target) for target in (0, 1)] == [5, 5]
    assert [item.regenerated for item in memory.items()] == ([False] * R + [True] * S) * 2


@pytest.mark.parametrize(("real", "synthetic"), [(0, 5), (5, 0), (0, 0), (4, 4)])
def test_memories_of_one_form_only_and_of_whole_classes(paths, real, synthetic):
    memory = memory_of(paths, [("real", real), ("edges", synthetic)])
    memory.add_class(0, paths.images("ü"), features_of(1))
    assert [item.role for item in memory.items()] == ["real"] * real + ["edges"] * synthetic


class Fixed:
    """A form of fixed cost and size, which keeps 5 bytes for each class."""

    def __init__(self, units, size):
        self.cost, self.size = units, size

    def units(self, image):
        return self.cost

    def kept_bytes(self, image):
        return self.size

    def expected_bytes(self, image):
        return self.size

    def text_bytes(self, labels):
        return 5 * len(labels)


class Various(Fixed):
    """A form whose exemplars take the bytes that a table has for them."""

    def __init__(self, sizes, texts):
        self.sizes, self.texts = sizes, texts

    def units(self, image):
        return None

    def kept_bytes(self, image):
        return self.sizes[image]

    expected_bytes = kept_bytes

    def text_bytes(self, labels):
        return self.texts * len(labels)


@pytest.mark.parametrize("seed", range(60))
def test_a_budget_in_bytes_is_kept_and_used(paths, seed):
    """Whatever the sizes, forms and budgets: within the budget; and one more exemplar of the last form would not be."""
    rng = np.random.default_rng(seed)
    images = paths.images("ü")
    names = ["real", "a", "b"][: 1 + rng.integers(1, 3)]
    sizes = {name: {image: int(rng.integers(1, 400)) for image in images} for name in names}
    forms = {name: Various(sizes[name], 0 if name == "real" else int(rng.integers(0, 20))) for name in names}
    quotas = [(name, FILL if name == names[-1] else int(rng.integers(0, 4))) for name in names]
    budget = int(rng.integers(20, 2000))
    memory = ExemplarMemory(paths, quotas, forms, None, K, bytes_budget=budget)
    order = expected_images(paths, "ü", 1, 8)
    if all(sizes[name][order[0]] + forms[name].text_bytes(["ü"]) > budget for name, number in quotas if number):
        with pytest.raises(UserError, match="not one exemplar fits"):
            memory.add_class(0, images, features_of(1))
        return
    memory.add_class(0, images, features_of(1))
    items = memory.items()
    assert [item.image for item in items] == order[: len(items)]
    assert sorted(range(len(items)), key=lambda i: names.index(items[i].role)) == list(range(len(items)))
    used = {item.role for item in items}

    def bytes_of(items, used):
        return sum(sizes[i.role][i.image] for i in items) + sum(forms[name].text_bytes(["ü"]) for name in used)

    assert memory.bytes(0) == memory.report()["bytes_total"] == bytes_of(items, used) <= budget
    if len(items) < 8:
        one_more = Item(order[len(items)], 0, names[-1])
        assert bytes_of([*items, one_more], used | {names[-1]}) > budget


def test_any_number_of_forms_cut_one_list_and_each_has_its_row(paths):
    forms = {"real": Cost(None, paths), "webp": Fixed(0.25, 70), "text": Fixed(0.0, 0)}
    memory = ExemplarMemory(paths, [("real", 1), ("webp", 2), ("text", 4)], forms, 1.5, K)
    memory.add_class(0, paths.images("ü"), features_of(1))
    chosen = expected_images(paths, "ü", 1, 7)
    roles = ["real", "webp", "webp", "text", "text", "text", "text"]
    assert [(item.image, item.role) for item in memory.items()] == list(zip(chosen, roles, strict=True))
    assert memory.units(0) == 1.5
    real, webp, text = memory.report()["forms"]
    assert real == {"form": "real", "exemplars": 1, "units": 1.0, "bytes": chosen[0].stat().st_size, "missing": 0}
    assert webp == {"form": "webp", "exemplars": 2, "units": 0.5, "bytes": 2 * 70 + 5, "missing": 0}
    assert text == {"form": "text", "exemplars": 4, "units": 0.0, "bytes": 5, "missing": 0}
    report = memory.report()
    assert (report["nb_real"], report["nb_synthetic"]) == (1, 6)
    assert report["bytes_prompts"] == 150
    other = ExemplarMemory(paths, [("real", 1), ("webp", 2), ("text", 4)], forms, 1.5, K)
    other.load_state_dict(memory.state_dict())
    assert other.items() == memory.items()
    with pytest.raises(UserError, match=r"forms real, webp, text, this run's real, edges"):
        memory_of(paths).load_state_dict(memory.state_dict())


def test_a_small_class_keeps_what_it_has(paths):
    memory = memory_of(paths, [("real", 4), ("edges", 9)])
    memory.add_class(0, paths.images("ü"), features_of(1))
    assert [item.role for item in memory.items()] == ["real"] * 4 + ["edges"] * 4
    memory = memory_of(paths, [("real", 9), ("edges", 9)])
    memory.add_class(0, paths.images("ü"), features_of(1))
    assert [item.role for item in memory.items()] == ["real"] * 8


def test_a_class_is_added_once_with_a_feature_per_image(paths):
    memory = filled(paths)
    with pytest.raises(ValueError, match="already"):
        memory.add_class(0, paths.images("ü"), features_of(0))
    with pytest.raises(ValueError, match="8 images, 7 features"):
        memory.add_class(2, paths.images("ü"), features_of(0)[:7])


def test_evaluation_weighs_each_exemplar_alike(paths):
    memory = filled(paths)
    chosen = expected_images(paths, "ü", 1)
    pictures = memory.evaluation_images(1)
    assert pictures[:R] == [(image, 1.0) for image in chosen[:R]]
    assert [path for path, _ in pictures[R:]] == [paths.copy(image, k) for image in chosen[R:] for k in range(K)]
    assert {weight for _, weight in pictures[R:]} == {1 / K}
    assert sum(weight for _, weight in pictures) == pytest.approx(R + S)


def test_units_and_bytes_are_those_of_the_files(paths):
    memory = filled(paths)
    prompts = [item.image for item in memory.items() if item.role == "edges"]
    real = [item.image for item in memory.items() if item.role == "real"]
    report = memory.report()
    assert report["units_per_class_mean"] == pytest.approx(R + S / 24)
    assert report["units_per_class_max"] == pytest.approx(R + S / 24)
    assert report["units_total"] == pytest.approx(2 * (R + S / 24))
    assert report["units_budget"] == 20
    assert (report["nb_real"], report["nb_synthetic"]) == (2 * R, 2 * S)
    labels = len("a b") + len("ü".encode())  # once a class
    assert report["bytes_real"] == sum(len(image.read_bytes()) for image in real)
    assert report["bytes_prompts"] == labels + sum(len(paths.edge_map(image).read_bytes()) for image in prompts)
    assert report["bytes_total"] == report["bytes_real"] + report["bytes_prompts"]
    assert report["bytes_if_all_real"] == sum(len(image.read_bytes()) for image in real + prompts)
    assert report["edge_maps_missing"] == 0
    json.dumps(report)


def test_the_report_counts_the_text_that_class_names_json_gives(paths):
    before = filled(paths).report()["bytes_prompts"]
    (paths.root / "class_names.json").write_text(json.dumps({"ü": "a long name"}))
    assert filled(paths).report()["bytes_prompts"] == before + len("a long name") - 2


def test_an_empty_memory_has_a_report_too(paths):
    report = memory_of(paths, budget=None).report()
    assert report["units_total"] == report["units_per_class_max"] == report["bytes_total"] == 0
    assert report["units_budget"] is None
    assert [row["exemplars"] for row in report["forms"]] == [0, 0]


def test_costs_differ_from_class_to_class(paths):
    for image in paths.images("ü"):
        save_picture(paths.edge_map(image), 0, (48, 48), "1")
    memory = filled(paths)
    assert memory.units(0) == pytest.approx(R + S / 24)
    assert memory.units(1) == pytest.approx(R + 4 * S / 24)
    assert memory.report()["units_per_class_mean"] == pytest.approx(R + 2.5 * S / 24)
    assert memory.report()["units_per_class_max"] == pytest.approx(R + 4 * S / 24)


def test_exemplars_over_the_true_budget_are_dropped_from_the_end_with_a_warning(paths, caplog):
    for image in paths.images("ü"):
        save_picture(paths.edge_map(image), 0, (48, 48), "1")  # 4/24 units each
    with caplog.at_level(logging.WARNING):
        memory = filled(paths, budget=R + 9 / 24)
    chosen = expected_images(paths, "ü", 1)
    assert [item.image for item in memory.items() if item.target == 1] == chosen[: R + 2]
    assert memory.nb_exemplars(0) == R + S, "the other class is within the budget"
    assert memory.units(1) == pytest.approx(R + 8 / 24)
    (warning,) = caplog.records
    assert "'ü'" in warning.message
    assert "last 1 of 5" in warning.message


def test_a_memory_exactly_on_budget_keeps_all(paths, caplog):
    memory = filled(paths, budget=R + S / 24)
    assert memory.nb_exemplars(0) == memory.nb_exemplars(1) == R + S
    assert not caplog.records


def test_without_a_budget_nothing_is_dropped(paths):
    for image in paths.images("ü"):
        save_picture(paths.edge_map(image), 0, (480, 480), "1")
    assert filled(paths, budget=None).nb_exemplars(1) == R + S


def test_edge_maps_made_after_the_choice_count_from_then_on(paths, caplog):
    for image in paths.images("ü"):
        paths.edge_map(image).unlink()
    memory = filled(paths, budget=R + S / 24)
    assert memory.report()["edge_maps_missing"] == S
    assert memory.nb_exemplars(1) == R + S
    for image in paths.images("ü"):
        save_picture(paths.edge_map(image), 0, (48, 48), "1")
    for target in memory.targets:
        memory.enforce_budget(target)
    assert memory.nb_exemplars(0) == R + S
    assert memory.nb_exemplars(1) == R + 0  # 3/24 units are left, one prompt takes 4/24
    assert len(caplog.records) == 1
    assert memory.report()["edge_maps_missing"] == 0


def test_the_state_goes_through_json_and_torch_and_moves_with_the_data(paths, tmp_path):
    memory = filled(paths)
    state = memory.state_dict()
    assert state["forms"] == ["real", "edges"]
    chosen = [f"a b/{image.name}" for image in expected_images(paths, "a b", 0)]
    sizes = [image.stat().st_size for image in expected_images(paths, "a b", 0)]
    kept = {"images": chosen, "file_bytes": sizes, "counts": [R, S], "copies": [[]] * (R + S)}
    assert state["classes"]["0"] == kept
    torch.save(state, tmp_path / "state.pt")
    for copy in (json.loads(json.dumps(state)), torch.load(tmp_path / "state.pt", weights_only=True)):
        other = memory_of(paths)
        other.add_class(5, paths.images("ü"), features_of(3))
        other.load_state_dict(copy)
        assert other.items() == memory.items()
        assert other.report() == memory.report()
        assert other.state_dict() == state
    moved = tmp_path / "moved"
    paths.data_dir.rename(moved)
    other = memory_of(DatasetPaths(moved, "Toy"))
    other.load_state_dict(state)
    assert all(item.image.is_file() for item in other.items())
    assert [item.target for item in other.items()] == [item.target for item in memory.items()]
