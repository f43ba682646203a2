"""
reFlow-1-Big: 515,056,640 parameters on OpenWebText; the counterpart of gpt2_new at equal depth.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=4 train.py config/reflow_1_big.py

Published validation loss: 2.92. Not reproduced here.
"""

out_dir = "out/reflow-1-big"
n_layer = 36
n_head = 16
n_embd = 1024
n_signal = 1024
micro_batch_size = 2

dataset = "openwebtext"
block_size = 1024
batch_size = 176
max_steps = 50_000
warmup_steps = 1000
lr = 6e-4
min_lr = 6e-5
weight_decay = 0.1
eval_interval = 500
eval_sequences = 352
save_interval = 1000
