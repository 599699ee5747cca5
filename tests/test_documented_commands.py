"""Every command that README and docs show is one that its program takes: options, config keys and files are checked.

A command goes to its own parser, in this process, and stops there: most take minutes to days.  A config is read and
checked with the keys that the command gives it.  `RUN` has the pages whose commands a test runs to the end; `NOT_OURS`
the programs that are not called, and why.  tests/test_photographs.py runs README's commands for one's own photographs.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import main
from compress import options
from models import catalogue
from tests.test_extending import SECTIONS
from utils.config.read import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "exps" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
STARTS = ("python", "make", "torchrun", "srun", "sbatch", "pip", "hf", "docker", "escort", "git", "ESCORT_", "SEEDS")

NOT_OURS = {
    "pip": "installs packages",
    "hf": "Hugging Face's own command, which downloads gigabytes",
    "docker": "builds and starts an image: needs a Docker daemon",
    "git": "fetches a repository",
}
LAUNCHERS = {"torchrun", "srun", "sbatch", "nice"}
"""What starts one of our commands: their own options are theirs."""

RUN = {
    "docs/extending.md": "tests/test_extending.py runs each command to the end, in a copy of the project",
}
"""Pages whose commands are run, not only parsed."""

BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", flags=re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def lines_of(block: str) -> list[str]:
    """Commands of a block: a line each, continued after a backslash or within quotation marks."""
    lines, waiting = [], ""
    for line in block.replace("\\\n", " ").splitlines():
        waiting = f"{waiting}\n{line}" if waiting else line.strip()
        try:
            shlex.split(waiting, comments=True)
        except ValueError:  # an open quotation mark
            continue
        lines.append(waiting)
        waiting = ""
    return lines


def commands() -> list[tuple[str, str]]:
    """(page, command) of all pages, from their blocks and from what stands in backticks within text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for _, info, body in BLOCK.findall(text) if info in ("", "sh", "bash") for line in lines_of(body)]
        lines += [" ".join(span.split()) for span in SPAN.findall(BLOCK.sub("", text))]
        found += [(page.relative_to(ROOT).as_posix(), line) for line in lines if is_command(line)]
    return list(dict.fromkeys(found))


def is_command(line: str) -> bool:
    first, _, rest = line.partition(" ")
    return bool(rest) and first.rstrip("0123456789.").startswith(STARTS) and not line.startswith(("make up", "make it"))


class Parsed(BaseException):
    """The arguments are right."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """End a command by `Parsed` once its arguments are right, or by AssertionError."""

    def then_stop(parse):
        def parse_and_stop(parser, args=None, namespace=None):
            parse(parser, args, namespace)
            raise Parsed

        return parse_and_stop

    def refuse(parser, message):
        raise AssertionError(f"{parser.prog}: {message}")

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, then_stop(getattr(argparse.ArgumentParser, name)))
    for parser in (argparse.ArgumentParser, options._Parser):
        monkeypatch.setattr(parser, "error", refuse)


def words_of(command: str) -> list[str]:
    """Without comments, variables in front, launchers, and what stands for more of the same."""
    command = re.sub(r"\s\[(--[^\]]*)\]", r" \1", command)  # an option that may be left out
    command = command.replace("--config ...", "--config FILE")
    words = shlex.split(command, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("|", "&&", ">", ">>", ";")), len(words))]
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0], flags=re.S):
        del words[0]
    if words and words[0] in LAUNCHERS:
        starts = [i for i, word in enumerate(words) if word == "python" or word.endswith(".py") or word == "-m"]
        words = words[starts[0] :] if starts else []
        words = words if words[:1] in (["python"], []) else ["python", *words]
    return [{"N": "1", "N,M": "1,2"}.get(word, word) for word in words if word not in ("...", "…", "*")]


def is_any(file: str) -> bool:
    """Whether a page's FILE, CONFIG or exps/NAME.json stands for any."""
    return Path(file).stem.isupper() or file == "..."


ALL = commands()
METHODS, BACKBONES = catalogue.methods(), catalogue.backbones()


def test_there_are_commands():
    assert len(ALL) > 60
    assert {page for page, _ in ALL} > {"README.md", "docs/experiment.md", "docs/results.md", "exps/README.md"}


@pytest.mark.parametrize(("page", "command"), ALL, ids=lambda text: text[:60])
def test_a_command_is_one_that_its_program_takes(page, command, stop_after_parsing, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = words_of(command) or ["git"]
    if program.rstrip("0123456789.") in NOT_OURS:
        return
    if page in RUN:
        assert SECTIONS, RUN[page]
        return
    try:
        check(program, arguments, page, monkeypatch)
    except AssertionError as error:  # a page may name a command, or show a part of it, in the middle of a sentence
        if "arguments are required" not in str(error) or not (is_span(page, command) or "..." in command):
            raise


def is_span(page: str, command: str) -> bool:
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return command in {" ".join(span.split()) for span in SPAN.findall(text)}


def check(program: str, arguments: list[str], page: str, monkeypatch) -> None:
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "pytest" or arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
    elif program.startswith("escort"):
        check_script({"escort": "main.py", "escort-compress": "compress/run.py"}[program], arguments, monkeypatch)
    elif arguments[0] == "-c":
        compile(arguments[1], page, "exec")
    elif arguments[0] == "-m":
        check_module(arguments[1], arguments[2:], monkeypatch)
    elif arguments[0] != "tests/bench/...":
        check_script(arguments[0], arguments[1:], monkeypatch)


def check_script(script: str, arguments: list[str], monkeypatch) -> None:
    assert (ROOT / script).is_file(), script
    if script == "main.py":
        check_main(arguments)
    elif script == "compress/run.py":
        with pytest.raises(Parsed):
            options.parser().parse_args(arguments)
    elif script == "ControlNet/train.py":
        check_training(arguments)
    elif arguments:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def check_training(arguments: list[str]) -> None:
    """Its keys are those of its config."""
    if not is_any(arguments[0]):
        known = {"teacher", *OmegaConf.load(ROOT / arguments[0])}
        assert {override.partition("=")[0] for override in arguments[1:]} <= known


def check_main(arguments: list[str]) -> None:
    with pytest.raises(Parsed):
        main.command(arguments)
    if "--config" in arguments and arguments[-1] != "--config":
        at = arguments.index("--config")
        overrides = [word for word in (*arguments[:at], *arguments[at + 2 :]) if "=" in word.strip("[]")]
        if not is_any(arguments[at + 1]):
            overrides = [word for word in overrides if not word.startswith("[key")]
            load_config(ROOT / arguments[at + 1], overrides, methods=METHODS, backbones=BACKBONES)


def check_module(module: str, arguments: list[str], monkeypatch) -> None:
    assert importlib.util.find_spec(module), f"no module {module}"
    files = [word for word in arguments if re.fullmatch(r"(exps|ControlNet|tests)/[\w/-]+\.\w+", word)]
    assert all((ROOT / file).exists() for file in files if not is_any(file)), files
    if arguments and module != "models.catalogue":
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
