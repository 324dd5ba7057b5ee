# Two commands need no set-up of their own: `make demo` and `make test`.
PY ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint interop bench proofs clean

.venv/ready: pyproject.toml constraints.txt
	$(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready
	$(BIN)/modelwright demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# Every result in other engines: makes an environment for each (MODELWRIGHT_INTEROP, or .interop), writes docs/interop.md
interop: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/interop/run.py

bench: .venv/ready
	for f in bench/*.py; do echo "== $$f"; OMP_NUM_THREADS=1 $(BIN)/python $$f || exit 1; done
	$(MAKE) proofs

proofs: .venv/ready
	$(BIN)/python bench/proofs.py

clean:
	rm -rf .venv build src/*.egg-info
