"""The HTML page: what it holds, that nothing comes from elsewhere, and its statistics against independent ones."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from exps.report import __main__ as report
from exps.report import entries, figures
from exps.report import page as page_module
from tests.shapes import make_shapes
from tests.test_report import write
from utils.files import write_json
from utils.results.output import confusion_file, write_confusion
from utils.results.records import ResultsFile, load_results, read_results

VOID = {"meta", "link", "br", "img", "path", "use", "rect", "stop"}


class Page(HTMLParser):
    """What a browser would see: text by heading, ids, addresses, and whether tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags, self.sections = [], [], [], set(), {}
        self.heading, self.text = "", text
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


def rewrite(folder, content):
    """results.json with other class orders, and what follows from them."""
    write_json(folder / "results.json", content)
    read = read_results(folder / "results.json")
    write_json(folder / "results.json", ResultsFile.of(read.config, read.runs).to_json())


def in_bytes(form, budget):
    synthetic = {"syn_form": form, "syn_per_class": "fill"} if form != "real" else {"syn_per_class": 0}
    return {"budget_in": "bytes", "memory_bytes_per_class": budget, **synthetic}


def test_self_contained_and_safe_for_any_name(page, tmp_path):
    name = "a$x$<b>&\"'é"
    found = page(write(tmp_path / name, seeds=(1, 2)), write(tmp_path / "other", top1=80.0, nme=True))
    assert found.open == []
    assert found.tags.isdisjoint({"script", "b", "iframe"})
    assert not any("//" in address or ":" in address.removeprefix("data:") for address in found.addresses)
    assert len(found.ids) == len(set(found.ids))
    assert {"#" + i for i in found.ids} >= {a for a in found.addresses if a.startswith("#")}
    for section in ("runs", "cost", "forgetting", "details"):
        assert name in found.sections[section]
    assert "nearest means" in found.sections["runs"]


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
            rewrite(folder, content)
            folders.append(folder)
    found = page(*folders)
    text = found.sections["runs"]
    for budget in (1000, 4000):
        webp, real = ([scores[form, budget, seed] for seed in (1, 2, 3)] for form in ("webp:10", "real"))
        differences = np.subtract(webp, real)
        said = f"{np.mean(webp):.1f} ± {np.std(webp, ddof=1):.1f} real "
        said += f"{differences.mean():+.1f} ({stats.sem(differences):.1f})"
        assert said in " ".join(text.split()), text
        best = "webp:10" if np.mean(webp) > np.mean(real) else "real"
        assert f"at {budget:,} bytes per class, by the head: {best} is best with" in found.sections[""]
    # over two budgets, the area is the mean of both ends
    means = [np.mean([scores["webp:10", budget, seed] for budget in (1000, 4000) for seed in (1, 2, 3)])]
    assert re.search(rf"webp:10\s+m\s+{means[0]:.1f} \(", found.sections["area"])
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
    write_json(folder / "results.json", content)
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
    assert re.search(r"lrate: 2 values\s+one\s+0\.1\s+two\s+0\.05", text)
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


def of_form(tmp_path, form, top1, budget=1000, p=0.0, seeds=(1, 2, 3), **more):
    config = {**in_bytes(form, budget), "augmentation_prob": p}
    return write(tmp_path / f"{form.replace(':', '')}-{p:g}-{budget}", top1=top1, seeds=seeds, config=config, **more)


def test_the_best_of_a_column_is_bold_and_named_on_top(page, tmp_path):
    found = page(
        of_form(tmp_path, "real", 60.0, nme=True),
        of_form(tmp_path, "webp:10", 70.0, nme=True),
        of_form(tmp_path, "edges", 75.0, p=0.4, nme=True),
        of_form(tmp_path, "edges", 65.0, nme=True),
    )
    rows = [line for line in found.text.split("<tr") if "edges, p = 0.4</th>" in line.replace(" </th>", "</th>")]
    assert any("<strong>67.0 ± 1.0</strong>" in row for row in rows), "head"
    top = found.sections[""]
    lead = "+15.0 (0.0) over real exemplars; +5.0 (0.0) over the next, webp:10"
    assert f"by the head: edges, p = 0.4 is best with 67.0 %; {lead}" in top
    assert "by the nearest means of exemplars: edges, p = 0.4 is best with 62.0 %" in top
    assert "uses 206 of 1,000 bytes" in found.sections["runs"], "1,234 bytes of six classes"


