"""Methods and their settings read from source: what a new method file needs, and that torch stays out."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from models import catalogue
from tests.little_config import write_config
from tests.methods import METHODS
from tests.shapes import make_shapes
from utils.config.read import load_config
from utils.config.schema import as_dict
from utils.config.show import help_text
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
METHOD = '''
"""A method in a file of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import a_module_that_is_not_there
from utils.config.schema import Config, setting
from utils.config.types import Positive


@dataclass
class Settings:
    heat: Positive = setting(2.0, "how hot it is", source="its paper", also=["temperature"])
    way: Literal["up", "down"] = setting("up", "where it goes")

    def check(self, config: Config) -> Iterator[str]:
        if self.way == "down" and config.epochs > 5:
            yield "way: down needs at most 5 epochs"


class Own(a_module_that_is_not_there.Base, name="own"):
    uses_memory = False


class Child(Own, name="child"):
    least_exemplars = 3
'''


@pytest.fixture
def load(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own.py").write_text(textwrap.dedent(METHOD))
    methods = catalogue.methods(tmp_path / "models")
    (tmp_path / "c.json").write_text(
        '{"dataset": "D", "init_cls": 2, "increment": 2, "model_name": "own", "convnet_type": "resnet8", "epochs": 9}'
    )

    def call(*overrides):
        return load_config(tmp_path / "c.json", overrides, methods=methods, backbones=["resnet8"])

    call.methods = methods
    return call


def test_a_methods_own_keys(load):
    assert load().settings.heat == 2
    assert load("temperature=3").settings.heat == 3
    assert as_dict(load("heat=1"))["heat"] == 1
    assert "how hot it is [its paper]" in help_text(load.methods, ["resnet8"])
    for override, words in (
        ("heat=0", "heat must be greater than 0"),
        ("way=left", "way must be 'up' or 'down'"),
        ("way=down", "way=down: way: down needs at most 5 epochs"),
        ("heet=3", "did you mean 'heat'"),
    ):
        with pytest.raises(UserError, match=words):
            load(override)


def test_what_a_class_says(load):
    own, child = load.methods["own"], load.methods["child"]
    assert (own.uses_memory, own.least_exemplars) == (False, 1)
    assert (child.uses_memory, child.least_exemplars) == (False, 3)
    assert child.settings is own.settings


def test_what_a_class_says_must_be_a_literal(tmp_path):
    (tmp_path / "own.py").write_text('class Own(Method, name="own"):\n    least_exemplars = 1 + 1\n')
    with pytest.raises(UserError, match=r"own\.py, line 2: least_exemplars must be a literal"):
        catalogue.methods(tmp_path)


def test_the_catalogue_is_what_the_classes_say():
    files = {file.stem for file in (ROOT / "exps").glob("*.json") if not file.stem.startswith(("pareto", "compare"))}
    assert set(catalogue.methods()) == files - {"config", "cifar10", "demo", "photographs"}
    for name, info in catalogue.methods().items():
        assert (METHODS[name].name, METHODS[name].uses_memory) == (name, info.uses_memory)
        assert METHODS[name].least_exemplars == info.least_exemplars


def test_a_key_of_another_method_is_checked_and_noted():
    options = {"methods": catalogue.methods(), "backbones": catalogue.backbones()}
    config = load_config(ROOT / "exps" / "icarl.json", ["ewc_lambda=5", "train_base=true"], **options)
    assert "ewc_lambda is no key of icarl; it changes nothing" in config.notes
    assert any("train_base is PyCIL's and changes nothing here" in note for note in config.notes)
    assert "ewc_lambda" not in as_dict(config)
    with pytest.raises(UserError, match="ewc_lambda must be greater than or equal to 0, not -1"):
        load_config(ROOT / "exps" / "icarl.json", ["ewc_lambda=-1"], **options)
    with pytest.raises(UserError, match="train_base can only be true here"):
        load_config(ROOT / "exps" / "icarl.json", ["train_base=false"], **options)


def test_the_config_s_code_names_no_method():
    for file in (ROOT / "utils" / "config").glob("*.py"):
        words = set(re.findall(r"[a-z_]+", file.read_text().lower()))
        assert not words & (set(catalogue.methods()) - {"pass"}), file  # Python's own word


HEAVY = ("torch", "transformers", "scipy", "torchmetrics", "matplotlib")


LIGHT = [
    ("main", ["--help"]),
    ("main", ["--help-config"]),
    ("main", ["--list", "backbones"]),
    ("main", ["--config", "exps/der.json", "epochz=3"]),
    ("main", ["--config", "exps/der.json", "--show-config"]),
    ("exps.report.__main__", ["--help"]),
    ("exps.report.gallery", ["--help"]),
    ("exps.compare", ["--help"]),
    ("utils.curate.command", ["--help"]),
    ("compress.run", ["--help"]),
]


def test_commands_that_answer_without_torch():
    script = f"""
import importlib, sys
for module, arguments in {LIGHT}:
    try:
        importlib.import_module(module).main(arguments)
    except SystemExit:
        pass
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, (module, arguments, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_file_system_tells_is_answered_without_torch(tmp_path):
    make_shapes(tmp_path / "data", train=2, test=1, copies=0)
    out, taken = tmp_path / "out", tmp_path / "taken"
    values = {"dataset": "Shapes", "data_dir": str(tmp_path / "data"), "output_dir": str(out), "init_cls": 2}
    values |= {"increment": 2, "model_name": "icarl", "convnet_type": "resnet8", "memory_per_class": 2}
    (tmp_path / "c.json").write_text(json.dumps(values))
    (taken / "seed1993" / "checkpoints").mkdir(parents=True)
    (taken / "seed1993" / "checkpoints" / "phase00.pt").touch()
    (taken / "config.json").write_text(json.dumps({**values, "real_per_class": 2, "batch_size": 7}))
    cases = {
        "dataset=Shaeps": "Did you mean 'Shapes'?",
        "init_cls=7": "choose 1 to 6",
        "class_order=[a,b]": "'a' is no label",
        f"output_dir={tmp_path / 'c.json'}": "c.json is not a folder",
        f"phase0_cache={tmp_path / 'c.json'}": "c.json is not a folder",
        f"output_dir={taken}": "holds another experiment (batch_size: 7 -> 128)",
        "real_per_class=0 syn_per_class=49": "over the memory budget of a class: 0 real + 49 edges x 1/24 = 2.04 units",
        "fixed_memory=false memory_size=5": "memory_size = 5",
        "budget_in=bytes memory_bytes_per_class=900 syn_form=webp:50 real_per_class=0 syn_per_class=4": "4 webp:50 x ",
        "budget_in=bytes memory_bytes_per_class=9 syn_form=edges real_per_class=0 syn_per_class=1": "1 edges x ",
        "real_per_class=1 syn_per_class=1 augmentations_per_image=3": "36 of 36 copies are missing, the first is ",
        "regenerate_options=--steps\\ 0 syn_per_class=1": "--steps",
    }
    script = "import shlex, sys, main\nfor case in sys.argv[2:]:\n"
    script += "    assert main.main(['--config', sys.argv[1], *shlex.split(case)]) == 2\n"
    script += f"print([name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", script, str(tmp_path / "c.json"), *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, words in zip(errors, cases.values(), strict=True):
        assert words in line
    assert not out.exists()


@pytest.mark.long
def test_a_training_imports_no_more_than_it_needs(tmp_path):
    make_shapes(tmp_path / "data", train=2, test=1, copies=0)
    file = write_config(tmp_path / "data", tmp_path / "out", init_cls=3, increment=3, model_name="finetune")
    script = f"import sys, main\nassert main.main(['--config', {str(file)!r}]) == 0\n"
    script += "print([name for name in ('transformers', 'scipy', 'torchmetrics') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
