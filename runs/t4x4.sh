#!/usr/bin/env bash
# reFlow-1, or another configuration, on one machine with four T4.
#
#     bash runs/t4x4.sh                              config/reflow_1.py
#     bash runs/t4x4.sh config/reflow_1_small.py     stopped, either goes on when it is started again
#
#                            tokens           FLOPs      hours on 4 x T4, if a third of their peak is reached
#     reflow_1_small         9,011,200,000    2.87e+18   9.2
#     reflow_1_lite          9,011,200,000    2.19e+19   70.3
#     reflow_1               9,011,200,000    2.88e+19   92.1
#     reflow_1_big           9,011,200,000    3.2e+19    102.5
#     gpt2_new               9,011,200,000    3.19e+19   102.1
#
# The hours are an estimate (train.py --dry_run). The corpus needs the network and 18 GB for its shards: it is
# streamed.
set -euo pipefail
cd "$(dirname "$0")/.."

config="${1:-config/reflow_1.py}"
[ -f data/openwebtext/meta.json ] || python data/openwebtext/prepare.py
torchrun --standalone --nproc_per_node=4 train.py "$config" --resume
