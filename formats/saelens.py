"""
The signals of a run as two dictionaries that SAELens reads (`SAE.load_from_disk`), architecture "abstopk".

    writing    at the last residual stream: codes = x @ pinv(atoms), and codes @ atoms is x again
    reading    at the final norm: codes = the activations A of the signals, so that logits are A @ codes.T

Codes are signed, and none is cut: k = S. SAELens' hook on the final norm comes before its gain, so the gain
is in the encoder of `reading`, whose decoder undoes the encoder. `recipes.safetensors` beside them has the
codes of all tokens, (V, S), fp32.
"""

import json

import torch
from safetensors.torch import save_file

import checkpoint
import dictionary
from configurator import UserError

VERSION = "6.54.12"  # of SAELens, whose files these are like


def write_saelens(ckpt, to):
    """Write the folders `to`/writing and `to`/reading of a Checkpoint. Raises UserError if it is dense."""
    net = ckpt.load_model(verified=True)
    if net.config.vocab == "dense":
        raise UserError(f"{ckpt.run} has no signals: --form=saelens is for runs with recipes")
    signals = dictionary.readable(net)
    atoms = signals.atoms.double()  # (S, d)
    gain = net.norm.weight.detach().double()  # (d,)
    read = gain[:, None] * atoms.T  # (d, S)
    last = f"blocks.{net.config.n_layer - 1}.hook_resid_post"
    parts = {
        "writing": (torch.linalg.pinv(atoms), atoms, last),
        "reading": (read, torch.linalg.pinv(read), "ln_final.hook_normalized"),
    }
    with checkpoint.whole_folder(to) as folder:
        for name, (encoder, decoder, hook) in parts.items():
            (folder / name).mkdir()
            write_dictionary(folder / name, encoder.float(), decoder.float(), hook, ckpt)
        save_file({"codes": signals.codes.contiguous()}, folder / "recipes.safetensors")


def write_dictionary(folder, encoder, decoder, hook, ckpt):
    """Write cfg.json and sae_weights.safetensors of W_enc (d, S) and W_dec (S, d) to a folder."""
    d, S = encoder.shape
    metadata = {
        "sae_lens_version": VERSION,
        "model_name": ckpt.name,
        "hook_name": hook,
        "prepend_bos": False,
        "context_size": ckpt.model_config["block_size"],
    }
    config = {
        "architecture": "abstopk",
        "k": S,
        "d_in": d,
        "d_sae": S,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": metadata,
    }
    weights = {"W_enc": encoder, "b_enc": torch.zeros(S), "W_dec": decoder, "b_dec": torch.zeros(d)}
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
