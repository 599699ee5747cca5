"""The worked examples of docs/extending.md, run as they stand there, in a copy of the project.

A fenced block whose info string names a file ("python models/x.py") is that file's content, "append FILE" is added at
the file's end, and the lines of "sh" are run.  The blocks before the first section hold for all of them.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests import forks
from tests.conftest import long_but

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BEFORE = PAGE.partition("\n## ")[0]
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
BLOCK = re.compile(r"^```(.*?)\n(.*?)^```$", flags=re.M | re.S)
MOST_LINES = 30


def copy_project(target: Path) -> None:
    names = ("ControlNet", "compress", "convs", "models", "utils", "exps", "main.py", "torchvision_compat.py")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.pyc.*"))  # half written
        else:
            shutil.copy(ROOT / name, target / name)


def source_files(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    kept = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file.read_bytes() for name, file in kept.items() if not name.startswith(("data/", "outputs/"))}


def put(folder: Path, kind: str, file: str, text: str) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if kind == "append" else ""
    path.write_text(old + text, encoding="utf-8")


QUICK = ("A form", "A method")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(kind, file, text) of each block: a file's content, or commands ("sh") without a file."""
    return [(*info.partition(" ")[::2], text) for info, text in BLOCK.findall(page)]


def follow(page: str, folder: Path) -> set[str]:
    """Write the files of a part of the page and run its commands.  Returns the files."""
    files = [block for block in blocks(page) if block[0] != "sh"]
    for block in files:
        put(folder, *block)
    for command in [line for kind, _, text in blocks(page) if kind == "sh" for line in text.splitlines()]:
        python, *words = shlex.split(command)
        assert python == "python"
        done = forks.run(words, cwd=folder, env={"ESCORT_DATA_DIR": str(folder / "data")})
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return {file for _, file, _ in files}


def changed(folder: Path, before: dict[str, bytes]) -> set[str]:
    after = source_files(folder)
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@pytest.mark.parametrize("section", long_but(SECTIONS, *QUICK))
def test_example_runs_and_touches_only_the_files_that_it_names(section, tmp_path):
    copy_project(tmp_path)
    follow(BEFORE, tmp_path)
    before = source_files(tmp_path)
    text = SECTIONS[section]
    assert sum(text.count("\n") for kind, _, text in blocks(text) if kind != "sh") <= MOST_LINES
    assert any(kind == "sh" for kind, *_ in blocks(text))
    files = follow(text, tmp_path)
    assert changed(tmp_path, before) == files


@pytest.mark.long
def test_the_page_works_as_typed_in_one_folder(tmp_path):
    copy_project(tmp_path)
    before = source_files(tmp_path)
    files = follow(BEFORE, tmp_path).union(*(follow(section, tmp_path) for section in SECTIONS.values()))
    assert changed(tmp_path, before) == files
    assert len(list((tmp_path / "outputs").glob("*/results.json"))) == 5
