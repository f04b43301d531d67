# Everything runs in an environment of its own, $(VENV), made from $(PYTHON) on first use.
PYTHON ?= python3.11
VENV ?= .venv
WORKERS ?= 2
KQUANT_DATA ?= ../shared/data
export KQUANT_DATA
export TF_CPP_MIN_LOG_LEVEL ?= 3

BIN := $(VENV)/bin
# a worker that has nothing left takes over tests of another
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
SETUP := setup.cfg setup.py pyproject.toml

# AIMET needs PyTorch, in an environment of its own.
AIMET ?= .venv-aimet
MODEL := --model=$(KQUANT_DATA)/models/mobilenet_v2_1.0_imagenet.keras \
  --calibration=$(KQUANT_DATA)/imagenet/train1000_one_per_class_224_q90.npz --preprocess=tf

.PHONY: help demo test fast slow lint format benchmark benchmark-adaround benchmark-aimet clean

help:
	@echo "make demo       quantize a small model and run it on the interpreter (minutes, mostly installation)"
	@echo "make test       lint, and the tests but for the slow ones (at most 10 minutes)"
	@echo "make fast       the same without lint"
	@echo "make slow       the slow tests: real models (where KQUANT_DATA is a folder of them), many seeds, training"
	@echo "make lint       ruff, layers of imports, and mypy"
	@echo "make format     let ruff rewrite what it can"
	@echo "make benchmark  cost against the TensorFlow converter (needs KQUANT_DATA)"
	@echo "make benchmark-adaround  cost of equalization, bias correction and AdaRound (needs KQUANT_DATA)"
	@echo "make benchmark-aimet     the same beside AIMET's AdaRound, installed into $(AIMET)"
	@echo "make clean      remove the environment and caches"

demo: $(VENV)/.demo
	$(BIN)/python -m models.demo

# Side by side: lint takes one core for half a minute.
test:
	@$(MAKE) --no-print-directory -j2 lint fast

fast: $(VENV)/.dev
	$(PYTEST) -m "not slow"

slow: $(VENV)/.dev
	$(PYTEST) -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m experiments.results --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.dev
	$(BIN)/python -m experiments.benchmark $(MODEL)

benchmark-adaround: $(VENV)/.dev
	$(BIN)/python -m experiments.benchmark --what=equalize $(MODEL) --images=200
	$(BIN)/python -m experiments.benchmark --what=adaround $(MODEL) --images=1000

benchmark-aimet: $(VENV)/.dev $(AIMET)/.aimet
	$(BIN)/python -m experiments.benchmark --what=adaround --threads=1 --peer_python=$(AIMET)/bin/python

$(AIMET)/.aimet:
	$(PYTHON) -m venv $(AIMET)
	$(AIMET)/bin/python -m pip install --quiet 'aimet-torch==2.42.*' 'torch==2.13.*' torchvision
	@touch $@

# One stamp per set of extras: pip runs again only where the requirements have changed.
$(VENV)/.%: $(SETUP) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
