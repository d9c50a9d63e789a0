# `make crafter` trains, `make test` runs the tests. Both set up .venv the first time.
# Another Python:  make test PYTHON=python3.12
# Other presets:   make crafter CONFIGS="crafter cpu" ARGS="--steps 20000"

PYTHON ?= python3
CONFIGS ?= crafter lore_full
LOGDIR ?= ./logdir/crafter
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Stamps of complete installations, which are repeated when their requirements change.
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

# Must also run on older Pythons, even 2, to report that they are too old.
define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("LoRe needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Use another: make PYTHON=python3.12 ..."
             % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("$(PYTHON) cannot create virtual environments (no venv or ensurepip). "
             "On Debian or Ubuntu: apt install python%d.%d-venv. Then run make again." % sys.version_info[:2])
if sys.version_info >= (3, 13):
    print("dm-control does not support Python %d.%d: the dmc_* tasks need 3.11 or 3.12." % sys.version_info[:2])
endef
export CHECK_PYTHON

.PHONY: help crafter setup test slow lint clean

help:
	@sed -n 's/^# //p' Makefile | head -3

crafter: $(READY)
	$(BIN)/python dreamer.py --configs $(CONFIGS) --logdir $(LOGDIR) $(ARGS)

setup: $(READY_DEV)

test: $(READY_DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

slow: $(READY_DEV)
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis __pycache__ */__pycache__

# A .venv without its stamp is incomplete, so it is created again.
$(READY): requirements.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not installed. LoRe needs Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@test -f $@ || { echo "Creating $(VENV)"; rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(READY_DEV): $(READY) requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements/dev.txt
	@touch $@
