# `make run` and `make test` work on a fresh machine; a second call installs nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: run test lint types unit smoke slow clean
.DEFAULT_GOAL := run

run: $(STAMP)
	$(BIN)/sae-run train

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# A process for each core, of one thread each: two threads a process would be in each other's way.
unit: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow and not gpu" \
		-n auto --maxprocesses 8 --dist loadfile

slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m "slow and not gpu"

# Every shipped SAE and every kind of model, on tiny configs, in a folder of its own.
smoke: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/smoke.py

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV)
