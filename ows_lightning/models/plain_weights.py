"""A model's weights as its files have them: without peft, each whole, with what adapters learned, and tied ones once."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ows_lightning.compat import own_parameters, persistent_buffer_names, replace_parameters_


class PlainWeight(NamedTuple):
    """A weight or buffer of the plain model: where it is now, and the adapter layers to merge into it."""

    name: str
    module: nn.Module
    attribute: str
    adapters: tuple[Any, ...]

    @property
    def tensor(self) -> Tensor:
        """The weight itself, without adapters."""
        return getattr(self.module, self.attribute)


def group_by_file_tensors(model: PreTrainedModel, weights: list[PlainWeight]) -> list[list[PlainWeight]]:
    """Sorts weights by the tensors of the files that they make: most by themselves, others joined into one."""
    shapes = {name: tensor.shape for name, tensor in file_layout(model, weights).items()}
    groups: list[list[PlainWeight]] = []
    joined: list[PlainWeight] = []
    for weight in weights:
        alone = all(tensor.shape == shapes.get(name) for name, tensor in file_layout(model, [weight]).items())
        groups.append([weight]) if alone else joined.append(weight)
    return [*groups, joined] if joined else groups


def file_layout(model: PreTrainedModel, weights: list[PlainWeight]) -> dict[str, Tensor]:
    """The tensors, without values, that weights make in files as on the hub: all experts may be one here, and many there."""
    empty = {w.name: torch.empty(w.tensor.shape, dtype=w.tensor.dtype, device="meta") for w in weights}
    return revert_weight_conversion(model, empty)


def weights_without_peft(module: Any, prefix: str = "", adapters: tuple[Any, ...] = ()) -> Iterator[PlainWeight]:
    """Yields the weights under the names that they have without peft, in the same order on every rank."""
    if hasattr(module, "base_layer"):  # a layer with an adapter; with several, one lies in the other
        yield from weights_without_peft(module.base_layer, prefix, (*adapters, module))
    elif hasattr(module, "token_adapter"):  # embeddings with a few trained rows
        yield from weights_without_peft(module.token_adapter, prefix)
    elif hasattr(module, "modules_to_save"):  # a module that is trained as a whole
        active = module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module.original_module
        yield from weights_without_peft(active, prefix)
    else:
        attributes = [*own_parameters(module), *persistent_buffer_names(module)]
        yield from (PlainWeight(prefix + a, module, a, adapters) for a in attributes if getattr(module, a) is not None)
        for name, child in module.named_children():
            yield from weights_without_peft(child, f"{prefix}{name}.")


def unique_weights(model: nn.Module) -> list[PlainWeight]:
    """Returns the weights as ``weights_without_peft`` does, but a tied one only once, under its name in files."""
    tied: Mapping[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    weights, known = [], set()
    for weight in sorted(weights_without_peft(model), key=lambda weight: weight.name in tied):
        identity = (id(weight.tensor), *map(id, weight.adapters))
        if weight.name not in tied or identity not in known:
            weights.append(weight)
        known.add(identity)
    return weights


@contextlib.contextmanager
def merged_weight(weight: PlainWeight) -> Iterator[Tensor]:
    """Yields the weight as one whole tensor with its adapters merged in; all ranks have to enter.

    The merge happens in copies that take the parameters' places for as long as it takes.
    """
    adapters = [adapter for adapter in weight.adapters if not adapter.merged]
    if not adapters:
        yield full_tensor(weight.tensor)
        return
    parameters = {module: dict(own_parameters(module)) for module in adapters[0].modules()}
    device = [*adapters[0].parameters()][-1].device  # the adapter's: what it is merged into may be offloaded
    try:
        replace_parameters_(adapters[0], lambda p: full_tensor(p).to(device, copy=True))
        for adapter in adapters:
            type(adapter).merge(adapter)  # not that of an offloaded layer, which would prepare it for writes
        yield weight.tensor
    finally:
        for adapter in adapters:
            adapter.merged_adapters.clear()
        for module, named in parameters.items():
            own_parameters(module).update(named)


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor as a whole, for which all ranks have to call it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
