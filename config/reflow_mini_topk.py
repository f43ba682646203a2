"""
reflow_mini with hard sparsity: a recipe keeps its 24 largest positive signals of 192.

    python data/offline/prepare.py --debian
    python train.py config/reflow_mini_topk.py

Validation loss: 6.1057 (2.107 bits per byte) over the whole split, in 24 minutes with bf16 instructions.
"""

out_dir = "out/reflow-mini-topk"
dataset = "offline"
n_layer = 6
n_head = 6
n_embd = 192
vocab = "topk"
n_signal = 192
top_k = 24
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
