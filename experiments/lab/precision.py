"""
Forward passes of large models on a CPU: products with the blocks' weights in bf16, all else in fp32.

`--dtype=auto` does so from 1e8 parameters on, on a CPU with bf16 instructions.

Weight and input of a product are rounded to bf16, its sums are fp32. The residual stream, norms, attention,
the vocabulary and everything that is read from them stay in fp32. So the model's function changes a little
(KL 0.0005 nats for SmolLM2), in the same way for every dictionary and edit, and sums over signals stay exact.
"""

import torch
import torch.nn.functional as F

from hardware import pick_dtype

LARGE = 1e8  # parameters from which `auto` rounds: below, fp32 takes minutes at most


class RoundedLinear(torch.nn.Module):
    """A linear map in bf16, from and to fp32."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)

    def forward(self, x):
        """x (..., n) -> (..., m)."""
        return F.linear(x.bfloat16(), self.weight).to(x.dtype)


def rounded(net, dtype):
    """A ReFlow whose blocks compute in `dtype`, auto, fp32 or bf16: the net itself, its blocks changed."""
    if dtype == "auto":
        device = next(net.parameters()).device
        large = sum(p.numel() for p in net.parameters()) >= LARGE
        dtype = "bf16" if large and device.type == "cpu" and pick_dtype(device) == torch.bfloat16 else "fp32"
    for block in net.blocks if dtype == "bf16" else ():
        for part in (block.attn, block.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, RoundedLinear(linear))
    return net


def is_rounded(net):
    """Whether the blocks of a ReFlow compute in bf16."""
    return isinstance(net.blocks[0].attn.q, RoundedLinear)
