"""
The plain baseline of reflow_mini: same backbone, data, order and steps, with one tied embedding matrix.

    python data/offline/prepare.py --debian --tokenizer=gpt2-8192
    python train.py config/gpt2_new_mini.py

Validation loss: 3.221 (1.351 bits per byte) over the whole split.
"""

out_dir = "out/gpt2-new-mini"
dataset = "offline-gpt2-8192"
n_layer = 4
n_head = 8
n_embd = 256
vocab = "dense"
recipe_init_std = 0.04
block_size = 256
batch_size = 16
micro_batch_size = 16
max_steps = 10_000
warmup_steps = 500
optimizer = "muon"
lr = 3e-3
min_lr = 1e-4
eval_interval = 500
eval_sequences = 32
save_interval = 500
log_interval = 10
