# `make demo` and `make test` set themselves up: all they need is Python >= 3.11.
# Another interpreter or environment: make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$python && break; done)
VENV ?= .venv
RUN := $(VENV)/bin/python -m
WORKERS ?= 2

.PHONY: demo check test test-all lint types tests smoke notebooks docs coverage mutants audit dist format clean

demo: $(VENV)/bench
	$(RUN) benchmarks digits --methods yoto,equal,share,portfolio,grid

# Three tiers: while editing, before a commit, before a release.
check: lint types smoke

test: lint types tests

test-all: lint types $(VENV)/dev
	$(QUICKLY) -m "not compiled"
	$(AS_USERS) -m compiled
	$(MAKE) notebooks docs

lint: $(VENV)/dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/dev
	$(VENV)/bin/pyrefly check

# What XLA makes of small programs is no test's subject, and compiling is most of the
# time. Those that are about compiled programs run apart, in processes as users have them.
# Small matrices of NumPy are no work for a second thread, which waits at full speed.
QUICKLY := YOTO_JAX_QUICK_XLA=1 OPENBLAS_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) \
	--dist worksteal
AS_USERS := $(RUN) pytest -n $(WORKERS)

tests: $(VENV)/dev
	$(QUICKLY) -m "not slow and not compiled"
	$(AS_USERS) -m "compiled and not slow" tests/engine

smoke: $(VENV)/dev
	$(QUICKLY) -m "smoke and not compiled"
	$(RUN) pytest -m "smoke and compiled" tests/engine

# As readers run them: a kernel each, trained to the end.
notebooks: $(VENV)/dev $(VENV)/notebooks
	$(RUN) pytest --nbmake -n $(WORKERS) notebooks

# The site, in docs/_build/html. Warnings and links that lead nowhere are errors; links to
# other sites are not followed, and no network is needed.
docs: $(VENV)/docs
	$(RUN) sphinx -W --keep-going -q -b html -c docs -d docs/_build/doctrees . \
		docs/_build/html
	$(VENV)/bin/linkchecker --no-status --quiet docs/_build/html/index.html

# Lines and branches of the library that the tests of `make test` run.
coverage: $(VENV)/coverage
	$(QUICKLY) -m "not slow and not compiled" --cov=yoto_jax --cov-branch \
		--cov-report=term-missing:skip-covered --cov-fail-under=95

# Are faults found? See tools/mutants.py.
mutants: $(VENV)/dev
	$(RUN) tools.mutants --workers $(WORKERS)

# Licences, and known vulnerabilities of what is installed: asks pypi.org. It fails if it
# cannot find out about a package.
audit: $(VENV)/dev
	$(RUN) tools.licenses
	$(RUN) pip freeze --exclude-editable > $(VENV)/installed.txt
	$(VENV)/bin/python -m venv $(VENV)/pip-audit
	$(VENV)/pip-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)/pip-audit/bin/pip-audit --strict --disable-pip --no-deps \
		-r $(VENV)/installed.txt

# Wheel and source distribution, tried as users get them: see tools/dist.py. It asks
# pypi.org for build tools, and npm for Pyright.
dist: $(VENV)/release
	$(RUN) tools.dist

format: $(VENV)/dev
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "yoto_jax needs Python >= 3.11 with venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, renewed when pyproject.toml changes.
$(VENV)/%: $(VENV)/bin/python pyproject.toml
	$(RUN) pip install --quiet --no-compile --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) dist docs/_build .pytest_cache .ruff_cache
