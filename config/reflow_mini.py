"""
A small model on the offline corpus: 6 layers of width 256, S = d; one pass over its 34 million tokens.

    python data/offline/prepare.py --debian
    python train.py config/reflow_mini.py

Validation loss: not trained yet. With S = d the product of recipes and basis can be any matrix, so that
nothing is lost against gpt2_new_mini by rank, and every rotation of the signals is a fair control.
"""

out_dir = "out/reflow-mini"
dataset = "offline"
n_layer = 6
n_head = 4
n_embd = 256
n_signal = 256
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
