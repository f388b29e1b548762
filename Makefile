# Everything a newcomer needs: `make demo`, `make test`. Both set up their own environment first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# the package alone, and with what its developers need
PACKAGE := $(VENV)/.package
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# on two cores two files of tests at a time: three are no faster, and slow down what each of them waits for
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile

.PHONY: demo test test-all faults slurm lint docs notebooks bench bench-io clean
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

$(PACKAGE): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or run make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(READY): $(PACKAGE)
	$(INSTALL) --editable '.[dev]'
	@touch $@

demo: $(PACKAGE)
	$(BIN)/h2mv-dist demo demo-output

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Dask's profiler and clock look at idle workers a hundred times a second, and tests keep a dozen of them
test test-all faults: export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED := False
# hundreds of processes are started: what one has compiled, the others need not
unexport PYTHONDONTWRITEBYTECODE
test test-all faults: export DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL := 500ms

test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: test docs
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=30 --timeout=900 -m slow

# the documentation, in build/site; a warning is an error
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# the examples, with what they show
notebooks: $(READY)
	$(BIN)/jupyter execute --inplace examples/*.ipynb

# the slow fault tests alone
faults: $(READY)
	$(BIN)/python -m pytest -m slow tests/faults

# what tests/slurm needs; they are skipped where it is missing, and fail where CI is set
slurm:
	@for daemon in munged slurmctld slurmd; do \
	    PATH=$$PATH:/usr/sbin command -v $$daemon >/dev/null || missing="$$missing $$daemon"; done; \
	if [ -z "$$missing" ]; then exit; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "no$$missing: install slurm-wlm and munge"; exit; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge

# short ones, as Markdown tables on the screen and in benchmarks.md
bench: $(READY)
	$(BIN)/python -m benchmarks | tee benchmarks.md

# inference from object store to object store, a worker's memory, and the stores themselves; takes long
bench-io: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks io --members 10 --resolution 2 --tile 30 --years 3 \
	    --outputs evapotranspiration runoff terrestrial_water_storage fapar
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks io --members 10 --resolution 2 --tile 30
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks io memory stores

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
