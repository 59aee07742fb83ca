"""Which parameters are projected: a model's parameters as groups for GaLoreAdamW."""

from typing import Any

from torch import nn

from ows_lightning.models.decoder import decoder_layers, is_matrix, non_block_parameters
from ows_lightning.optim.galore import ProjType
from ows_lightning.optim.subspace import SubspaceMethod


def galore_param_groups(
    model: nn.Module, rank: int | None = 128, update_proj_gap: int = 200, scale: float = 1.0,
    proj_type: ProjType = "std", subspace: SubspaceMethod = "randomized", project_embeddings: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Splits a causal LM's trainable parameters into a projected group (GaLore, arXiv 2403.03507) and two full-rank groups.

    Call it before anything is frozen: a parameter that is in no group never trains.

    Args:
        model: A module that contains a causal LM.
        rank: Rank r of the projected gradients; with None the first group is of full rank, too.
        update_proj_gap: Optimizer steps T between two renewals of a subspace.
        scale: Factor alpha of the projected updates.
        proj_type: The dimension that is projected: ``std`` the smaller, ``reverse_std`` the larger, or ``left`` / ``right``.
        subspace: ``randomized``, ``svd`` or ``random``.
        project_embeddings: Also project the embeddings and the LM head.

    Returns:
        Groups of ``(name, parameter)`` pairs: the weight matrices of the decoder blocks (with 3-D expert weights), other
        matrices in full rank, and vectors (norms, biases) without weight decay. Empty groups are left out.

    Raises:
        UsageError: The model has no decoder blocks.
    """
    projected = {p for name, p in decoder_layers(model).named_parameters() if is_matrix(name, p)}
    if project_embeddings:
        outside = non_block_parameters(model)
        projected |= {p for part in ("embeddings", "lm_head") for p in outside[part] if p.dim() == 2}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    options = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, "subspace": subspace}
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in trainable if p in projected], **({"scale": scale} if rank is None else options)},
        {"params": [(name, p) for name, p in trainable if p not in projected and is_matrix(name, p)]},
        {"params": [(name, p) for name, p in trainable if not is_matrix(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
