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

bench: setup  ## speed tables, ours beside what one would run otherwise
	$(BIN)/python benchmarks/routed_attention.py --out benchmarks/routed_attention_cpu.md
	$(BIN)/python benchmarks/neighborhood_attention.py --out benchmarks/neighborhood_attention_cpu.md
	$(BIN)/python benchmarks/deformable_attention.py --out benchmarks/deformable_attention_cpu.md
	$(BIN)/python benchmarks/window_families.py --out benchmarks/window_families_cpu.md
	$(BIN)/python benchmarks/convolutional_families.py --threads 2 --out benchmarks/convolutional_families_cpu.md
	$(BIN)/python benchmarks/linear_attention_families.py --threads 2 --out benchmarks/linear_attention_families_cpu.md

one-line: setup  ## the three one-line commands with a network of each family: tables and pictures (an hour on two cores)
	$(BIN)/python benchmarks/one_line.py photographs --out docs/one_line.md
	$(BIN)/python benchmarks/one_line.py digits --out docs/digits.md

gpu: setup  ## prove, tune and measure the kernels and networks on this GPU in ten minutes; a dry run without one
	$(BIN)/python -m benchmarks.gpu --minutes 9 --out work_dirs/gpu
	$(BIN)/python -m benchmarks.gpu report work_dirs/gpu

docs/models.md: $(wildcard checkpoints/published/*.json)  ## the tables of models, here and in the README, from the cards
	$(BIN)/python -c "from hybridzoo.checkpoints import markdown; markdown.write()"

docs: setup docs/models.md  ## build the documentation site into site/; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

pictures: demo  ## take the demo's pictures into docs/
	cp demo/classification.png demo/detection.png demo/segmentation.png demo/curves.png docs/

clean:  ## remove what the targets above made, save .venv
	rm -rf demo site data work_dirs build dist *.egg-info .links .pytest_cache .mypy_cache .ruff_cache
