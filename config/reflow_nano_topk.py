"""
reflow_nano with hard sparsity: a recipe keeps its 16 largest positive signals of 128.

    python train.py config/reflow_nano_topk.py
"""

out_dir = "out/reflow-nano-topk"
dataset = "sotu-gpt2-8192"
n_layer = 4
n_head = 4
n_embd = 128
vocab = "topk"
n_signal = 128
top_k = 16
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
