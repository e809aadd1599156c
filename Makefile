# demo: the whole flow on a tiny model; test, check: what .ci/run runs; lab: notebooks in Jupyter lab; clean: removes what this made.
# Each makes .venv first where it is missing or older than requirements.txt.

FITS := import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3 python; do \
	$$python -c "$(FITS)" 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lab clean

demo: $(READY)
	$(BIN)/minitron flow $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m nemo_minitron.compose
	$(BIN)/python notebooks/check.py

lab: $(BIN)/jupyter-lab
	$(BIN)/jupyter-lab --allow-root notebooks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache

$(READY): requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps --editable .
	touch $(READY)

$(BIN)/python:
	$(if $(PYTHON),,$(error no Python 3.10 to 3.12 with venv found: name one, make PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)

$(BIN)/jupyter-lab: | $(READY)
	$(BIN)/python -m pip install -r requirements.txt jupyterlab==4.6.6
