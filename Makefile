# make demo: set-up, tokenise, train on two ranks, sample, the lens.   make test: set-up, all checks, all tests.
# make docs: the pages of docs/ as a site.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test tests lint docs setup setup-dev system clean

demo: setup
	@$(BIN)/python launch/demo.py

# The linters run beside the first tests, which wait for Slurm more than they compute.
test:
	@$(MAKE) --no-print-directory -j 2 setup-dev system
	@$(MAKE) --no-print-directory -j 2 tests lint

tests: setup-dev system
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 $(PYTEST)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/english.py

# Strict: a link, anchor or picture that leads nowhere, or a page that the index leaves out, is an error.
docs: setup-dev
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

setup: .venv/.installed
setup-dev: .venv/.installed-dev

.venv/.installed .venv/.installed-dev: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing packages into .venv (about a minute the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.$(if $(findstring dev,$@),[dev],)'
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true  # on all cores; pip uses one
	@touch $@

# What the tests need besides Python. Where it cannot be installed, the tests that need it are skipped by name.
system:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
	  || echo "chromium is missing and cannot be installed here: the tests that look at pages will be skipped"
	@command -v c++ >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq g++ >/dev/null; } \
	  || echo "c++ is missing and cannot be installed here: the tests of compiled rivals will be skipped"
	@{ command -v slurmctld && command -v slurmdbd && command -v munged && command -v mariadb-install-db; } >/dev/null \
	  || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	     slurm-wlm slurmdbd munge mariadb-server-core mariadb-client-core >/dev/null; } \
	  || echo "Slurm is missing and cannot be installed here: the tests on a real cluster will be skipped"

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
