"""Tables, plots and galleries from results on disk."""

import io
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from exps.report import __main__ as report
from exps.report import gallery, tables
from tests.shapes import make_shapes
from utils.config.schema import Config
from utils.files import write_json
from utils.results.output import Output
from utils.results.records import ClassOrder, Phase, ResultsFile, load_results


def metrics(top1, names):
    """A classifier's part of a phase's record: as good on every class."""
    seen = len(names)
    return {
        **{"top1": top1, "top5": 100.0, "old": top1 if seen > 2 else None, "new": top1, "per_class": [top1] * seen},
        **{"per_phase": [top1] * (seen // 2), "per_ten": [top1], "confusion": np.eye(seen).tolist()},
    }


def write(folder: Path, seeds=(1,), phases=3, done=3, nme=False, student=False, top1=90.0, config=None):
    """An output folder whose class orders have `done` of `phases` phases of two classes."""
    names = [f"c{i}" for i in range(2 * phases)]
    entries = []
    for seed in seeds:
        records = []
        for phase in range(done):
            accuracy = top1 - 10 * phase + seed
            record = {"phase": phase, "classes_seen": 2 * phase + 2, "cnn": metrics(accuracy, names[: 2 * phase + 2])}
            record["nme"] = metrics(accuracy - 5, names[: 2 * phase + 2]) if nme else None
            if student and phase:
                record["student"] = metrics(accuracy - 1, names[: 2 * phase + 2])
            record |= {"memory": {"units_total": 4.0, "bytes_total": 1234}, "parameters": 5, "copies_on_demand": None}
            record["training"] = {"seconds": 1.0, "reused": False, "loss": 0.5, "accuracy": 99.0}
            records.append({**record, "seconds": {"total": 2.0, "train": 1.0}})
        entries.append(ClassOrder.of(seed, names, [Phase.from_state(record, names) for record in records], phases))
    described = {"dataset": "D", "model_name": "m", "convnet_type": "r", **(config or {})}
    write_json(folder / "results.json", ResultsFile.of(described, entries).to_json())
    return folder


@pytest.fixture
def command(capsys):
    def call(*arguments):
        code = report.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_runs_of_the_same_name_are_all_shown(command, tmp_path):
    a, b = write(tmp_path / "a" / "outputs"), write(tmp_path / "b" / "outputs", top1=80.0)
    odd = write(tmp_path / "lr=0.1")
    code, table, _ = command(a, b, odd, f"mine={a}", f"mine={b}")
    assert code == 0
    names = [line.split("  ")[0] for line in table.split("\n\n")[0].splitlines()[2:]]
    assert names == ["a/outputs", "b/outputs", "lr=0.1", "mine", "mine (2)"]


def test_unfinished_runs_as_far_as_they_are(command, tmp_path):
    half = write(tmp_path / "half", done=2)
    code, table, _ = command(half, write(tmp_path / "whole"))
    assert code == 0
    (row,) = [line for line in table.split("\n\n")[0].splitlines() if line.startswith("half")]
    assert "half, unfinished: 2 phases" in row
    assert row.split()[-2:] == ["-", "86.0"] or "86.0" in row
    write_json(tmp_path / "none" / "results.json", {"config": {}, "runs": [], "summary": None})
    code, _, said = command(half, tmp_path / "none")
    assert code == 2
    assert "no finished phase" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "not valid JSON: line 1"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no results.json"),
        ('{"config": {}}', "runs: Field required"),
        ('{"config": {}, "runs": {}}', "runs: "),
        ('{"config": {}, "runs": [{}]}', "runs.0.cnn: Field required"),
        ('{"config": {}, "runs": [], "runs": []}', "runs is given 2 times"),
        (b"\xff", "not in UTF-8"),
        (None, "can't be read"),
    ],
)
def test_files_that_are_no_results(command, tmp_path, content, words):
    file = tmp_path / "results.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, said = command(tmp_path)
    assert code == 2
    assert words in said
    assert str(file) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("path", ["cnn", "memory", "phases", "phases.0.cnn", "phases.0.memory", "phases.0.seconds"])
