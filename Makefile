# Every target sets up what it needs; `make demo` and `make test` are the two to know.

PYTHON ?= python3
JOBS ?= 2

# Files whole, in the order tests/conftest.py gives them.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
OLDEST := .venv-oldest/bin
PIP_FLAGS := --disable-pip-version-check --quiet
NEEDS := import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	"Python " + sys.version.split()[0] + " was given as $(PYTHON).\n  Expected: 3.11 or newer.\n  Fix: make PYTHON=python3.11 ...")

.PHONY: venv venv-oldest venv-newest venv-oryx venv-tunix browser demo test test-slow test-oldest test-newest test-tunix test-all bench lint format doctor constraints clean

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[transformers,test,dev]'
	@touch $@

# The oldest JAX that is supported, beside the newest.
venv-oldest: .venv-oldest/installed

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install $(PIP_FLAGS) -c constraints-oldest.txt -e '.[transformers,test]'
	@touch $@

# The newest that this Python can have of everything, pinned nowhere: it tells when upstream moved.
venv-newest: .venv-newest/installed

.venv-newest/installed: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install $(PIP_FLAGS) -e '.[transformers,test]'
	@touch $@

# Oryx's last release, which imports with JAX 0.4.38 only, for the test that compares our harvest with it.
venv-oryx: .venv-oryx/installed

.venv-oryx/installed: constraints-oryx.txt
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv .venv-oryx
	.venv-oryx/bin/python -m pip install $(PIP_FLAGS) -r constraints-oryx.txt
	@touch $@

# Tunix brings some sixty packages along, and they do not go with the oldest NumPy that is supported.
venv-tunix: .venv-tunix/installed

.venv-tunix/installed: pyproject.toml constraints-tunix.txt
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv .venv-tunix
	.venv-tunix/bin/python -m pip install $(PIP_FLAGS) -c constraints-tunix.txt -e '.[transformers,tunix,test]'
	@touch $@

# Chromium and its driver, in which pages are tested: Debian's packages, unless both are there already.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver; } || \
	{ echo "chromium and chromedriver are not there, and apt-get could not install them."; \
	echo "  Fix: install both (on Debian, as root: apt-get install chromium chromium-driver)."; exit 1; }

# What SmolLM2-135M thinks at each layer, and which of its layers the answer depends on.
demo: venv
	$(BIN)/interp-jax demo

# What CI runs, cheap before dear. Most of its time was LLVM's; the other targets run the code that users run.
test: lint
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" $(BIN)/python -m pytest $(PARALLEL) -m 'not slow'

# Pytest's exit status 5 says that no test is marked slow.
test-slow: venv venv-oryx browser
	$(BIN)/python -m pytest $(PARALLEL) -m slow || [ $$? -eq 5 ]

test-oldest: venv-oldest
	$(OLDEST)/python -m pytest $(PARALLEL) -m 'not slow'

test-newest: venv-newest
	.venv-newest/bin/python -m pytest $(PARALLEL) -m 'not slow'

test-tunix: venv-tunix
	.venv-tunix/bin/python -m pytest $(PARALLEL) tests/patches/tunix

test-all: test test-slow test-oldest test-tunix

# One JSON line per promise.
bench: venv
	$(BIN)/python -m benchmarks

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

doctor: venv
	$(BIN)/interp-jax doctor

# Pin what the environments hold now: names and versions only.
constraints: venv venv-oldest venv-tunix
	$(BIN)/python -m pip freeze $(PIP_FLAGS) --all --exclude-editable --exclude pip > constraints.txt
	$(OLDEST)/python -m pip freeze $(PIP_FLAGS) --all --exclude-editable --exclude pip > constraints-oldest.txt
	.venv-tunix/bin/python -m pip freeze $(PIP_FLAGS) --all --exclude-editable --exclude pip > constraints-tunix.txt
	@touch .venv/installed .venv-oldest/installed .venv-tunix/installed

# Everything these targets made, except the results in runs/.
clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-oryx .venv-tunix .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
