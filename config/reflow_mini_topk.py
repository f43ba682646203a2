"""
reflow_mini with hard sparsity: a recipe keeps its 32 largest positive signals of 256.

    python data/offline/prepare.py --debian
    python train.py config/reflow_mini_topk.py

Validation loss: not trained yet.
"""

out_dir = "out/reflow-mini-topk"
dataset = "offline"
n_layer = 6
n_head = 4
n_embd = 256
vocab = "topk"
n_signal = 256
top_k = 32
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
