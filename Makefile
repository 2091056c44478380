# `make test` and `make demo` need only Python and make: each sets up .venv first, and again when its inputs change.
# An existing environment is used as it is with `make test VENV=path`; ARGS is passed on to pytest or to the demo.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS :=
STAMP := .venv/.installed
READY := $(if $(filter .venv,$(VENV)),$(STAMP))
DOORS := $(if $(filter .venv,$(VENV)),.venv/.doors)
# The oldest transformers that is tested, in an environment of its own; all else is as in constraints.txt.
OLDEST := 5.23.0
OLD_VENV := .venv-$(OLDEST)
# What `make test` leaves to targets of their own.
QUICK := not long and not benchmark and not pages and not kernels and not slow and not tools
C_FILES := $(wildcard modeling_deepseek_moe/ops/csrc/*.[ch] tests/*.c)

.DEFAULT_GOAL := help
.PHONY: help demo test tools slow ranks pages kernels test-oldest peer types lint format wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes first and alone, so that pip takes exactly that build of it.
$(STAMP): setup.py constraints.txt $(wildcard modeling_deepseek_moe/ops/csrc/*)
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt torch==2.13.0
	.venv/bin/python -m pip install -c constraints.txt -e ".[dev,eval,peft,bnb]"
	touch $@

$(OLD_VENV)/.installed: setup.py constraints.txt $(wildcard modeling_deepseek_moe/ops/csrc/*)
	test -x $(OLD_VENV)/bin/pip || $(PYTHON) -m venv $(OLD_VENV)
	sed 's/^transformers==.*/transformers==$(OLDEST)/' constraints.txt > $(OLD_VENV)/constraints.txt
	$(OLD_VENV)/bin/python -m pip install -c $(OLD_VENV)/constraints.txt torch==2.13.0
	$(OLD_VENV)/bin/python -m pip install -c $(OLD_VENV)/constraints.txt -e ".[dev,doors,eval,peft,bnb]"
	touch $@

demo: $(READY) ## Train, write as FP8, load and generate with a small model (two minutes on two cores)
	$(BIN)/deepseek-moe demo $(ARGS)

.venv/.doors: $(STAMP)
	.venv/bin/python -m pip install -c constraints.txt -e ".[doors]"
	touch $@

test: lint $(DOORS) ## Check style and types, and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(QUICK)" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

tools: $(DOORS) ## Run the tests that go through peft, bitsandbytes, TRL, lm-eval and torch.compile (three minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "tools and not long and not slow and not pages" -n 2 --dist loadfile $(ARGS)

slow: $(DOORS) ## Run the tests that start and kill processes or compile graphs (nine minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not long and not pages" -n 2 --dist loadfile $(ARGS)

ranks: $(DOORS) ## Run all tests of several processes, four at most (ten minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" tests/test_distributed_*.py tests/test_training_scale.py $(ARGS)

pages: $(DOORS) ## Run the blocks of the README and of the recipes in docs, as printed (three minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m pages -n 2 --dist loadfile $(ARGS)

kernels: $(DOORS) ## Check what runs on GPUs, without one: the interpreter, the compiler, tensors that claim a device
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "kernels and not long" -n 2 --dist loadfile $(ARGS)

test-oldest: $(OLD_VENV)/.installed ## Run the tests with the oldest transformers that is supported
	OMP_NUM_THREADS=1 $(OLD_VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

peer: $(READY) ## Run the tests that compare with other software (downloads transformers' source distribution)
	$(BIN)/python -m pytest -m peer -n 2 $(ARGS)

types: $(READY) ## Check the types, of the package as it is installed
	rm -rf build/types && mkdir -p build/types/modeling_deepseek_moe
	ln -s $(CURDIR)/modeling_deepseek_moe/* $(CURDIR)/conversion $(CURDIR)/eval build/types/modeling_deepseek_moe/
	cd build/types && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

lint: types ## Check the style and the types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

format: $(READY) ## Rewrite the files in the house style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(C_FILES)

wheel: $(READY) ## Build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -w dist .

clean: ## Remove what was built, and caches
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name '.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
