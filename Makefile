# Two commands need no set-up of their own: `make demo` and `make test`.
PY ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false
BENCHMARKS := $(filter-out bench/common.py bench/pages.py,$(wildcard bench/*.py))

.PHONY: demo test slow fuzz lint interop bench docs docs-site clean

.venv/ready: pyproject.toml constraints.txt
	$(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready
	$(BIN)/modelwright demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --durations=20 || test $$? -eq 5

fuzz: .venv/ready  # 10,000 mutated inputs; writes bench/results/fuzz.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/fuzz.py 10000

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# Every result in other engines: makes an environment for each (MODELWRIGHT_INTEROP, or .interop), writes docs/interop.md
interop: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/interop/run.py

bench: .venv/ready
	for f in $(BENCHMARKS); do echo "== $$f"; OMP_NUM_THREADS=1 $(BIN)/python $$f || exit 1; done
	$(BIN)/python bench/pages.py
	$(MAKE) docs

docs: .venv/ready  # the generated pages and PROOFS.md
	$(BIN)/python docs/generate.py

docs-site: docs  # a site with search in build/site; read it with: python -m http.server -d build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv build src/*.egg-info
