# Two commands do all their own set-up (virtual environment, installation):
#   make verify   checks the Triton kernels against the reference on this machine
#   make test     runs everything that CI runs
# `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The build of PyTorch that the project is tested with. Plain pip takes the CUDA build on a Linux machine.
TORCH  ?= torch==2.13.0
VERIFY ?=
FUZZ   ?=
JOBS   ?= 2

.PHONY: help verify test site notebooks lint types unit notebook-tests notebook-outputs docs browser fuzz mutants mutation coverage gpu clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; call make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --progress-bar off -q '$(TORCH)'
	$(BIN)/python -m pip install --progress-bar off -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	$(BIN)/python -m pip install --progress-bar off -q -e '.[dev,docs]'
	@touch $@

verify: $(VENV)/.package ## check the kernels against the reference (VERIFY="--quick" and so on)
	$(BIN)/python -m gsa_fast verify $(VERIFY)

test: lint types unit notebook-tests docs ## everything that CI runs

site: $(VENV)/.dev ## build the site strictly, and show it at http://127.0.0.1:8000
	$(BIN)/python -m mkdocs serve --strict

# Installed on demand: no test needs JupyterLab, and a reader no test tool.
$(VENV)/.notebooks: $(VENV)/.package
	$(BIN)/python -m pip install --progress-bar off -q -e '.[notebooks]'
	@touch $@

notebooks: $(VENV)/.notebooks ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab notebooks

lint: $(VENV)/.dev ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy
	$(BIN)/mypy

# Shape annotations are checked while the reference's tests run, but where wrong types are the point, and under
# torch.compile, which cannot trace the checker. beartype draws random numbers, which hypothesis takes for ours.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
TYPED  := --jaxtyping-packages=gsa_ref,beartype.beartype -W ignore::hypothesis.errors.HypothesisDeprecationWarning

unit: $(VENV)/.dev ## the test suite
	$(PYTEST) $(TYPED) -m 'not bad_input' -k 'not compiled' tests/ref
	$(PYTEST) -m bad_input tests/ref
	$(PYTEST) -k compiled tests/ref
	$(PYTEST) tests/fast $(wildcard tests/test_*.py)

# Their tensors are small: more than one thread only costs where several notebooks run at once. The puzzles and their
# solutions are compared with their stored outputs by tests/test_puzzles.py, in one process.
notebook-tests: $(VENV)/.dev ## execute the notebooks and compare with the stored outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval --nbval-current-env -p no:cacheprovider -n $(JOBS) --dist loadscope $(wildcard notebooks/*.ipynb)

notebook-outputs: $(VENV)/.dev ## execute the notebooks and store their outputs
	$(BIN)/python notebooks/execute.py

docs: $(VENV)/.dev ## build the site into site/, strictly
	$(BIN)/python -m mkdocs build --strict

# A browser is not installed here: CHROMIUM is the path of Chromium or Chrome.
CHROMIUM ?= $(firstword $(shell command -v chromium chromium-browser google-chrome))
$(VENV)/.browser: $(VENV)/.dev
	$(BIN)/python -m pip install --progress-bar off -q -e '.[browser]'
	@touch $@

browser: $(VENV)/.browser ## open every page of the site in Chromium (CHROMIUM=/path/to/chromium)
	@test -x "$(CHROMIUM)" || { echo "No Chromium was found; call make browser CHROMIUM=/path/to/chromium"; exit 1; }
	CHROMIUM='$(CHROMIUM)' $(BIN)/python -m pytest -p no:xdist tests/test_browser.py

fuzz: $(VENV)/.dev ## 10,000 calls with bad or odd input; each must end as the contracts say (FUZZ="--calls 500" and so on)
	$(BIN)/python -m tests.fuzzing $(FUZZ)

mutants: $(VENV)/.dev ## apply faults to copies of the kernels; every one must turn a check red
	$(BIN)/python -m tests.mutants
	$(BIN)/python -m tests.mutants --generated

# On a GPU the compiler takes most of the time, so more processes help: make gpu JOBS=14. What asks for 4 GiB of memory
# per test runs alone. The cheap properties run 200 times their examples: not those of gates inside attention, which
# compile for every shape of heads. initcheck does not see what cuBLAS writes: of
# torch.nn.functional.linear(x, w).float() alone, in bfloat16, it reports every element. Hence no layer there.
RESULTS   ?= benchmarks/results/h200
SANITIZER ?= compute-sanitizer
NO_LAYER   = $(addprefix --stem ,indexer budget selection indexed_selection attention attention_backward gates decode training)
gpu: $(VENV)/.dev ## the checks that need a GPU, with their records (JOBS=14, RESULTS=... and so on)
	$(BIN)/python -m gsa_fast verify --examples 100 --jobs $(JOBS) --json $(RESULTS)/verification.json
	$(BIN)/python -m gsa_fast verify --stem decode --dtype float32 --examples 1000 --jobs $(JOBS) --json $(RESULTS)/verification_decode.json
	$(BIN)/python -m gsa_fast verify --length 131072 --reruns 250 --json $(RESULTS)/long_verification.json
	$(BIN)/python -m gsa_fast verify --length 131072 --sigmoid-mode approximate --rows 512 --json $(RESULTS)/long_verification.json
	$(BIN)/python -m gsa_fast verify --length 131072 --gradients --rows 64 --reruns 50 --json $(RESULTS)/long_verification.json
	$(PYTEST) -k 'not past_two_to_the_31' tests/fast
	$(PYTEST) -n 1 -k 'past_two_to_the_31' tests/fast
	HYPOTHESIS_PROFILE=gpu $(PYTEST) --timeout 3600 -m property -k 'not past_two_to_the_31 and not fused and not gated_before' tests/fast/test_gates.py tests/fast/test_budget.py
	for tool in memcheck racecheck initcheck synccheck; do \
	  if [ $$tool = initcheck ]; then stems="$(NO_LAYER)"; else stems=; fi; \
	  $(SANITIZER) --tool $$tool --error-exitcode 1 \
	    $(BIN)/python -m gsa_fast verify $$stems --dtype bfloat16 --dtype float32 --examples 2 || exit 1; \
	done

# Installed on demand: mutmut is no part of `make test`, and brings a terminal interface along.
MUTATION ?=
$(VENV)/.mutation: $(VENV)/.dev
	$(BIN)/python -m pip install --progress-bar off -q -e '.[mutation]'
	@touch $@

mutation: $(VENV)/.mutation ## change gsa_ref one expression at a time; its tests must notice (MUTATION="budget rope")
	$(BIN)/python -m tests.reference_mutants $(MUTATION)

# The reference, and the host code of gsa_fast: kernels are left out, see [tool.coverage] in pyproject.toml. Few examples
# for each property reach every line; and whatever decodes 10,000 tokens reaches none that others do not.
coverage: $(VENV)/.mutation ## lines and branches that the tests run
	$(BIN)/python -m coverage erase
	HYPOTHESIS_PROFILE=mutation $(BIN)/python -m coverage run -m pytest -n $(JOBS) --dist worksteal -k 'not 10000' tests/ref tests/fast $(wildcard tests/test_*puzzles.py)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --include='gsa_ref/*' --fail-under=100
	$(BIN)/python -m coverage report --include='gsa_fast/*' --fail-under=95

clean: ## remove what the targets above made
	rm -rf $(VENV) site build mutants .coverage* *.egg-info .pytest_cache .mypy_cache .ruff_cache
