"""
reFlow-1-Lite: grouped-query attention and a narrower MLP; 337,839,104 parameters on OpenWebText.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=4 train.py config/reflow_1_lite.py

Published validation loss: none; the sizes of its parts are not published either and are ours.
"""

out_dir = "out/reflow-1-lite"
n_layer = 32
n_head = 16
n_kv_head = 4
n_embd = 1024
n_signal = 1024
n_hidden = 2048
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
