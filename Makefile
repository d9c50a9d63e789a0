# `make crafter` trains, `make test` tests. Both set up .venv first, where that is not done yet.
# Another Python:  make test PYTHON=python3.12
# Other presets:   make crafter CONFIGS="crafter cpu" ARGS="--steps 20000"

PYTHON ?= python3
CONFIGS ?= crafter lore_full
LOGDIR ?= ./logdir/crafter
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Each stamp is written when its set-up is complete, and is redone when its requirements change.
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

# Must run on any Python, even 2, to say that it is too old.
define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("LoRe needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..."
             % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("$(PYTHON) cannot make virtual environments (no venv or ensurepip). "
             "On Debian or Ubuntu: apt install python%d.%d-venv. Then run make again." % sys.version_info[:2])
if sys.version_info >= (3, 13):
    print("Python %d.%d has no dm-control: the dmc_* tasks need 3.11 or 3.12." % sys.version_info[:2])
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
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis __pycache__ */__pycache__

# A .venv without a stamp was left half-finished: it is made anew.
$(READY): requirements.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not installed. LoRe needs Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@test -f $@ || { echo "Making $(VENV)"; rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(READY_DEV): $(READY) requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements/dev.txt
	@touch $@
