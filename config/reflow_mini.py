"""
A small model on the offline corpus: 6 layers of width 192, S = d; 3.1M of the corpus' 34M tokens.

    python data/offline/prepare.py --debian
    python train.py config/reflow_mini.py

Validation loss: 5.5804 (1.926 bits per byte) over the whole split. With S = d the product of recipes and
basis can be any matrix, so that nothing is lost against gpt2_new_mini by rank, and every rotation of the
signals is a fair control. release/reflow-mini holds the trained weights.

Two CPU cores with bf16 instructions take 20 minutes (2,550 tokens/s). Shape and length were chosen for cores
without: 740 to 845 tokens/s in fp32, 1.3 hours, and a loss of 5.5726. There width 256 reaches 590 tokens/s,
and one pass over the corpus would take sixteen hours.
"""

out_dir = "out/reflow-mini"
dataset = "offline"
n_layer = 6
n_head = 6
n_embd = 192
n_signal = 192
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
