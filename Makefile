# `make demo` and `make test` set themselves up: all they need is Python >= 3.11.
# Another interpreter or environment: make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$python && break; done)
VENV ?= .venv
RUN := $(VENV)/bin/python -m
WORKERS ?= 2

.PHONY: demo test test-all lint types tests notebooks audit format clean

demo: $(VENV)/bench
	$(RUN) benchmarks digits

test: lint types tests notebooks

# With the tests that take long: many minutes more.
test-all: lint types $(VENV)/dev
	$(RUN) pytest -n $(WORKERS) --dist loadfile -m ""
	$(MAKE) notebooks

lint: $(VENV)/dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/dev
	$(VENV)/bin/pyrefly check

tests: $(VENV)/dev
	$(RUN) pytest -n $(WORKERS) --dist loadfile

notebooks: $(VENV)/dev
	$(RUN) pytest --nbmake -n $(WORKERS) notebooks

# Licences, and known vulnerabilities of what is installed: asks pypi.org. It fails if it
# cannot find out about a package.
audit: $(VENV)/dev
	$(RUN) tools.licenses
	$(RUN) pip freeze --exclude-editable > $(VENV)/installed.txt
	$(VENV)/bin/python -m venv $(VENV)/pip-audit
	$(VENV)/pip-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)/pip-audit/bin/pip-audit --strict --disable-pip --no-deps \
		-r $(VENV)/installed.txt

format: $(VENV)/dev
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "yoto_jax needs Python >= 3.11 with venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade pip

# One stamp for each set of extras, renewed when pyproject.toml changes.
$(VENV)/%: $(VENV)/bin/python pyproject.toml
	$(RUN) pip install --quiet --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
