"""
The plain baseline of reflow_mini: same backbone, data, order and steps, with one tied embedding matrix.

    python data/offline/prepare.py --debian
    python train.py config/gpt2_new_mini.py

Validation loss: 5.5661 (1.921 bits per byte) over the whole split.
"""

out_dir = "out/gpt2-new-mini"
dataset = "offline"
n_layer = 6
n_head = 6
n_embd = 192
vocab = "dense"
recipe_init_std = 0.04
block_size = 256
batch_size = 4
micro_batch_size = 4
max_steps = 3000
warmup_steps = 150
lr = 2e-3
min_lr = 1e-4
eval_interval = 150
eval_sequences = 32
save_interval = 150
log_interval = 10
