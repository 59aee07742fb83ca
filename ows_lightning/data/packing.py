"""Packing: several documents in one row, without padding; they don't see each other."""

from __future__ import annotations

import torch

from ows_lightning.data.rows import as_item, collate
from ows_lightning.errors import UsageError
from ows_lightning.models.causal_lm import run_causal_lm
from ows_lightning.models.decoder import causal_lm


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Puts documents of so many tokens into as few rows of at most `max_length` as best-fit decreasing finds.

    The longest document goes first, each into the row that it leaves the least room in. Returns each row's documents.
    """
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
    a mask of their own. So we test it on a few tokens: the logits of a document must not depend on what stands before it
    in the row.
    """
    one, other, probe = [1, 2, 3, 4, 5], [6, 7, 8, 9], [9, 3, 7]
    rows = [[one, probe], [other, one[:1], probe], [probe, other, one[:1]]]
    batch = collate([as_item([(ids, ids) for ids in row], True) for row in rows], pad_token_id=0, flatten=flatten)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
    logits = run_causal_lm(model, **inputs, use_cache=False).logits
    model.train(training)
    first, second, alone = logits.flatten(0, 1).view(3, 8 if flatten else -1, logits.size(-1)).float()
    tolerance = 64 * torch.finfo(logits.dtype).eps * alone.abs().max()
    if any((said[5:8] - alone[:3]).abs().max() > tolerance for said in (first, second)):
        lm = causal_lm(model)
        name = type(getattr(lm, "base_model", lm)).__name__
        raise UsageError(f"data.packing: {name} would mix the documents of a row; set data.packing: false")
