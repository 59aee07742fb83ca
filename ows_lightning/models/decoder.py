"""Finds the decoder blocks of a causal LM by the model's structure, and what lies outside them."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, TypeGuard, get_args

from torch import Tensor, nn

from ows_lightning.errors import UsageError

Part = Literal["embeddings", "lm_head", "norm"]
NON_BLOCK_PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of a model outside its blocks, as ``always_train`` names them, see `non_block_parameters`."""


def language_model_of(model: nn.Module) -> nn.Module:
    """Returns the transformers model with an LM head that a module is or contains, or the module itself if there is none.

    Of several (a teacher beside its student) it is the one in the module's optimizer, or else the first that trains.
    """
    pretrained = [module for module in model.modules() if _is_pretrained(module)]
    candidates = [module for module in pretrained if module.get_output_embeddings() is not None] or pretrained
    if len(candidates) > 1:
        # A LightningModule's; before a fit it has none.
        optimizers = getattr(getattr(model, "_trainer", None), "optimizers", None) or []
        held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for trained in (held, {p for p in model.parameters() if p.requires_grad}):
            if own := [module for module in candidates if not trained.isdisjoint(module.parameters())]:
                return own[0]
    return next(iter(candidates), model)


def backbone(model: Any) -> nn.Module:
    """Returns the part of a causal LM of transformers below its LM head."""
    # Llama 4's text model has no name of its own for it.
    return _decoder_and_layers(model)[0] if model.base_model is model else model.base_model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Returns the decoder blocks of the causal LM in `model`, first block first.

    The blocks are the outermost `nn.ModuleList` that holds the most parameters; in a vision-language model only the language
    part is searched; no model is known by its name. The list is the model's own: shortening it shortens the model.

    Args:
        model: A causal LM, or any module that contains one (LightningModule, peft model, vision-language model).

    Raises:
        UsageError: There is no list of blocks in the model.
    """
    return _decoder_and_layers(model)[1]


def non_block_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sorts the parameters outside the decoder blocks by what they belong to.

    They are under `embeddings` (of tokens and positions), `lm_head`, `norm` (the rest of the decoder, usually its final norm)
    and `other` (a vision tower, say, or a second stack of blocks); a head tied to the embeddings is under both.
    """
    holder, layers = _decoder_and_layers(model)
    language_model = language_model_of(model)
    head = language_model.get_output_embeddings() if _is_pretrained(language_model) else None
    in_blocks = set(layers.modules())
    # An adapter of peft's lies in a layer around the embeddings.
    found = (m for m in holder.modules() if isinstance(getattr(m, "base_layer", m), nn.Embedding))
    embeddings = nn.ModuleList(m for m in found if m not in in_blocks)
    groups = {"embeddings": list(embeddings.parameters()), "lm_head": [] if head is None else list(head.parameters())}
    placed = {*layers.parameters(), *groups["embeddings"], *groups["lm_head"]}
    groups["norm"] = [p for p in holder.parameters() if p not in placed]
    placed.update(groups["norm"])
    groups["other"] = [p for p in model.parameters() if p not in placed]
    return groups


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is a matrix, or several in one; experts' biases, which have two dimensions as well, are none."""
    return p.dim() >= 2 and not name.endswith("bias")


def _is_pretrained(module: nn.Module) -> TypeGuard[Any]:
    """Whether a module's class has the methods of transformers' models; peft's wrapper only passes them on."""
    return all(hasattr(type(module), name) for name in ("get_output_embeddings", "get_decoder"))


def on_device(block: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which a block's weights are on the device where it computes, also if the block is offloaded."""
    offloader = getattr(block, "offloader", None)
    return contextlib.nullcontext() if offloader is None else offloader.on_device(block)


def end_offloaded_pass(block: nn.Module) -> None:
    """Ends an offloaded block's pass: its parameters are its own weights again, with what they learned at rest merged in."""
    if (offloader := getattr(block, "offloader", None)) is not None:
        offloader.end_pass()
        offloader.merge_updates()


def _decoder_and_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Returns the module that directly holds the list of blocks, and that list."""
    language_model = language_model_of(model)
    candidates = list(_outermost_lists(language_model.get_decoder())) if _is_pretrained(language_model) else []
    candidates = candidates or list(_outermost_lists(language_model))  # what some classes call `decoder` is their head
    sizes = [sum(p.numel() for p in layers.parameters()) for _, layers in candidates]
    if not any(sizes):
        fault = f"{type(language_model).__name__} has no decoder blocks (an nn.ModuleList that holds parameters)"
        raise UsageError(f"model: {fault}; put its blocks into one, or give a decoder-only transformer")
    return candidates[sizes.index(max(sizes))]


def _outermost_lists(module: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Yields every `nn.ModuleList` that lies in no other one, with the module whose attribute it is."""
    stacked = Counter(type(child) for name, child in module.named_children() if name.isdigit())
    for child in module.children():
        if "text" not in getattr(type(child), "input_modalities", "text"):
            continue  # a tower for images or sound, which may be larger than the language model
        if isinstance(child, nn.ModuleList):
            yield module, child
        elif stacked[type(child)] < 2:  # blocks of an nn.Sequential have lists, too: of experts
            yield from _outermost_lists(child)
