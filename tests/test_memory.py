"""The exemplar memory with a budget for each class (utils/memory/exemplars.py)."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.coding.edge_maps import encode
from compress.forms.edges import read
from compress.training.exemplars import Cost
from tests.folders import save_noise, save_picture
from tests.test_budget import edges_cost
from tests.test_herding import herding_by_hand
from utils.data.classes import Item
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.budget import FILL
from utils.memory.exemplars import ExemplarMemory

R, S, K = 2, 3, 4


@pytest.fixture
def paths(tmp_path):
    paths = DatasetPaths(tmp_path / "train", "Toy")
    for label in ("a b", "ü"):
        for i in range(8):
            image = save_noise(paths.folder("train") / label / f"{i}.png", i, (24, 24))
            save_picture(paths.kept(image).with_suffix(".webp"), 0, (24, 24), "1")
    return paths


def features_of(seed):
    return np.random.default_rng(seed).normal(size=(8, 5))


def memory_of(paths, quotas=(("real", R), ("edges", S)), budget=20, **options):
    return ExemplarMemory(paths, quotas, {"real": Cost(None, paths), "edges": edges_cost(paths)}, budget, K, **options)


def filled(paths, **options):
    memory = memory_of(paths, **options)
    memory.update({1: paths.images("ü")}, [features_of(1)])
    memory.update({0: paths.images("a b")}, [torch.from_numpy(features_of(0))])
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
    assert [len(memory.of(target)) for target in (0, 1)] == [5, 5]
    assert [item.regenerated for item in memory.items()] == ([False] * R + [True] * S) * 2


@pytest.mark.parametrize(("real", "synthetic"), [(0, 5), (5, 0), (0, 0), (4, 4)])
def test_memories_of_one_form_only_and_of_whole_classes(paths, real, synthetic):
    memory = memory_of(paths, [("real", real), ("edges", synthetic)])
    memory.update({0: paths.images("ü")}, [features_of(1)])
    assert [item.role for item in memory.items()] == ["real"] * real + ["edges"] * synthetic


class Fixed:
    """A form of fixed cost and size."""

    def __init__(self, units, size):
        self.cost, self.size = units, size

    def units(self, image):
        return self.cost

    def kept_bytes(self, image):
        return self.size

    def expected_bytes(self, image):
        return self.size


class Various(Fixed):
    """A form whose exemplars take the bytes that a table has for them."""

    def __init__(self, sizes):
        self.sizes = sizes

    def units(self, image):
        return None

    def kept_bytes(self, image):
        return self.sizes[image]

    expected_bytes = kept_bytes


def class_bytes(label: bytes, text: bytes, of_forms: dict[str, list[int]]) -> int:
    """Bytes of class 0 in the memory's file, counted from the layout that utils/memory/packed.py describes; its images
    have 32 x 32 pixels, and of_forms has each form's lengths."""

    def number(n):
        return max(1, -(-n.bit_length() // 7))

    def index(form, lengths):
        if not lengths:
            return 1
        each = [number(length + 1) for length in lengths]
        return number(len(lengths)) + 1 + (sum(each) if len({*lengths}) > 1 else each[0]) + 3 * (form != "real")

    synthetic = any(lengths for form, lengths in of_forms.items() if form != "real")
    names = 1 + (1 + len(label)) + 1 + len(text) * synthetic
    return names + sum(index(form, lengths) + sum(lengths) for form, lengths in of_forms.items())


@pytest.mark.parametrize("seed", range(60))
def test_a_budget_in_bytes_is_kept_and_used(paths, seed):
    """Whatever the sizes, forms and budgets: within the budget; and one more exemplar of the last form would not be."""
    rng = np.random.default_rng(seed)
    images = paths.images("ü")
    names = ["real", "a", "b"][: 1 + rng.integers(1, 3)]
    sizes = {name: {image: int(rng.integers(1, 400)) for image in images} for name in names}
    forms = {name: Various(sizes[name]) for name in names}
    text = "t" * int(rng.integers(0, 20)) or "ü"
    (paths.root / "class_names.json").write_text(json.dumps({"ü": text}))
    quotas = [(name, FILL if name == names[-1] else int(rng.integers(0, 4))) for name in names]
    budget = int(rng.integers(20, 2000))
    memory = ExemplarMemory(paths, quotas, forms, None, K, bytes_budget=budget)
    order = expected_images(paths, "ü", 1, 8)
    in_use = [name for name, number in quotas if number]

    def bytes_of(kept):
        lengths = {name: [sizes[name][image] for role, image in kept if role == name] for name in in_use}
        return class_bytes("ü".encode(), b"" if text == "ü" else text.encode(), lengths)

    if all(bytes_of([(name, order[0])]) > budget for name in in_use):
        with pytest.raises(UserError, match="not one exemplar fits"):
            memory.update({0: images}, [features_of(1)])
        return
    memory.update({0: images}, [features_of(1)])
    items = memory.items()
    assert [item.image for item in items] == order[: len(items)]
    assert sorted(range(len(items)), key=lambda i: names.index(items[i].role)) == list(range(len(items)))
    kept = [(item.role, item.image) for item in items]
    assert memory.bytes(0) == memory.report()["bytes_total"] == bytes_of(kept) <= budget
    if len(items) < 8:
        assert bytes_of([*kept, (names[-1], order[len(items)])]) > budget


def test_any_number_of_forms_cut_one_list_and_each_has_its_row(paths):
    forms = {"real": Cost(None, paths), "webp": Fixed(0.25, 70), "text": Fixed(0.0, 0)}
    memory = ExemplarMemory(paths, [("real", 1), ("webp", 2), ("text", 4)], forms, 1.5, K)
    memory.update({0: paths.images("ü")}, [features_of(1)])
    chosen = expected_images(paths, "ü", 1, 7)
    roles = ["real", "webp", "webp", "text", "text", "text", "text"]
    assert [(item.image, item.role) for item in memory.items()] == list(zip(chosen, roles, strict=True))
    assert memory.units(0) == 1.5
    real, webp, text = memory.report()["forms"]
    of_real = chosen[0].stat().st_size + 4  # number, flags, length in two bytes
    assert real == {"form": "real", "exemplars": 1, "units": 1.0, "bytes": of_real, "missing": 0}
    assert webp == {"form": "webp", "exemplars": 2, "units": 0.5, "bytes": 2 * 70 + 6, "missing": 0}
    assert text == {"form": "text", "exemplars": 4, "units": 0.0, "bytes": 6, "missing": 0}
    report = memory.report()
    assert report["bytes_total"] == of_real + 146 + 6 + report["bytes_names"] == memory.bytes(0)
    assert (report["nb_real"], report["nb_synthetic"]) == (1, 6)
    assert report["bytes_prompts"] == 152
    other = ExemplarMemory(paths, [("real", 1), ("webp", 2), ("text", 4)], forms, 1.5, K)
    other.load_state_dict(memory.state_dict())
    assert other.items() == memory.items()
    with pytest.raises(UserError, match=r"forms real, webp, text, this run's real, edges"):
        memory_of(paths).load_state_dict(memory.state_dict())


def test_a_small_class_keeps_what_it_has(paths):
    memory = memory_of(paths, [("real", 4), ("edges", 9)])
    memory.update({0: paths.images("ü")}, [features_of(1)])
    assert [item.role for item in memory.items()] == ["real"] * 4 + ["edges"] * 4
    memory = memory_of(paths, [("real", 9), ("edges", 9)])
    memory.update({0: paths.images("ü")}, [features_of(1)])
    assert [item.role for item in memory.items()] == ["real"] * 8


def test_a_class_is_added_once_with_a_feature_per_image(paths):
    memory = filled(paths)
    with pytest.raises(ValueError, match="already"):
        memory.update({0: paths.images("ü")}, [features_of(0)])
    with pytest.raises(ValueError, match="8 images, 7 features"):
        memory.update({2: paths.images("ü")}, [features_of(0)[:7]])


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
    lengths = [
        {role: [len(bytes_of(item.image)) for item in memory.items() if (item.target, item.role) == (target, role)]
         for role, bytes_of in (("real", Path.read_bytes),
                                ("edges", lambda image: encode(read(paths.find_kept(image).read_bytes(), (0, 0)))))}
        for target in (0, 1)
    ]  # fmt: skip
    assert report["bytes_real"] - sum(len(image.read_bytes()) for image in real) == 2 * (1 + 1 + 2)
    labels = (1 + 1 + len("a b") + 1) + (1 + 1 + len("ü".encode()) + 1)  # once a class
    assert report["bytes_names"] == labels
    assert report["bytes_total"] == report["bytes_real"] + report["bytes_prompts"] + labels
    assert report["bytes_total"] == class_bytes(b"a b", b"", lengths[0]) + class_bytes("ü".encode(), b"", lengths[1])
    assert report["bytes_if_all_real"] == sum(len(image.read_bytes()) for image in real + prompts)
    assert report["edge_maps_missing"] == 0
    json.dumps(report)


def test_the_report_counts_the_text_that_class_names_json_gives(paths):
    before = filled(paths).report()["bytes_total"]
    (paths.root / "class_names.json").write_text(json.dumps({"ü": "a long name"}))
    assert filled(paths).report()["bytes_total"] == before + len("a long name")


def test_an_empty_memory_has_a_report_too(paths):
    report = memory_of(paths, budget=None).report()
    assert report["units_total"] == report["units_per_class_max"] == report["bytes_total"] == 0
    assert report["units_budget"] is None
    assert [row["exemplars"] for row in report["forms"]] == [0, 0]


def test_costs_differ_from_class_to_class(paths):
    for image in paths.images("ü"):
        save_picture(paths.kept(image).with_suffix(".webp"), 0, (48, 48), "1")
    memory = filled(paths)
    assert memory.units(0) == pytest.approx(R + S / 24)
    assert memory.units(1) == pytest.approx(R + 4 * S / 24)
    assert memory.report()["units_per_class_mean"] == pytest.approx(R + 2.5 * S / 24)
    assert memory.report()["units_per_class_max"] == pytest.approx(R + 4 * S / 24)


def test_exemplars_over_the_true_budget_are_dropped_from_the_end_with_a_warning(paths, caplog):
    for image in paths.images("ü"):
        save_picture(paths.kept(image).with_suffix(".webp"), 0, (48, 48), "1")  # 4/24 units each
    with caplog.at_level(logging.WARNING):
        memory = filled(paths, budget=R + 9 / 24)
    chosen = expected_images(paths, "ü", 1)
    assert [item.image for item in memory.items() if item.target == 1] == chosen[: R + 2]
    assert len(memory.of(0)) == R + S, "the other class is within the budget"
    assert memory.units(1) == pytest.approx(R + 8 / 24)
    (warning,) = caplog.records
    assert "'ü'" in warning.message
    assert "last 1 of 5" in warning.message


def test_a_memory_exactly_on_budget_keeps_all(paths, caplog):
    memory = filled(paths, budget=R + S / 24)
    assert len(memory.of(0)) == len(memory.of(1)) == R + S
    assert not caplog.records


def test_without_a_budget_nothing_is_dropped(paths):
    for image in paths.images("ü"):
        save_picture(paths.kept(image).with_suffix(".webp"), 0, (480, 480), "1")
    assert len(filled(paths, budget=None).of(1)) == R + S


def test_edge_maps_made_after_the_choice_count_from_then_on(paths, caplog):
    for image in paths.images("ü"):
        paths.find_kept(image).unlink()
    memory = filled(paths, budget=R + S / 24)
    assert memory.report()["edge_maps_missing"] == S
    assert len(memory.of(1)) == R + S
    for image in paths.images("ü"):
        save_picture(paths.kept(image).with_suffix(".webp"), 0, (48, 48), "1")
    memory.enforce_budget()
    assert len(memory.of(0)) == R + S
    assert len(memory.of(1)) == R + 0  # 3/24 units are left, one prompt takes 4/24
    assert len(caplog.records) == 1
    assert memory.report()["edge_maps_missing"] == 0


def test_the_state_goes_through_json_and_torch_and_moves_with_the_data(paths, tmp_path):
    memory = filled(paths)
    state = memory.state_dict()
    assert state["forms"] == ["real", "edges"]
    chosen = [f"a b/{image.name}" for image in expected_images(paths, "a b", 0)]
    sizes = [image.stat().st_size for image in expected_images(paths, "a b", 0)]
    kept = {"images": chosen, "file_bytes": sizes, "counts": [R, S], "text": "a b"}
    assert state["classes"]["0"] == kept
    torch.save(state, tmp_path / "state.pt")
    for copy in (json.loads(json.dumps(state)), torch.load(tmp_path / "state.pt", weights_only=True)):
        other = memory_of(paths)
        other.update({5: paths.images("ü")}, [features_of(3)])
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
