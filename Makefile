# Two commands do everything: `make demo` and `make test`. Both make the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
THREADS ?=
JOBS ?= 2
PY := $(VENV)/bin/python

.PHONY: demo test test-all lint

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.export: requirements-export.txt $(VENV)/.installed
	$(PY) -m pip install --quiet -r requirements-export.txt
	touch $@

demo: $(VENV)/.installed  ## embedded data, teacher, DG-Net, evaluation, swap grid, report
	$(PY) demo.py $(if $(THREADS),--threads $(THREADS))

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test: lint $(VENV)/.export  ## all tests but those marked slow, in JOBS processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup -m "not slow"

test-all: lint $(VENV)/.export  ## every test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup
