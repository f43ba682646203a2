"""
GPT-2-New: the baseline, the same backbone with a plain tied embedding; 514,008,064 parameters on OpenWebText.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=4 train.py config/gpt2_new.py

Published validation loss: about 1 % below reFlow-1-Big's 2.92. Not reproduced here.
"""

out_dir = "out/gpt2-new"
vocab = "dense"
n_layer = 36
n_head = 16
n_embd = 1024
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
