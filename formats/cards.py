"""
The model card: README.md of an exported folder. One template; only the part on how to use the folder differs.
"""

from dataclasses import asdict

from data.datasets import dataset_of

CARD = """\
{header}# {title}

A reFlow language model, {vocabulary}: {parameters:,} parameters,
{n_layer} layers, width {n_embd}, context {block_size} tokens, GPT-2 tokenizer, weights in {dtype}.

- {origin}
- Validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte{rounded}.
- A research model: it has no safety training and knows no facts worth relying on.

{usage}
Written by `python export.py --run={source} --form={form} --dtype={dtype} --to={folder}`.
"""

HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [reflow, llama, interpretability]
---

"""

LLAMA = """\
The folder holds a Llama with tied embeddings, which computes the same function:

```python
from transformers import pipeline

generate = pipeline("text-generation", "{folder}")
print(generate("The American people", max_new_tokens=50, do_sample=True, top_k=200)[0]["generated_text"])
```

Ids from {n_tokens:,} on are padding; generation_config.json keeps them from being sampled.
`python export.py --from={folder} --to=out/imported` makes it a run again.
"""

SIGNALS = """
`reflow.safetensors` holds `recipes` (V x S) and `basis` (S x d), fp32. `recipes @ basis` is the embedding.
For the final, normalised residual stream h the logits are `(h @ basis.T) @ recipes.T`.
"""

RELEASE = """\
```sh
python sample.py --run={folder}
python experiments/run_all.py --run={folder}
python export.py --run={folder} --to=out/hf-{title}     # for other people's tools
```

`state.json` holds the configuration; there is no optimiser state. `counts.safetensors`, if there, says how
often each token was in training (the first 50,000 windows of it). Step 0, the control of many experiments, is
made again from the seed. Without the training data the experiments take held-out text from the embedded
corpus and have no baseline, so some numbers and verdicts differ. MIT licence.
"""


def describe_vocabulary(config):
    """A phrase for the vocabulary of a ModelConfig."""
    if config.vocab == "dense":
        return "its vocabulary one dense matrix"
    sparse = f", {config.top_k} to a token" if config.vocab == "topk" else ""
    return f"its vocabulary a product of recipes and {config.signals} signals{sparse}"


def describe_origin(ckpt):
    """Where a Checkpoint's weights come from; with the licence of the training text, if that text is here."""
    train = ckpt.train_config
    if "imported_from" in train:
        return f"Imported from `{train['imported_from']}`."
    origin = f"Trained on `{train.get('dataset')}`, {ckpt.step:,} steps."
    dataset = dataset_of(ckpt.state)
    licence = dataset.meta.get("licence") if dataset else None
    if licence:
        origin += f" Licence of its texts, in the words of the dataset's `meta.json`: {licence.rstrip('.')}."
    return origin


def model_card(ckpt, net, to, form, dtype):
    """README.md for the Checkpoint `ckpt`, loaded as `net`, written to the folder `to`.

    `form` is "llama" or "reflow", `dtype` the precision of the weights, as --form and --dtype spell them.
    """
    config = net.config
    usage = RELEASE if form == "reflow" else LLAMA
    if form == "llama" and config.vocab != "dense":
        usage += SIGNALS
    names = {"folder": to, "title": to.name, "form": form, "dtype": dtype, "n_tokens": config.n_tokens}
    facts = {
        "header": HEADER if form == "llama" else "",
        "vocabulary": describe_vocabulary(config),
        "parameters": sum(p.numel() for p in net.parameters()),
        "origin": describe_origin(ckpt),
        "loss": ckpt.state["whole_val_loss"] or ckpt.state["val_loss"],
        "bits": ckpt.state["bits_per_byte"],
        "rounded": "" if dtype == "fp32" else ", before the weights were rounded",
        "usage": usage.format(**names),
        "source": ckpt.path,
    }
    return CARD.format(**asdict(config) | names | facts)
