# make env | demo | test | test-long | test-gpu | lint | bench | tiny-model | clean
# Python 3.11, 3.12 or 3.13: the first of these commands that runs one.  PYTHON=... names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SEEDS  ?= 1993

.PHONY: env demo test test-long test-gpu lint bench tiny-model clean

env: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 on the PATH; make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(STAMP)

demo: env
	SEEDS="$(SEEDS)" $(BIN)/python -m exps.demo

test: env lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

# All but what needs gigabytes or minutes: every method against PyCIL's figures, learning, several processes, kills.
test-long:
	ESCORT_LONG=1 $(MAKE) test

# What only a CUDA device can show.
test-gpu: env
	ESCORT_LONG=1 $(BIN)/python -m pytest -m gpu

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PYCIL=DIR, a checkout of github.com/LAMDA-CL/PyCIL, adds the comparison with it.
bench: env
	@for benchmark in $(filter-out %bench_pycil.py %bench_patch_autoencoder.py,$(wildcard tests/bench/bench_*.py)); do \
		$(BIN)/python $$benchmark || exit 1; done
	$(if $(PYCIL),$(BIN)/python tests/bench/bench_pycil.py $(PYCIL))

# Trains the bundled model again from nothing (about an hour on 2 cores), into ControlNet/models/cldm_tiny.safetensors.
tiny-model: env
	$(BIN)/python -m utils.curate digits --data-dir data
	$(BIN)/python ControlNet/train.py ControlNet/models/cldm_tiny_train.yaml
	$(BIN)/python tests/bench/bench_tiny_model.py

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .mypy_cache
