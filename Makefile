# make demo      from nothing to an evaluated model and a report, on this machine
# make test      every fast test; JOBS=2 is how many at once
# make test-cuda-placement  where tensors lie on a GPU, on a CUDA device that is host memory: needs g++, takes minutes
# make coverage  the same, and which lines of pretrain/ no test runs, ranks included; fails below the floor of pyproject.toml
# make wheel     dist/evenkeel-VERSION-py3-none-any.whl
# make lint      style, types, scripts: what can be seen without running anything
# make docs      the documentation site, in site/; a dead link or a missing reference fails
# make peers     the tools that exports are tried with (llama.cpp, vLLM, ...): 3.5 GB and 10 minutes; PEERS=llama_cpp one of them
# make setup     .venv with the pinned packages; PYTHON=python3.11 chooses the interpreter, EXTRAS=test the optional groups

PYTHON ?= python3
EXTRAS ?= test
JOBS ?= 2
VENV := .venv
STAMP := $(VENV)/.installed-$(EXTRAS)

.PHONY: setup demo test test-cuda-placement docs coverage wheel peers lint style types scripts clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) tools/check_python.py
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

demo: setup
	$(VENV)/bin/python tools/demo.py

# The files with few and long tests must not come last, as they would by the number of their tests.
test: setup
	$(VENV)/bin/python -m pytest -n $(JOBS) --no-loadscope-reorder

test-cuda-placement: setup
	$(VENV)/bin/python -m pytest -n $(JOBS) tests/fakecuda -m 'cuda_placement and not slow'

coverage: setup
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest -n $(JOBS)
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

wheel: setup
	rm -rf build dist
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

docs:
	@$(MAKE) --no-print-directory setup EXTRAS=docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

peers: setup
	$(VENV)/bin/python tests/support/peers/environments.py $(PEERS)

lint: style types scripts

style: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

scripts: setup
	$(VENV)/bin/shellcheck -x .ci/* slurm/*
	$(VENV)/bin/actionlint -shellcheck $(VENV)/bin/shellcheck

clean:
	rm -rf $(VENV)
