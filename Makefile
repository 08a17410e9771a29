# make demo: learn CartPole and compare; make test: the fast tests. Both install what they need first.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin
# Further options for pip, such as --index-url for CPU-only builds of torch.
PIP_FLAGS ?=

export OMP_NUM_THREADS = 1

.PHONY: help install demo test test-slow lint type bench-speed

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make .venv with the tested versions

# The stamp is newer than what the installation depends on, or the installation is made again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo 'installing into $(VENV): some minutes, most of it torch'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt torch
	$(RUN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: install ## train and compare on CartPole-v1: a few minutes on 2 cores
	$(RUN)/zoo bench quickstart --jobs 2

test: install ## run the fast tests
	$(RUN)/python -m pytest -q -n 2 --dist worksteal

test-slow: install ## run the learning tests and other long checks
	$(RUN)/python -m pytest -q -m slow --timeout 3600

lint: install ## check style and format
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

type: install ## check types
	$(RUN)/mypy

bench-speed: install ## time updates, replay sampling and acting
	$(RUN)/zoo bench speed