def test_every_class_unfolds_with_all_its_copies(page, tmp_path):
    make_shapes(tmp_path / "data", train=2, test=1, copies=3)
    where = {"dataset": "Shapes", "data_dir": str(tmp_path / "data"), "syn_form": "edges", "syn_per_class": 2}
    found = page(write(tmp_path / "run", config=where))
    assert found.text.count('alt="red square: edges, copy') == 3
    assert found.text.count('alt="blue disc: edges, copy') == 4, "the first classes' first copies are in view, too"
    assert "<summary>red square, all copies</summary>" in found.text


def test_one_class_order_has_no_spread(page, tmp_path):
    found = page(of_form(tmp_path, "real", 60.0, seeds=(1,)), of_form(tmp_path, "webp:10", 70.0, seeds=(1,)))
    assert "± 0.0" not in found.text
    assert "one class order, so no standard error" in found.sections[""]
    assert "n = 1: with one class order" in found.sections["runs"]


def test_rows_of_unequal_bytes_are_no_winners(page, tmp_path):
    small, large = write(tmp_path / "small", top1=60.0), write(tmp_path / "large", top1=90.0)
    content = json.loads((large / "results.json").read_text())
    for run in content["runs"]:
        run["memory"]["bytes_total"] = 5000
    rewrite(large, content)
    found = page(small, large, write(tmp_path / "other", top1=50.0))
    assert "not comparable: real has 206 bytes" in found.sections["runs"]
    assert "is best with 51.0 %" in found.sections[""]


def test_a_form_has_one_colour_and_all_panels_one_range(tmp_path):
    folders = {}
    for number, form in enumerate(("real", "webp:10", "text")):
        for budget in (1000, 4000) if form != "webp:10" else (4000,):
            folders[f"{form}-{budget}"] = of_form(tmp_path, form, 50.0 + 10 * number, budget, nme=True)
    runs = {name: (folder, load_results(folder)) for name, folder in folders.items()}
    of = entries.entries(runs)
    looks = figures.Looks(list(entries.lines(of)))
    panels = page_module.phase_figures(of, looks)
    colours = {form: looks.look("m (CNN)", form).colour for form in ("real", "webp:10", "text")}
    assert len(set(colours.values())) == 3
    for title, svg in panels:
        forms = ["real", "text"] if "1,000" in title else ["real", "webp:10", "text"]
        drawn = {colour for colour in colours.values() if colour in svg}
        assert drawn == {colours[form] for form in forms}, title
    ticks = [re.findall(r'text-anchor="end">(\d+)</text>', svg) for _, svg in panels]
    assert len(panels) == 4
    assert all(tick == ticks[0] and len(tick) > 2 for tick in ticks)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ground", ["#ffffff", "#14191f"])
def test_lines_have_contrast_on_light_and_dark_ground(ground):
    for colour in figures.COLOURS:
        light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


def test_figures_and_tables_have_names_and_forgetting_whole_labels(page, tmp_path):
    long = "text, syn_per_class=9, with a long name that goes on"
    found = page(write(tmp_path / f"{long} a", nme=True), write(tmp_path / f"{long} b", nme=True))
    assert found.text.count('<svg role="img"') == found.text.count('<title id="') > 0
    assert "<th>" not in found.text
    assert found.text.count("<caption>") >= 4
    words = " ".join(found.sections["forgetting"].split())
    for name in "ab":
        for classifier in ("head", "nearest means"):
            assert f"{name}: real, {classifier}" in words.replace("on a:", "a:").replace("on b:", "b:")


def test_each_run_has_its_classes_and_links_to_its_files(page, tmp_path):
    folder = write(tmp_path / "one", nme=True)
    (folder / "phases.csv").write_text("x")
    (folder / "seed1").mkdir()
    for classifier, matrix in (("cnn", np.eye(6)), ("nme", np.eye(6)[::-1])):
        write_confusion(confusion_file(folder, 1, 2, classifier), matrix, [f"c{i}" for i in range(6)])
    found = page(folder, write(tmp_path / "two"))
    assert "one/phases.csv" in found.addresses
    assert re.search(r"c5\s+71\.0\s+66\.0", found.sections["details"]), "each class, head and nearest means"
    assert 'title="true c1, predicted c1: 100 %"' in found.text, "the head's"
    assert 'title="true c1, predicted c4: 100 %"' in found.text, "that of nearest means"


def test_the_foot_says_how_the_page_was_made(page, tmp_path):
    text = " ".join(page(write(tmp_path / "one")).text.split())
    foot = text[text.index("<footer>") :]
    for what in ("results of: 20", "version: 0.", "commit: ", "machine: ", "command: python"):
        assert what in foot
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
