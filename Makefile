# Two commands do all the set-up: `make train` and `make test`. Both build .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint .venv

train: .venv
	$(BIN)/python train.py experiment=first_run out=runs/first-run-$$(date +%Y%m%d-%H%M%S)

test: .venv
	$(BIN)/python -m pytest -q -n 2

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/mypy

# The stamp is written last: an install that was cut off is done again.
.venv: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zoo needs Python 3.11 to 3.13; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,sweep]'
	touch $@
