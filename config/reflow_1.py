"""
reFlow-1, the published run: 463,668,224 parameters; OpenWebText, 50,000 steps of 176 x 1,024 tokens.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=4 train.py config/reflow_1.py

Published validation loss: 3.01 (4 x T4). Not reproduced here: --dry_run says about 90 hours on 4 x T4 and,
in fp16 without activation checkpointing, 11.1 GiB on each. 176 sequences are 88, 44 and 22
micro-batches of 2 on 1, 2 and 4 cards; 4 would need 14 GiB, too near a T4's 15. On a larger card raise
--micro_batch_size.
"""

out_dir = "out/reflow-1"
n_layer = 32
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
