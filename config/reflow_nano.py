"""
The default run: a small factored model on the embedded corpus, the State of the Union addresses.

    python train.py                    (without a config file it reads this one)

Expect 1.58 bits per byte (4.70 nats per token) after 600 steps of 1,024 tokens, in about a minute on two
cores with bf16 instructions. The model has read 0.61M tokens: it knows words, not facts.

Its tokens are the first 8,192 of GPT-2. With all 50,257, a step spends most of its time on the vocabulary,
and 1.61 bits per byte take 100 seconds. Shape and schedule were chosen by measurement (LOG.md).
"""

out_dir = "out/reflow-nano"
dataset = "sotu-gpt2-8192"
n_layer = 4
n_head = 4
n_embd = 128
n_signal = 128
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
