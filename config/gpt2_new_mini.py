"""
The plain baseline of reflow_mini: same backbone, data, order and steps, with one tied embedding matrix.

    python data/offline/prepare.py --debian
    python train.py config/gpt2_new_mini.py

Validation loss: not trained yet.
"""

out_dir = "out/gpt2-new-mini"
dataset = "offline"
n_layer = 6
n_head = 4
n_embd = 256
vocab = "dense"
recipe_init_std = 0.05
block_size = 256
batch_size = 16
micro_batch_size = 4
max_steps = 8170
warmup_steps = 200
lr = 2e-3
min_lr = 1e-4
eval_interval = 430
eval_sequences = 64
save_interval = 430
log_interval = 10
