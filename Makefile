# Everything here makes its own environment in .venv first; PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# In the order of tests/conftest.py, which puts the longest first.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: help one-line setup demo test test-all test-fast lint types bench gpu docs pictures clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.done  ## make .venv with pinned, known-good versions (about 6 GB: PyTorch brings its GPU libraries)

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "error: Python 3.10 or later is needed; make PYTHON=python3.11 ...")'
	@echo "== making $(VENV) and installing PyTorch, timm, mmdet, mmseg: some minutes, mostly download"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt "setuptools>=77" wheel
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[all]"
	@# Two builds of OpenCV arrive by dependency; the one without windows must win, the other wants a desktop's libGL.
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps --force-reinstall opencv-python-headless
	@touch $@

demo: setup  ## fine-tune one backbone on three tasks on the embedded data, show scores, write pictures to demo/
	@echo "== training on handwritten digits: three tasks, about a quarter of an hour on two cores"
	$(BIN)/python -m hybridzoo.train.demo --out demo

test: setup  ## the tests
	$(PYTEST)

test-all: setup  ## with more of the same kind: every size and host, kernels for every chip and width, training on digits
	$(PYTEST) -m ""

test-fast: setup  ## without the slow ones
	$(PYTEST) -m "not slow and not exhaustive"

lint: setup  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy; it sees the mapped folders through links
	@mkdir -p .links/hybridzoo
	@for room in backbones checkpoints configs kernels layers train; do ln -sfn ../../$$room .links/hybridzoo/$$room; done
	@for file in __init__.py __main__.py py.typed; do ln -sf ../../hybridzoo/$$file .links/hybridzoo/$$file; done
	$(BIN)/mypy

bench: setup  ## the speed tables of docs/ and benchmarks/ (a quarter of an hour on two quiet cores)
	$(BIN)/python -m benchmarks.compare
	$(BIN)/hybridzoo bench ops --device cpu --threads 2 --json benchmarks/results/operators_cpu.json
	$(BIN)/hybridzoo bench ops na2d routed dat --device cpu --threads 2 --img-size 800x1344 --batch-size 1 --repeats 3 \
	  --json benchmarks/results/operators_800x1344_cpu.json
	$(BIN)/python -m benchmarks.input_pipeline
	$(BIN)/python -m benchmarks.tables

one-line: setup  ## the three one-line commands with a network of each family: tables and pictures (an hour on two cores)
	$(BIN)/python benchmarks/one_line.py photographs --out docs/one_line.md
	$(BIN)/python benchmarks/one_line.py digits --out docs/digits.md

gpu: setup  ## prove, tune and measure the kernels and networks on this GPU in ten minutes; a dry run without one
	$(BIN)/python -m benchmarks.gpu --minutes 9 --out work_dirs/gpu
	$(BIN)/python -m benchmarks.gpu report work_dirs/gpu

docs/models.md: $(wildcard checkpoints/published/*.json)  ## the tables of models, from the cards
	$(BIN)/python -c "from hybridzoo.checkpoints import markdown; markdown.write()"

docs: setup docs/models.md  ## build the documentation site into site/; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

pictures: demo  ## take the demo's pictures into docs/
	cp demo/classification.png demo/detection.png demo/segmentation.png demo/curves.png docs/

clean:  ## remove what the targets above made, save .venv
	rm -rf demo site data work_dirs build dist *.egg-info .links .pytest_cache .mypy_cache .ruff_cache
