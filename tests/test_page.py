"""The HTML page: what it holds, that nothing comes from elsewhere, and its statistics against independent ones."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from tests.test_report import write
from utils.results import entries, report

VOID = {"meta", "link", "br", "img", "path", "use", "rect", "stop"}


class Page(HTMLParser):
    """What a browser would see: text by heading, ids, addresses, and whether tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags, self.sections = [], [], [], set(), {}
        self.heading = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[key] for key in ("src", "href", "xlink:href") if key in values]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.heading = values["id"]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.sections[self.heading] = self.sections.get(self.heading, "") + data + " "


@pytest.fixture
def page(tmp_path, capsys):
    """Calls the command as a user does; -> the page."""

    def call(*folders):
        assert report.main([*map(str, folders), "--html", str(tmp_path / "page.html")]) == 0, capsys.readouterr().err
        return Page((tmp_path / "page.html").read_text(encoding="utf-8"))

    return call


def in_bytes(form, budget):
    synthetic = {"syn_form": form, "syn_per_class": "fill"} if form != "real" else {"syn_per_class": 0}
    return {"budget_in": "bytes", "memory_bytes_per_class": budget, **synthetic}


def test_self_contained_and_safe_for_any_name(page, tmp_path):
    name = "a$x$<b>&\"'é"
    found = page(write(tmp_path / name, seeds=(1, 2)), write(tmp_path / "other", top1=80.0, nme=True))
    assert found.open == []
    assert found.tags.isdisjoint({"script", "b", "iframe"})
    assert all(address.startswith(("data:", "#")) for address in found.addresses)
    assert len(found.ids) == len(set(found.ids))
    assert {"#" + i for i in found.ids} >= {a for a in found.addresses if a.startswith("#")}
    for section in ("runs", "cost", "forgetting"):
        assert name in found.sections[section]
    assert "other (NME)" in found.sections["runs"]


def test_paired_differences_and_areas(page, tmp_path):
    rng = np.random.default_rng(0)
    scores, folders = {}, []
    for form in ("real", "webp:10"):
        for budget in (1000, 4000):
            folder = tmp_path / f"{form[:4]}-{budget}"
            write(folder, seeds=(1, 2, 3), config=in_bytes(form, budget))
            content = json.loads((folder / "results.json").read_text())
            for run in content["runs"]:
                run["cnn"]["average_incremental_accuracy"] = scores[form, budget, run["seed"]] = rng.uniform(50, 90)
            report.write_json(folder / "results.json", report.results(content["config"], content["runs"]))
            folders.append(folder)
    found = page(*folders)
    text = found.sections["paired"]
    for budget in (1000, 4000):
        webp, real = ([scores[form, budget, seed] for seed in (1, 2, 3)] for form in ("webp:10", "real"))
        differences = np.subtract(webp, real)
        row = rf"webp-{budget}\s+real-{budget}\s+{differences.mean():+.1f}\s+{stats.sem(differences):.1f}\s+"
        row += r"\s+".join(f"{difference:+.1f}" for difference in differences)
        assert re.search(row.replace("+", r"\+").replace(r"s\+", "s+"), text), text
    # over two budgets, the area is the mean of both ends
    means = [np.mean([scores["webp:10", budget, seed] for budget in (1000, 4000) for seed in (1, 2, 3)])]
    assert re.search(rf"webp:10\s+{means[0]:.1f} \(SE", found.sections["area"])
    assert "1,000" in found.sections["bytes"]


@pytest.mark.parametrize(
    ("generator", "found", "absent"),
    [
        ({"generator": "tiny"}, "generator tiny", "5,700,000,000"),
        ({"generator": "sd15"}, "LAION-5B", "not recorded"),
        ({"generator": None}, "generator not recorded", "LAION-5B"),
        ({}, "generator not recorded", "LAION-5B"),
    ],
)
def test_the_generator_is_the_recorded_one(page, tmp_path, generator, found, absent):
    folder = write(tmp_path / "run", config={"regenerate": "on_demand", "regenerate_options": "--model=tiny"})
    content = json.loads((folder / "results.json").read_text())
    made_by = {"made_by": [{"classes": 6, "settings": {"model": "0" * 16}}], "files": 2, "digest": "d", **generator}
    for phase in content["runs"][0]["phases"]:
        phase["copies"] = made_by
    report.write_json(folder / "results.json", content)
    text = " ".join(" ".join(page(folder).sections.values()).split())
    assert found in text
    assert absent not in text


def test_area_of_a_straight_line_over_log_bytes_is_its_middle():
    assert entries.area([(100, 10.0), (1000, 20.0), (10000, 30.0)]) == pytest.approx(20.0)
    assert entries.area([(100, 10.0), (10000, 30.0)]) == pytest.approx(20.0)
    assert entries.area([(100, 10.0), (100, 12.0)]) is None


def test_config_differences_leave_out_what_changes_no_number(page, tmp_path):
    one = write(tmp_path / "one", config={"lrate": 0.1, "output_dir": "x"})
    two = write(tmp_path / "two", config={"lrate": 0.05, "output_dir": "y"})
    text = page(one, two).sections["config"]
    assert re.search(r"lrate\s+0\.1\s+0\.05", text)
    assert "output_dir" not in text
    assert "model_name" not in text


def test_many_runs_and_runs_alike(page, tmp_path):
    folders = [
        write(tmp_path / f"run{i}", top1=70.0 + i, config={"model_name": "m" if i < 3 else f"m{i}"}) for i in range(30)
    ]
    found = page(*folders)
    assert "m29, real" in found.sections["phases"]
    assert "m, real: run1" in found.sections["phases"]
    assert found.open == []


def test_a_run_that_is_not_finished(page, tmp_path):
    assert "unfinished: 1 phase" in page(write(tmp_path / "half", done=1)).sections["runs"]
