"""Every method against PyCIL's figures, step by step (`pycil_parity` says how)."""

from pathlib import Path

import numpy as np
import pytest

from tests import pycil_parity
from tests.conftest import long_but
from tests.methods import METHODS
from tests.pycil_reference import Pictures, Reference, runs_of

FOLDER = Path(__file__).parent / "reference"
FILES = [FOLDER / "pycil_steps.npz", FOLDER / "pycil_steps_more.npz"]


ARRAYS = {name: array for file in FILES for name, array in np.load(file).items()}


@pytest.fixture(scope="module")
def arrays():
    return ARRAYS


@pytest.fixture(scope="module")
def pictures(arrays, tmp_path_factory):
    return Pictures.write(arrays, tmp_path_factory.mktemp("pictures"))


RUNS = [name for name in runs_of(ARRAYS) if Reference(ARRAYS, name).method in METHODS]


QUICK = ("icarl", 2)  # phases, of which the second has exemplars and a teacher


@pytest.mark.parametrize(("name", "nb_phases"), long_but([QUICK, *((name, None) for name in RUNS)], QUICK))
def test_every_step_is_pycil_s(name, nb_phases, arrays, pictures):
    row = pycil_parity.compare(arrays, name, pictures, nb_phases)
    assert row.agrees, f"{row.first}; {row.differences}, exemplars {row.exemplars}"
    assert {"loss", "grad_norm", "logits"} <= set(row.differences)


@pytest.mark.long
def test_a_method_that_differs_is_reported(monkeypatch, capsys):
    monkeypatch.setattr("models.fetril.F.normalize", lambda rows: rows)
    monkeypatch.setattr(pycil_parity, "METHODS", {"fetril": pycil_parity.METHODS["fetril"]})
    assert pycil_parity.main([*map(str, FILES), "--methods", "fetril,acil"]) == 1
    said = capsys.readouterr().out
    assert "DIFFERS: phase 2: " in said
    assert "not in the project" in said
    assert pycil_parity.main([*map(str, FILES), "--methods", "nothing"]) == 2
