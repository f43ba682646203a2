"""
reFlow-1-Small: 46,471,680 parameters on OpenWebText.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=4 train.py config/reflow_1_small.py

Published validation loss: 3.55. Not reproduced here.
"""

out_dir = "out/reflow-1-small"
n_layer = 6
n_head = 8
n_embd = 512
n_signal = 512
micro_batch_size = 11

dataset = "openwebtext"
block_size = 1024
batch_size = 176
max_steps = 50_000
warmup_steps = 1000
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
eval_interval = 500
eval_sequences = 352
save_interval = 1000
