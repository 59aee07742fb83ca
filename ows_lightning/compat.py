"""Private names of other libraries that this package calls, each with the reason and what replaces it if it is removed.

Other files use private names only where nothing else will do; ``tests/test_compat.py`` lists each with its reason. Needs torch
alone; others are passed in, or imported when they are used.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


def in_backward() -> bool:
    """Whether autograd is running backward in this thread, as it is while a checkpointed block is recomputed."""
    return backward_pass_id() != -1


def backward_pass_id() -> int:
    """The number of this thread's backward pass, -1 outside any. When it is gone: set a flag in a pre-hook of the loss."""
    return torch._C._current_graph_task_id()


def on_backward_end(callback: Callable[[], None]) -> None:
    """Calls a function when the backward pass that is running ends, as in DDP. When it is gone: a hook on what comes last."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def version_counter(tensor: Tensor) -> int:
    """The number of in-place writes to a tensor, except those through ``data``. When it is gone: compare checksums."""
    return tensor._version


def gradient_hooks(p: Tensor) -> list[Callable[..., Any]]:
    """The hooks on a parameter's gradient, before or after it is added to ``grad``. When they are gone: a registry of ours."""
    return [*(p._backward_hooks or {}).values(), *(p._post_accumulate_grad_hooks or {}).values()]


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, also fake ones. When it is gone: ``untyped_storage()`` in a WeakKeyDictionary."""
    return int(tensor.untyped_storage()._cdata)


def allow_recompilation(times: int) -> None:
    """Raises torch's limit of 8 compiled variants of a function, shared by a class's blocks. When it is gone: leave it out."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, times)


def keep_recomputation_out_of_inference_graphs() -> None:
    """Lets a checkpointed block be compiled for the case that nothing in it requires a gradient.

    torch 2.13 to 2.15 refuse random operations, such as attention, there. When it is gone: call it without ``checkpoint``.
    """
    if hasattr(torch._functorch.config, "remat_using_tags_for_fwd_loss_bwd_graph"):
        torch._functorch.config.remat_using_tags_for_fwd_loss_bwd_graph = False


# One kernel for many tensors on a GPU, as in torch.optim; they have no public name. When they are gone: a loop.
foreach_mul_, foreach_norm = torch._foreach_mul_, torch._foreach_norm


def local_shape_and_offset(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this process's part of a DTensor, and where it begins in the whole. When it is gone: sum over processes."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, to be replaced in place. When it is gone: ``setattr``, which changes their order."""
    return module._parameters


def replace_parameters_(model: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> None:
    """Replaces each parameter by what a function makes of it, in the same order; shared ones stay shared."""
    made = {p: nn.Parameter(make(p), requires_grad=p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        own_parameters(module).update({name: made[p] for name, p in own_parameters(module).items() if p is not None})


def persistent_buffer_names(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that belong to its state. When it is gone: compare with ``state_dict``."""
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]


def attn_implementation_of(config: Any) -> str | None:
    """The attention that transformers chose for a model (``sdpa``, ``eager``, ...). When it is gone: `flash` is unknown."""
    return getattr(config, "_attn_implementation", None)


_answers = threading.local()  # by name, to transformers' checks of masks; other threads of this process ask them


@contextmanager
def known_mask_checks(padded: bool, packed: bool) -> Iterator[None]:
    """Answers transformers' checks of mask values, which wait for a GPU, in this thread. When they are gone: leave it out."""
    _patch_mask_checks()
    vars(_answers).update(
        fast_all=lambda mask: not padded,
        find_packed_sequence_indices=lambda at: (at.diff(prepend=at[:, :1] - 1) != 1).cumsum(-1) if packed else None,
        warn_if_padding_and_no_attention_mask=lambda *args: None,
    )
    try:
        yield
    finally:
        vars(_answers).clear()


@functools.cache
def _patch_mask_checks() -> None:
    from transformers import PreTrainedModel, masking_utils

    def answered(check: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(_answers, check.__name__, check)(*args, **kwargs)

    checks = {"fast_all", "find_packed_sequence_indices", "warn_if_padding_and_no_attention_mask"}
    for owner in (masking_utils, PreTrainedModel):
        for name in checks & vars(owner).keys():
            setattr(owner, name, answered(getattr(owner, name)))


def keep_in_float32_(model: Any, dtype: torch.dtype) -> None:
    """Gives weights float32 that ``from_pretrained`` keeps in it (routers of experts). When it is gone: load one to see."""
    from transformers.core_model_loading import build_glob_alternation

    if patterns := [*model._get_dtype_plan(dtype)]:
        kept, *_ = build_glob_alternation(patterns)
        for name, p in model.state_dict(keep_vars=True).items():  # buffers, too
            if kept.search(name):
                p.data = p.data.float()


def drop_input_gradients(model: Any) -> None:
    """Removes the hooks that make embeddings require a gradient, unless checkpointing is reentrant. When gone: keep them."""
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    if {getattr(f, "keywords", {}).get("use_reentrant") for f in functions if f is not None} == {False}:
        for hooks in [module._forward_hooks for module in model.modules()]:  # transformers forgets all but its newest one
            for key in [key for key, hook in hooks.items() if "make_inputs_require_grad" in getattr(hook, "__name__", "")]:
                del hooks[key]


def without_weight_conversions(model: Any) -> Any:
    """A copy of a transformers model that forgot its files' layout. When it is gone: pass the model."""
    plain = copy.copy(model)
    plain._weight_conversions = None
    return plain


def faster_gguf_loading() -> AbstractContextManager[Any]:
    """Makes ``gguf`` slice an array instead of a ``memmap``, and make its map of names once, while transformers loads a file.

    Both happen very often: loading SmolLM2 with its tokenizer takes 6 s instead of 19. When they are gone: leave this out.
    """
    import gguf
    import numpy as np

    class QuickReader(gguf.GGUFReader):
        data = property(lambda self: self.array, lambda self, mapped: setattr(self, "array", mapped.view(np.ndarray)))

    return patch.multiple(gguf, GGUFReader=QuickReader, get_tensor_name_map=functools.cache(gguf.get_tensor_name_map))


def fingerprint(dataset: Any) -> str:
    """The hash that ``datasets`` has of a data set's contents, equal in all processes. When it is gone: hash the rows."""
    return str(dataset._fingerprint)


def mark_step_saved(callback: Any, step: int) -> None:
    """Tells Lightning's ModelCheckpoint that a step is saved. When it is gone: a resumed run saves its first step twice."""
    callback._last_global_step_saved = step


def logged_in_validation(trainer: Any) -> set[str]:
    """Names of the metrics that validations of a fit have logged so far. When it is gone: those that begin with ``val_``."""
    return {entry.meta.name for entry in trainer.fit_loop.epoch_loop.val_loop._results.values()}
