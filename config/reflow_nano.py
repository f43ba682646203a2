"""
The default: a model that two CPU cores train in minutes on the embedded corpus.

    python train.py                    (this file is what it reads when it is given none)

Expect a validation loss of 5.66 (1.61 bits per byte) after 700 steps of 512 tokens, in a minute and a half on
two cores with bf16 instructions (4,540 tokens/s), in 4.5 minutes without (1,370). It has read 0.36M tokens:
it knows words, not facts.

Shape and schedule were chosen by measurement, for the lowest loss in five minutes (LOG.md): the vocabulary's
50,304 rows are most of the work, so few signals, and many small steps.
"""

out_dir = "out/reflow-nano"
dataset = "sotu-gpt2-8192"
vocab_size = 8256
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
lr = 3e-3
min_lr = 1e-4
eval_interval = 150
eval_sequences = 32
save_interval = 300
log_interval = 5
