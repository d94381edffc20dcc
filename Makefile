# Start with `make demo` and `make test`; each creates the virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
MODELS ?= models
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-real test-slow test-slurm test-slurm-slow test-gpu device check bench docs dist models clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# torch first and by itself: a version range would resolve to a build with gigabytes of CUDA
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

demo: $(STAMP)  ## two real teachers, one student, one report (about 8 minutes on 2 cores)
	$(BIN)/python examples/get_models.py $(MODELS) smollm2 minilm
	PATH="$(abspath $(BIN)):$$PATH" MODELS=$(MODELS) examples/demo.sh

test: $(STAMP)  ## the default tests: CPU, offline, a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --timeout 600

models: $(STAMP)
	$(BIN)/python examples/get_models.py $(MODELS) smollm2 minilm gemma3

test-real: models  ## tests on real weights
	OMP_NUM_THREADS=1 KVDISTILL_MODELS=$(MODELS) $(BIN)/python -m pytest -q -m real_model -n 2 --dist loadfile --timeout 900

test-slow: $(STAMP)  ## long tests: 1,000 kills, 2,000 damaged files, 100 full disks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not slurm"

test-slurm: $(STAMP)  ## tests on a real Slurm; need root and the packages of .ci/slurm-packages
	$(BIN)/python -m pytest -q -m "slurm and not slow" --timeout 900 tests/slurm

test-slurm-slow: $(STAMP)  ## 200 random events of a cluster over 300 shards and a training job
	$(BIN)/python -m pytest -q -m "slurm and slow" tests/slurm

test-gpu: $(STAMP)  ## a GPU against the CPU; without one, all are skipped
	$(BIN)/python -m pytest -q -m gpu tests/gpu

device: $(STAMP)  ## every path of the GPU benchmark at toy sizes, on a CPU
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/device.py --tiny --device cpu

check: $(STAMP)  ## static checks of CI
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.readthedocs .readthedocs.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi

bench: models  ## all benchmarks; print ratios
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/codecs.py --model $(MODELS)/smollm2 --corpus examples/data/gsm8k_train.jsonl
	$(BIN)/python benchmarks/extract.py $(MODELS)/smollm2 examples/data/gsm8k_train.jsonl \
	  --dtype float32 --samples 16
	$(BIN)/python benchmarks/align.py
	$(BIN)/python benchmarks/train.py --models $(MODELS)

docs: $(STAMP)  ## the pages, and what they and the notebooks made from them show, run
	$(BIN)/mkdocs build --strict
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m docs -n 2 --timeout 600 tests/test_docs.py

dist: $(STAMP)  ## wheel and sdist, checked, and the wheel installed
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -q -m dist tests/test_dist.py

clean:
	rm -rf demo-output site build dist
