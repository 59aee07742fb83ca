"""A tiny Llama with and without liger-kernel's kernels, in Triton's interpreter: it has to be asked for before any import."""

from __future__ import annotations

import copy
import json

import liger_kernel.ops.rms_norm
import triton.language as tl

from ows_lightning.models.execution import apply_liger_kernels_
from ows_lightning.models.loss import next_token_loss
from tests.tiny import tiny_batch, tiny_model

liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # that of CUDA's library has no body in the interpreter
own = tiny_model("llama", num_hidden_layers=2)
fused = copy.deepcopy(own)
losses = [next_token_loss(own, tiny_batch(2, 9))[0] / 16]
apply_liger_kernels_(fused)
losses.append(next_token_loss(fused, tiny_batch(2, 9))[0] / 16)
for loss in losses:
    loss.backward()
pairs = [(p.grad, q.grad) for p, q in zip(own.parameters(), fused.parameters(), strict=True)]
later = tiny_model("llama", num_hidden_layers=1)
print(
    json.dumps(
        {
            "losses": [loss.item() for loss in losses],
            "gradients": max(float((p - q).abs().max()) for p, q in pairs if p is not None and q is not None),
            "fused": [repr(fused.model.layers[0].input_layernorm), repr(fused.model.layers[0].mlp)],
            "same_weights": list(own.state_dict()) == list(fused.state_dict()),
            "head": "forward" in vars(fused),
            "later": [type(later.model.norm).__name__, type(later.model.layers[0].mlp).__name__],
        }
    )
)
