"""Packing: how several documents share a row, and whether a model keeps them apart."""

import torch

from ows_lightning.data.rows import collate, join_documents
from ows_lightning.errors import UsageError
from ows_lightning.models.causal_lm import eval_mode, run_causal_lm
from ows_lightning.models.decoder import language_model_of


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Puts documents of these lengths into rows, the longest first, each into the one in which it leaves the least room."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room -> rows that have exactly this much left
    has_room = 0  # bit r is set when with_room[r] is not empty, so that the best fit is found without a search
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        if fitting := has_room >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            has_room ^= 0 if with_room[room] else 1 << room
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(document)
        with_room[room - length].append(row)
        has_room |= 1 << (room - length)
    return rows


@torch.no_grad()
def require_separate_documents(model: torch.nn.Module, flatten: bool) -> None:
    """Refuses a model (any module that contains a causal LM, sharded or not) that lets packed documents see each other.

    transformers keeps them apart by their restarting positions, but not in every architecture: OPT and models with ALiBi make
    a mask of their own. So we test it on a few tokens: a document's logits must not depend on what stands before it.
    """
    one, other, probe = [1, 2, 3, 4, 5], [6, 7, 8, 9], [9, 3, 7]
    rows = [[one, probe], [other, one[:1], probe], [probe, other, one[:1]]]
    batch = collate([join_documents([(ids, ids) for ids in row], True) for row in rows], pad_token_id=0, flatten=flatten)
    inputs = {k: v.to(next(model.parameters()).device) for k, v in batch.items() if k != "labels"}
    with eval_mode(model):
        logits = run_causal_lm(model, **inputs, use_cache=False).logits
    first, second, alone = logits.flatten(0, 1).view(3, 8 if flatten else -1, logits.size(-1)).float()
    tolerance = min(64 * torch.finfo(logits.dtype).eps, 1 / 16) * alone.abs().max()  # 64 eps are half of it in bfloat16
    if any((logit[5:8] - alone[:3]).abs().max() > tolerance for logit in (first, second)):
        lm = language_model_of(model)
        name = type(getattr(lm, "base_model", lm)).__name__
        raise UsageError(f"data.packing: {name} would mix the documents of a row; set data.packing: false")
