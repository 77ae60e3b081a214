# Needs make and Python 3.11 or newer, nothing else: every command first sees to its own virtual environment.
#   PYTHON=...  the interpreter to build it with      ARGS=...  more arguments for the command, e.g. ARGS="-x tests/data"

PYENV_312 = $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin/python)
LOCKS = requirements/lock-py311.txt requirements/lock-py312.txt requirements/install.sh setup.py

# Two workers with one compute thread each. XLA reads NPROC as its number of threads.
# The workers and the processes they start share one compilation cache, which holds the smallest programs too.
PYTEST = NPROC=1 OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-latest test-plan plan plan-small lint clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1|/p' Makefile | awk -F'|' '{ printf "  %-18s %s\n", $$1, $$2 }'

quickstart: .venv/.installed  ## the main job: what thinking buys, in one table (3 minutes on 2 idle cores, 10 on busy ones)
	.venv/bin/python -m thinking_lm.quickstart $(ARGS)

test: .venv/.installed  ## run the tests
	$(PYTEST) .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/.installed  ## run the tests that `make test` leaves out: more kills, meshes, processes and cases
	$(PYTEST) .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(ARGS)

test-latest: .venv-latest/.installed  ## run what `make test` runs on Python 3.12 with the newest JAX
	$(PYTEST) .venv-latest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-plan: .venv-plan/.installed  ## run the tests that need the TPU compiler
	$(PYTEST) .venv-plan/bin/python -m pytest tests/plan_test.py $(ARGS)

plan: .venv-plan/.installed  ## compile what changed of the pods of configs/pod and hold it to its budget; no TPU needed, ARGS=--again: all
	NPROC=1 JAX_PLATFORMS=cpu .venv-plan/bin/python -m thinking_lm.plan --budgets=configs/pod/budgets.json $(ARGS)

plan-small: .venv-plan/.installed  ## the training step of one small pod, in a minute or two
	NPROC=1 JAX_PLATFORMS=cpu .venv-plan/bin/python -m thinking_lm.plan --budgets=configs/pod/small.json --again $(ARGS)

lint: .venv/.installed  ## check style and format
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

clean:  ## remove environments, caches and build products; never runs/
	rm -rf .venv .venv-latest .venv-plan .jax_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: $(LOCKS)
	@sh requirements/install.sh .venv 3.11 3.99 $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14)
	@touch $@

# libtpu lives apart: any JAX process that may take it (without JAX_PLATFORMS=cpu) would hold it for its whole life.
.venv-plan/.installed: $(LOCKS) requirements/lock-plan-py311.txt
	@test "$$(uname -s) $$(uname -m)" = "Linux x86_64" || \
	  { echo "error: libtpu, the TPU compiler, exists for Linux on x86_64 only; this is $$(uname -s) $$(uname -m)" >&2; exit 1; }
	@sh requirements/install.sh .venv-plan 3.11 3.11 $(or $(PYTHON),python3.11 python3)
	.venv-plan/bin/python -m pip install -q --disable-pip-version-check -r requirements/lock-plan-py311.txt
	@touch $@

.venv-latest/.installed: $(LOCKS)
	@sh requirements/install.sh .venv-latest 3.12 3.12 $(or $(PYTHON),python3.12 python3 $(PYENV_312))
	@touch $@
