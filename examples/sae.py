"""
The signals of an exported run as a dictionary in the shape of a sparse autoencoder, and how well it serves.

    python export.py --run=out/reflow-nano --to=out/hf-nano
    python examples/sae.py --export=out/hf-nano

`SignalDictionary` has what SAE tools read: W_enc (d, S), W_dec (S, d), b_enc, b_dec, encode, decode. Nothing
is trained: W_dec is the basis, encode the least-squares code, exact for every token's embedding. Unlike an
SAE's, codes are signed and no ReLU makes them sparse. For each layer the script prints how much of the
residual stream's variance around its mean the dictionary explains, beside a random subspace of equal size.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataclasses import dataclass

import threads
import torch
from torch import nn

import checkpoint
import configurator
from configurator import UserError
from formats.llama import read_llama

TEXT = "Our first duty is to the people of the United States, who gave us this government and its laws. " * 8


@dataclass
class DictionaryConfig:
    export: str = "out/hf-nano"  # a folder that export.py wrote, of a factored or topk run
    seed: int = 0  # of the random subspace

    def __post_init__(self):
        configurator.check(self, configurator.SEED)


class SignalDictionary(nn.Module):
    """W_dec (S, d) are the signals' directions; codes (..., S) decode to vectors (..., d)."""

    def __init__(self, basis):
        super().__init__()
        self.W_dec = nn.Parameter(basis)  # (S, d)
        self.W_enc = nn.Parameter(torch.linalg.pinv(basis.double()).to(basis.dtype))  # (d, S)
        self.b_enc = nn.Parameter(torch.zeros(len(basis)))  # (S,)
        self.b_dec = nn.Parameter(torch.zeros(basis.size(1)))  # (d,)

    def encode(self, x):
        """x (..., d) -> the codes (..., S) whose decoding is nearest to x."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def decode(self, codes):
        """codes (..., S) -> (..., d)."""
        return codes @ self.W_dec + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))


def open_dictionary(folder):
    """(SignalDictionary, recipes (V, S): the codes of all tokens) of an exported folder. UserError."""
    tensors = checkpoint.load_tensors(Path(folder) / "reflow.safetensors")
    if not {"basis", "recipes"} <= tensors.keys():
        raise UserError(f"{folder}/reflow.safetensors has no basis and recipes: export a factored run")
    return SignalDictionary(tensors["basis"]), tensors["recipes"]


def explained(dictionary, x):
    """The share of the variance of x (N, d) around its mean that the dictionary's span holds."""
    x = x - x.mean(0)
    return 1 - ((x - dictionary(x)).square().sum() / x.square().sum()).item()


@torch.no_grad()
def main():
    (c,) = configurator.parse(DictionaryConfig)
    dictionary, _ = open_dictionary(c.export)
    found = read_llama(Path(c.export))
    model = checkpoint.build_model(found.config, found.weights)
    E, S = model.vocab.matrix(), len(dictionary.W_dec)
    print(f"{S} signals of width {E.size(1)}; embeddings are reconstructed to within", end=" ")
    print(f"{(dictionary(E) - E).abs().max():.1e}")
    generator = torch.Generator().manual_seed(c.seed)
    chance = SignalDictionary(torch.randn(dictionary.W_dec.shape, generator=generator))

    stream = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda block, inputs, output, i=i: stream.update({i: output[0]}))
    model(torch.tensor([found.tokenizer.encode_ordinary(TEXT)[: model.config.block_size]]))
    print("explained variance   signals   random subspace")
    for i, x in stream.items():
        print(f"after block {i:2}       {explained(dictionary, x):8.3f}  {explained(chance, x):8.3f}")


if __name__ == "__main__":
    configurator.run(main)
