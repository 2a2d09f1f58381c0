# The README's commands. Another environment: make test VENV=path/to/environment
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.moco-transfer-installed
CODE := convert pretrain transfer benchmarks tests setup.py

.PHONY: help install demo test test-all test-fast check format clean

help:
	@echo "make install    the pinned set, with Detectron2, into $(VENV)"
	@echo "make demo       the whole road on embedded images: a page in a quarter of an hour"
	@echo "make test       the tests, and one walk of the whole road: a quarter of an hour on two cores"
	@echo "make test-all   further variants too"
	@echo "make test-fast  without the walk"
	@echo "make check      format, lint, types"
	@echo "make format     put the code into the format that check wants"

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt detectron2.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make install PYTHON=python3.11"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[detection,dev]'
	$(MAKE) --no-print-directory detectron2
	touch $@

# Detectron2 has no release of its own on the index: this is a wheel of its Python sources, tagged
# for another Python and needing no compiler. One that is already installed is used as it is.
.PHONY: detectron2
detectron2:
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("detectron2"))' || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		--only-binary=:all: --python-version 3.10 --implementation cp --abi none --platform any \
		--target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" \
		--requirement detectron2.txt

demo: install
	$(BIN)/python benchmarks/suite.py --suite quick

# One thread each: two workers that share two cores would wait for each other's threads.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: install
	$(TEST) -m "not long"

test-all: install
	$(TEST)

test-fast: install
	$(TEST) -m "not slow and not long"

check: install
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

format: install
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf $(VENV) output build *.egg-info
