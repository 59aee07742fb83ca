"""Several documents in one row, without padding and without one seeing another."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ows_lightning.errors import UsageError


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Put documents into as few rows of `max_length` tokens as best-fit decreasing finds.

    The longest document goes first, each into the row that it leaves the least room in.

    Args:
        lengths: Tokens of every document, none above `max_length`.
        max_length: Tokens of a row.

    Returns:
        For every row the indices of its documents.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room -> rows that have just this room
    has_room = 0  # bit r is set when with_room[r] is not empty, so that the best fit is found without a search
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        fitting = has_room >> length
        if fitting:
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


def require_position_ids(model: torch.nn.Module) -> None:
    """Refuse a model that can't keep packed documents apart.

    transformers finds the documents of a row by their restarting positions; a model whose `forward` takes none
    (BLOOM and Falcon with ALiBi) would let them see each other.

    Raises:
        UsageError: For such a model.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # LoRA: peft's own forward hides the arguments
        inner = inner.get_base_model()
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        name = type(inner).__name__
        raise UsageError(f"data.packing: {name} takes no position_ids, so packed documents would mix; set packing: false")
