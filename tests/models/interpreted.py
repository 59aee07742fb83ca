"""A tiny Llama with and without liger-kernel's kernels, in Triton's interpreter: it has to be asked for before any import."""

from __future__ import annotations

import copy
import json
import tempfile
from typing import Any
from unittest import mock

import liger_kernel.ops.rms_norm
import liger_kernel.ops.rope
import triton.language as tl

from ows_lightning.memory.plan_settings import settings_from_config
from ows_lightning.memory.prediction import predict_memory
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


def launches(function: Any, *args: Any) -> int:
    with mock.patch.object(liger_kernel.ops.rope, "_triton_rope") as kernel:
        function(*args)
    return kernel.__getitem__.call_count


with tempfile.TemporaryDirectory() as folder:
    later.save_pretrained(folder)
    settings = settings_from_config(
        {"model": {"model_name_or_path": folder, "rank": 4}, "data": {"batch_size": 2, "max_seq_length": 9}}
    )
    launched = [launches(next_token_loss, later, tiny_batch(2, 9)), launches(predict_memory, settings)]
print(
    json.dumps(
        {
            "losses": [loss.item() for loss in losses],
            "gradients": max(float((p - q).abs().max()) for p, q in pairs if p is not None and q is not None),
            "fused": [repr(fused.model.layers[0].input_layernorm), repr(fused.model.layers[0].mlp)],
            "same_weights": list(own.state_dict()) == list(fused.state_dict()),
            "head": "forward" in vars(fused),
            "launched": launched,
            "later": [type(later.model.norm).__name__, type(later.model.layers[0].mlp).__name__],
        }
    )
)
