"""Optimizer states come back in the dtype in which they were saved."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def keep_state_dtypes(optimizer: Optimizer) -> None:
    """Lets any optimizer of torch load its state as it was saved, from now on.

    torch casts all of it but ``step`` to the parameter's dtype. With bfloat16 weights, NAdam would go on with another product.
    """
    loading: dict[str, Any] = {}

    def remember(_: Optimizer, state_dict: dict[str, Any]) -> None:
        loading.update(state_dict)

    def restore(_: Optimizer) -> None:
        saved = (number for group in loading["param_groups"] for number in group["params"])
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        for number, p in zip(saved, parameters, strict=True):
            for key, value in loading["state"].get(number, {}).items():
                now = optimizer.state[p][key]
                if isinstance(value, Tensor) and value.dtype != now.dtype:
                    optimizer.state[p][key] = value.detach().to(now.device, copy=True)
        loading.clear()

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)
