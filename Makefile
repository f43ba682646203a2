# make demo   install, prepare the embedded corpus, train the nano model, sample from it
# make test   install, run the tests
# make lint   check style

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/run
	$(BIN)/python data/sotu/prepare.py
	$(BIN)/python train.py config/reflow_nano.py --resume
	@echo
	$(BIN)/python sample.py --run=out/reflow-nano
	@echo
	@echo "Next: source .venv/bin/activate, then"
	@echo "  python sample.py --prompt=\"My fellow citizens\" --temperature=0.6"
	@echo "  python train.py config/gpt2_new_nano.py                               the baseline, same shape and data"
	@echo "  python train.py config/reflow_nano.py --out_dir=out/longer --max_steps=2000 --warmup_steps=200"
	@echo "  python train.py --help"

test: .venv/dev
	$(BIN)/python -m pytest -q --durations=10

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Stamps: a package is installed once, and again when its list changes.
.venv/run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reFlow needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/pip install -r requirements-dev.txt
	@touch $@
