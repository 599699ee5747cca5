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
from tests.folders import make_dataset

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("section", long_but(SECTIONS, *QUICK))
def test_example_runs_and_touches_only_the_files_that_it_names(section, tmp_path):
    copy_project(tmp_path)
    make_dataset(tmp_path / "data", ("apple", "pear", "plum", "fig"), train=6, test=2)
    for info, text in BLOCK.findall(PAGE.partition("\n## ")[0]):
        put(tmp_path, *info.split(), text)
    before = source_files(tmp_path)
    blocks = [(*info.partition(" ")[::2], text) for info, text in BLOCK.findall(SECTIONS[section])]
    files = [block for block in blocks if block[0] != "sh"]
    commands = [line for kind, _, text in blocks if kind == "sh" for line in text.splitlines()]
    assert sum(text.count("\n") for *_, text in files) <= MOST_LINES
    assert commands
    for block in files:
        put(tmp_path, *block)
    for command in commands:
        python, *words = shlex.split(command)
        assert python == "python"
        done = forks.run(words, cwd=tmp_path, env={"ESCORT_DATA_DIR": str(tmp_path / "data")})
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    after = source_files(tmp_path)
    touched = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert touched == {file for _, file, _ in files}
