# demo: the whole flow on a tiny model; test, check: what .ci/run runs; lab: notebooks in Jupyter lab; clean: removes what this made.
# Each makes .venv first where it is missing or older than the locks. lock: writes them from requirements.txt, keeping the
# versions that fit (UPGRADE=--upgrade: the latest that fit).

FITS := import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3 python; do \
	$$python -c "$(FITS)" 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCKED := 3.10 3.11 3.12
VERSION := import sys; print("%d.%d" % sys.version_info[:2])

.PHONY: demo test check lab lock clean

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
	$(BIN)/python -m pip check

lab: $(READY)
	$(BIN)/jupyter-lab --allow-root notebooks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache

lock: | $(BIN)/python
	$(BIN)/python -m pip install uv==0.13.9
	for version in $(LOCKED); do \
		UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip compile requirements.txt --quiet $(UPGRADE) \
			--python-version $$version --python-platform x86_64-manylinux_2_28 \
			--excludes requirements/without-cuda.txt --no-annotate --custom-compile-command "make lock" \
			--output-file requirements/lock-$$version.txt || exit 1; \
	done

$(READY): $(LOCKED:%=requirements/lock-%.txt) pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -r requirements/lock-$$($(BIN)/python -c '$(VERSION)').txt
	$(BIN)/python -m pip install --no-deps --editable .
	touch $(READY)

$(BIN)/python:
	$(if $(PYTHON),,$(error no Python 3.10 to 3.12 with venv found: name one, make PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)
