#!/usr/bin/env bash
# The mini model and its plain baseline on a CPU, then the twelve experiments and their page.
#
#     source .venv/bin/activate        after `make demo`, or the README's installation by hand
#     bash runs/cpu.sh                 stopped, it goes on where it was when it is started again
#
#                            tokens        FLOPs      hours on 2 CPU cores with bf16 instructions, one after the other
#     reflow_mini            40,960,000    1.52e+15   0.9
#     gpt2_new_mini          40,960,000    1.49e+15   0.9
#
# The corpus is made of pip packages: 42 MB of downloads, a minute. The losses in config/README.md belong to
# the larger mix of `data/offline/prepare.py --debian`, which needs apt.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -f data/offline-gpt2-8192/meta.json ] || python data/offline/prepare.py --tokenizer=gpt2-8192
python train.py config/reflow_mini.py --resume
python train.py config/gpt2_new_mini.py --resume
python experiments/run_all.py --run=out/reflow-mini
python experiments/report.py --run=out/reflow-mini
