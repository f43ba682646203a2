"""
The plain baseline of reflow_nano: same backbone, data, order and steps, with one tied embedding matrix.

    python train.py config/gpt2_new_nano.py
"""

out_dir = "out/gpt2-new-nano"
dataset = "sotu-gpt2-8192"
n_layer = 4
n_head = 4
n_embd = 128
vocab = "dense"
recipe_init_std = 0.05
block_size = 256
batch_size = 4
micro_batch_size = 4
max_steps = 600
warmup_steps = 60
optimizer = "muon"
lr = 3e-3
min_lr = 1e-4
eval_interval = 150
eval_sequences = 32
save_interval = 300
log_interval = 5
