"""The page in a browser: no message on its console, nothing cut on a desktop and on a phone, names, print."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from exps.report import __main__ as command
from tests.test_page import of_form
from utils.results.output import confusion_file, write_confusion

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, which is not installed")
PROBE = """
<body style="margin: 0">
<iframe src="page.html" width="1280" height="3000"></iframe><iframe src="page.html" width="390" height="3000"></iframe>
<script>
window.onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, width = page.documentElement.clientWidth;
    page.querySelectorAll("details").forEach((each) => { each.open = true; });
    return {
      overflow: page.documentElement.scrollWidth - width,
      cut: [...page.querySelectorAll("table")].filter((t) => t.getBoundingClientRect().right > width).length,
      figures: [...page.querySelectorAll("svg[role=img]")].map((svg) => svg.querySelector("title")?.textContent ?? ""),
      matrix: Math.max(...[...page.querySelectorAll(".matrix tbody tr")].map((row) => row.offsetHeight)),
      pictures: [...page.querySelectorAll("img")].map((image) => image.alt),
    };
  });
  document.title = JSON.stringify(seen);
};
</script>
"""


def browse(folder, *words):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    flags += ["--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    return subprocess.run([BROWSER, *flags, *words], capture_output=True, text=True, check=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds page.html: a comparison of long names and unequal bytes, with a table for each confusion matrix."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [
        of_form(folder, form, top1, budget, p, nme=True)
        for budget in (1000, 16000)
        for form, top1, p in (("real", 60.0, 0.0), ("webp:10", 70.0, 0.4), ("codebook:12x3@40", 75.0, 0.4))
    ]
    for seed in (1, 2, 3):
        for classifier in ("cnn", "nme"):
            names = [f"c{i}" for i in range(6)]
            write_confusion(confusion_file(runs[0], seed, 2, classifier), np.eye(6), names)
    assert command.main([*map(str, runs), "--html", str(folder / "page.html")]) == 0
    return folder


def test_nothing_is_cut_and_every_figure_has_a_name(folder):
    (folder / "probe.html").write_text(PROBE)
    done = browse(folder, "--dump-dom", "--window-size=1700,3000", (folder / "probe.html").as_uri())
    desktop, phone = json.loads(re.search(r"<title>(\[.*?\])</title>", done.stdout)[1].replace("&amp;", "&"))
    assert (desktop["overflow"], phone["overflow"]) == (0, 0)
    assert (desktop["cut"], phone["cut"]) == (0, 0)
    assert max(desktop["matrix"], phone["matrix"]) < 30, "a class's name in a confusion matrix takes one line"
    assert len(phone["figures"]) == 5, "accuracy against bytes, and over phases at two budgets by two classifiers"
    assert all(phone["figures"] + phone["pictures"])
    assert "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.long
def test_it_can_be_printed(folder):
    browse(folder, f"--print-to-pdf={folder / 'page.pdf'}", (folder / "page.html").as_uri())
    pdf = (folder / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