def test_results_without_a_part(command, tmp_path, path):
    write(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    *above, last = path.split(".")
    part = content["runs"][0]
    for key in above:
        part = part[int(key) if key.isdecimal() else key]
    del part[last]
    (tmp_path / "results.json").write_text(json.dumps(content))
    code, _, said = command(tmp_path)
    assert code == 2
    assert f"runs.0.{path}: Field required" in said


def test_class_orders_of_different_lengths(command, tmp_path):
    write(tmp_path / "a", phases=3)
    write(tmp_path / "b", phases=2, done=2, seeds=[2])
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    one["runs"] += other["runs"]
    (tmp_path / "a" / "results.json").write_text(json.dumps(one))
    code, _, said = command(tmp_path / "a")
    assert code == 2
    assert "different numbers of phases" in said


def test_what_the_spread_is(command, tmp_path):
    one, three = write(tmp_path / "one"), write(tmp_path / "three", seeds=(1, 2, 3))
    words = "mean ± standard deviation over class orders"
    assert words not in command(one)[1]
    code, table, _ = command(one, three)
    assert (code, table.rstrip().splitlines()[-1]) == (0, words)
    assert f"{82:.1f} ± {1:.1f}" in table  # of 81, 82, 83


def test_every_classifier_has_a_line(command, tmp_path):
    _, table, _ = command(write(tmp_path / "run", nme=True, student=True))
    for name in ("run (CNN)", "run (NME)", "run (student)"):
        assert name in table
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["summary"]["student"]["top1"]["mean"] == pytest.approx([91, 80, 70])


class Terminal(io.StringIO):
    """One that keeps what is written to it, escapes too."""

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_on_terminals_of_any_width_and_in_a_file(tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    names = ("[red]odd[/red]", "\x1b[2J", "ä" * 50)
    runs = {name: (tmp_path, load_results(write(tmp_path / f"{n}", (1, 2, 3), 10, 10))) for n, name in enumerate(names)}
    terminal, file = Terminal(), io.StringIO()
    tables.show(runs, terminal)
    tables.show(runs, file)
    assert "\x1b[2J" not in terminal.getvalue(), "a name does not clear the screen"
    text, plain = re.sub(r"\x1b\[\d*m", "", terminal.getvalue()), file.getvalue()
    assert "\x1b" not in text + plain
    assert max(map(len, text.splitlines())) <= width
    for word in ("average", "forgetting", "units", "bytes", "seconds", "[red]odd[/red]", r"\x1b[2J", "92.0±1.0"):
        assert word in text
        assert word in plain
    assert "transfer" not in text, "minus the forgetting says nothing new"
    assert text.count("ä") % 50 == 0
    assert text.count("±") >= plain.count("±") - 1, "nothing is cut"
    rows = plain.splitlines()
    assert [row.split("  ")[0] for row in rows[2:5]] == ["[red]odd[/red]", r"\x1b[2J", "ä" * 50]


def test_a_plot_of_many_runs_with_odd_names(tmp_path):
    runs = {f"$x_$ {n}": (tmp_path, load_results(write(tmp_path / f"{n}"))) for n in range(18)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gallery.plot(runs, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 1000


def test_every_run_is_in_the_legend(tmp_path, monkeypatch):
    """matplotlib leaves out labels that begin with an underscore."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **o: (drawn.append(figure), save(figure, *a, **o))[1])
    gallery.plot(
        {name: (tmp_path, load_results(write(tmp_path / name))) for name in ("_a", "b")}, tmp_path / "plot.png"
    )
    assert [text.get_text().strip()[:2] for text in drawn[0].axes[0].get_legend().get_texts()] == ["_a", "b:"]


@pytest.fixture
def shapes(tmp_path):
    return make_shapes(tmp_path / "data", train=1, test=1, copies=2, name="Shapes")


def draw(paths, file, *options):
    return gallery.main(["--data-dir", str(paths.data_dir), "--dataset", "shapes", *options, str(file)])


def test_a_gallery_shows_what_there_is(shapes, tmp_path, capsys):
    (shapes.folder("train") / "red disc").rename(shapes.folder("train") / "$x_$")
    (shapes.folder("kept") / "red disc").rename(shapes.folder("kept") / "$x_$")
    sizes = []
    for copies in ("0", "1", "2", "5"):
        assert draw(shapes, tmp_path / "g.png", "--copies", copies) == 0
        sizes.append(Image.open(tmp_path / "g.png").size[0])
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3], "no columns for copies that are not there"
    for copy in shapes.folder("copies").rglob("*.jpg"):
        copy.unlink()
    assert draw(shapes, tmp_path / "g.png") == 2
    assert "no copies yet" in capsys.readouterr().err
    assert draw(shapes, tmp_path / "g.png", "--copies", "-1") == 2
    assert "'-1' is not a whole number of at least 0" in capsys.readouterr().err


def test_the_page_is_drawn_once(tmp_path):
    """When the last class order of a run is finished, whichever it is."""
    drawn = []
    config = Config(dataset="D", init_cls=2, increment=2, model_name="der", convnet_type="resnet8", seed=[1, 2])
    output = Output(config, tmp_path, drawn.append)
    for seed, phases, expected in ((2, 1, []), (2, 2, []), (1, 1, []), (1, 2, [tmp_path])):
        (order,) = load_results(write(tmp_path / "made", [seed], phases=2, done=phases)).runs
        output.write(order)
        assert drawn == expected
