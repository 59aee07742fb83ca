"""Optimizer states come back in the dtype in which they were saved; torch casts all but ``step`` to the parameter's."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def saved_tensors(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Yields a state dict's tensors, of any shapes: the parameter of this optimizer, the key, the tensor."""
    numbers = (number for group in state_dict["param_groups"] for number in group["params"])
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for number, p in zip(numbers, parameters, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                yield p, key, value.detach()


def keep_state_dtypes(optimizer: Optimizer) -> None:
    """Makes an optimizer load its state in the saved dtypes; of torch's optimizers only scalars (NAdam's ``mu_product``)."""
    loading: dict[str, Any] = {}
    from_torch = type(optimizer).__module__.startswith("torch.optim")

    def restore(_: Optimizer) -> None:
        for p, key, value in saved_tensors(optimizer, loading):
            loaded = optimizer.state[p][key]
            if value.dtype != loaded.dtype and not (from_torch and value.dim()):  # torch's moments follow their weight's dtype
                optimizer.state[p][key] = value.to(loaded.device, copy=True)
        loading.clear()

    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: loading.update(state_dict))
    optimizer.register_load_state_dict_post_hook(restore)
