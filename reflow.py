"""
A trained model in Python: what each signal says, exactly.

    from reflow import load
    m = load("release/reflow-mini")
    m.attribute("The capital of France is", "Paris", foil="London").top(5)
"""

import torch

import attribution
import checkpoint
import dictionary
from data.datasets import run_words
from data.tokenizer import encoding
from data.words import token_text
from hardware import pick_device


class Attribution:
    """What each signal adds to logit[target] - logit[foil] after a prompt; they sum to it exactly."""

    def __init__(self, pred, native, words, prompt):
        self.prompt = prompt
        self.target = token_text(pred.target[0])
        self.foil = token_text(pred.foil[0])
        self.contributions = attribution.contributions(pred, native)[0].cpu().numpy()  # (S,)

    def top(self, k=10):
        return self


class Model:
    """A trained model with its words. `net` and `words` are loaded unless given."""

    def __init__(self, ckpt, device="auto", net=None, words=None):
        self.checkpoint = ckpt
        self.device = pick_device(device) if isinstance(device, str) else device
        self.net = net or ckpt.load_model(self.device)
        self.dictionary = dictionary.native(self.net)
        self.words = words or run_words(ckpt.path, ckpt.state)

    def attribute(self, prompt, target=None, foil=None):
        """The Attribution of the next token after `prompt`."""
        ids = encoding().encode_ordinary(prompt)[-self.net.config.block_size :]
        pred = attribution.predict(self.net, torch.tensor([ids], device=self.device))
        if target is not None:
            top = pred.target.clone()
            pred.target[0] = encoding().encode_ordinary(" " + target.strip())[0]
            pred.foil = torch.where(top == pred.target, pred.foil, top)
        return Attribution(pred, self.dictionary, self.words, prompt)


def load(run=None, device="auto"):
    """The Model of a run, one of its step_... folders, or a release. Raises UserError."""
    return Model(checkpoint.open_run(run), device)
