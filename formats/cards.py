"""
The model card: README.md of an exported folder. One template; only the part on how to use the folder differs.
"""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import checkpoint
from data.datasets import dataset_of
from data.shards import read_name

CORPORA = {"sotu": None, "offline": None, "openwebtext": "Skylion007/openwebtext"}  # of data/: id on the hub
PACKAGED = {"smollm2": ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")}  # licence, id on the hub
CARD = """\
{header}# {title}

A reFlow language model, {vocabulary}: {parameters:,} parameters,
{n_layer} layers, width {n_embd}, context {block_size} tokens, {tokenizer} tokenizer, weights in {dtype}.

- {origin}
- Validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte{rounded}.
- Licence of the weights: {licence}.
- A research model: it has no safety training and knows no facts worth relying on.

{usage}
Written by `python export.py --run={source} --form={form} --dtype={dtype}{base} --to={folder}`.
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
corpus and have no baseline, so some numbers and verdicts differ.
"""


def describe_vocabulary(config):
    """A phrase for the vocabulary of a ModelConfig."""
    if config.vocab == "dense":
        return "its vocabulary one dense matrix"
    core = f" and a dense core of rank {config.n_core}" if config.n_core else ""
    more = {
        "topk": f", {config.top_k} to a token",
        "sparse": f", {config.n_nonzero} to a token on average, beside a mean{core}",
        "gains": " with gains of their own at the input",
    }
    return f"its vocabulary a product of recipes and {config.signals} signals{more.get(config.vocab, '')}"


def describe_origin(ckpt):
    """Where a Checkpoint's weights come from; with the licence of the training text, if that is known."""
    train = ckpt.train_config
    if "imported_from" in train:
        return f"Imported from `{train['imported_from']}`.{describe_upcycling(ckpt)}"
    origin = f"Trained on `{train.get('dataset')}`, {ckpt.step:,} steps."
    licence = text_licence(ckpt)
    if licence:
        origin += f" Licence of its texts, in the words of the dataset's `meta.json`: {licence.rstrip('.')}."
    return origin


def describe_upcycling(ckpt):
    """What sparse recipes have cost a model that had others, as upcycle.py measured it; "" if it has none."""
    if "upcycled" not in ckpt.state:
        return ""
    how, rows = (ckpt.state["upcycled"][key] for key in ("settings", "measured"))
    costs = [row["KL"] for row in rows.values() if isinstance(row, dict) and "KL" in row]
    text = how["dataset"] or ckpt.train_config.get("dataset", "sotu")
    return (
        f" Its recipes are by upcycle.py, from text of `{Path(text).name}`. They change its predictions by a"
        f" KL of {costs[-1]:.3f} nats per token on held-out text of `{Path(how['test'] or text).name}`."
    )


def text_licence(ckpt):
    """Licence of a Checkpoint's training text: of that data set, or kept in a release; None if unknown."""
    dataset = dataset_of(ckpt.state)
    return dataset.meta.get("licence") if dataset else ckpt.state.get("text_licence")


def corpus_of(ckpt):
    """Name of the corpus that a Checkpoint was trained on, in whatever tokens."""
    return read_name(ckpt.train_config.get("dataset") or "")[0]


def trained_here(ckpt):
    """Whether a Checkpoint was trained here, from scratch, on a corpus of data/, all of which are English."""
    train = ckpt.train_config
    return corpus_of(ckpt) in CORPORA and not (train.get("imported_from") or train.get("init_from"))


def packaged(ckpt):
    """(licence, id on the hub) of a Checkpoint imported from a package that is known here; (None, None)."""
    return PACKAGED.get((ckpt.train_config.get("imported_from") or "").partition(":")[0], (None, None))


def weights_licence(ckpt):
    """Licence of a Checkpoint's weights; None if nobody here knows it."""
    return "MIT" if trained_here(ckpt) else packaged(ckpt)[0]


def losses(ckpt):
    """{"loss": nats per token, "bits_per_byte": ...} on held-out text, the whole split's if that is known."""
    return {
        "loss": ckpt.state["whole_val_loss"] or ckpt.state["val_loss"],
        "bits_per_byte": ckpt.state["bits_per_byte"],
    }


def metadata(ckpt, name, form):
    """What the hub reads at the head of a card, a dict: licence, language, data, measured values, origin."""
    train = ckpt.train_config
    dataset, corpus = Path(train.get("dataset", "sotu")).name, CORPORA.get(corpus_of(ckpt))
    own = trained_here(ckpt)
    named = {"loss": "Validation loss, nats per token", "bits_per_byte": "Bits per byte"}
    values = {key: value for key, value in losses(ckpt).items() if math.isfinite(value)}
    result = {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": corpus or dataset, "name": dataset, "split": "validation"},
        "metrics": [{"type": key, "name": named[key], "value": round(v, 4)} for key, v in values.items()],
    }
    data = {"license": (weights_licence(ckpt) or "unknown").lower()}
    if own:
        data["language"] = ["en"]
        data["datasets"] = [corpus] if corpus else None
    data["base_model"] = packaged(ckpt)[1] or base_model(train.get("imported_from") or "")
    data["library_name"] = "transformers" if form == "llama" else "reflow"
    data["pipeline_tag"] = "text-generation"
    data["tags"] = ["reflow", "interpretability"] + ["llama"] * (form == "llama")
    data["metrics"] = list(values)
    data["model-index"] = [{"name": name, "results": [result]}]
    return {key: value for key, value in data.items() if value}


def base_model(source):
    """owner/name of a model that was imported from the hub's cache (.../models--owner--name/...), or None."""
    found = re.search(r"models--([^/\\]+)--([^/\\]+)", source)
    return f"{found[1]}/{found[2]}" if found else None


def front_matter(data):
    """A dict as the YAML at the head of a card. A value is JSON, which YAML contains."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]
    return "\n".join(["---", *lines, "---", "", ""])


def model_card(ckpt, net, to, form, dtype, base=None):
    """README.md for the Checkpoint `ckpt`, loaded as `net`, written to the folder `to`.

    `form` is "llama" or "reflow", `dtype` the precision of the weights, as --form and --dtype spell them.
    `base`: the Checkpoint that has the weights which are left out.
    """
    config = net.config
    usage = RELEASE if form == "reflow" else LLAMA
    if base:
        make = checkpoint.remedy_of_base(base.name, base.train_config.get("imported_from"))
        usage = f"The blocks are those of the run {base.name}, which must be here: {make}.\n\n" + usage
    if form == "llama" and config.vocab != "dense":
        usage += SIGNALS
    source = ckpt.path
    if "release" in ckpt.state and "out_dir" in ckpt.train_config:  # the run that it was made of
        source = f"{ckpt.train_config['out_dir']}/step_{ckpt.step:06d}"
    names = {"folder": to, "title": to.name, "form": form, "dtype": dtype, "n_tokens": config.n_tokens}
    measured = losses(ckpt)
    facts = {
        "header": front_matter(metadata(ckpt, to.name, form)),
        "vocabulary": describe_vocabulary(config),
        "tokenizer": ckpt.state.get("tokenizer", "gpt2").replace("gpt2", "GPT-2"),
        "parameters": sum(p.numel() for p in net.parameters()),
        "origin": describe_origin(ckpt),
        "licence": weights_licence(ckpt) or "not known here; state it before you share them",
        "loss": measured["loss"],
        "bits": measured["bits_per_byte"],
        "rounded": "" if dtype == "fp32" else ", before the weights were rounded",
        "usage": usage.format(**names),
        "source": source,
        "base": f" --base=out/{base.name}" if base else "",
    }
    return CARD.format(**asdict(config) | names | facts)
