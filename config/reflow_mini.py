"""
A small model on the offline corpus: 4 layers of width 256 over GPT-2's first 8,192 tokens, one pass.

    python data/offline/prepare.py --debian --tokenizer=gpt2-8192
    python train.py config/reflow_mini.py

Validation loss: 3.222 (1.352 bits per byte) over the whole split. With S = d the product of recipes and basis
can be any matrix, so that nothing is lost against gpt2_new_mini by rank, and every rotation of the signals is
a fair control. release/reflow-mini holds the trained weights.

It and its baseline, each on one of two cores with bf16 instructions, take 105 minutes (6,450 tokens/s each).
Shape and optimiser were chosen by short runs (LOG.md); the learning rate was not.
"""

out_dir = "out/reflow-mini"
dataset = "offline-gpt2-8192"
n_layer = 4
n_head = 8
n_embd = 256
n_signal = 256
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
