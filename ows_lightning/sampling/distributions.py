"""From the blocks' scores to the probability that each one trains."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ows_lightning.errors import UsageError, did_you_mean

Distribution = Literal[
    "outlier", "uniform", "decreasing", "increasing", "outlier_reverse", "weight_norm", "window", "gradient_norm"
]  # fmt: skip
OUTLIER_RATIO = "outlier_ratio_percent"
SCORE_NAMES = dict.fromkeys(("outlier", "outlier_reverse", "window"), OUTLIER_RATIO)
SCORE_NAMES |= {"weight_norm": "weight_norm", "gradient_norm": "gradient_norm"}
UNIFORM_SHARE = 0.1  # of `gradient_norm`, so that no block starves


def score_name(distribution: str | Sequence[float]) -> str | None:
    """Returns what a distribution is computed from, as tables and pictures call it; None where no scores are needed."""
    return SCORE_NAMES.get(distribution) if isinstance(distribution, str) else None


def stored_score_name(distribution: str | Sequence[float]) -> str:
    """Returns which score a run's file holds: its distribution's, or outlier ratios where the distribution needs no score."""
    return score_name(distribution) or OUTLIER_RATIO


def sampling_probabilities(ratios: Tensor | Sequence[float], distribution: str | Sequence[float] = "outlier") -> Tensor:
    """Turns the blocks' scores into sampling probabilities.

    Args:
        ratios: Shape (num_layers,), one score per block, first block first: the outlier ratios D_l in percent, or for
            `weight_norm` the norms of the weights. Distributions that need no score use only their number.
        distribution: How p_l follows from the scores, or a list of weights that replace the scores.

            - `outlier`: p_l = D_l / sum_k D_k, which is OWS (arXiv 2405.18380).
            - `uniform`: p_l = 1 / L, which is LISA.
            - `decreasing`: p_l proportional to L - l, which is LISA-D; `increasing` is its mirror image.
            - `outlier_reverse`: the probabilities of `outlier` in reverse, the largest for the block with the fewest outliers.
            - `weight_norm`: p_l proportional to the norm of the block's weights.
            - `window`: the probabilities of `outlier`, by which neighbouring blocks are drawn, see `draw_window`.
            - `gradient_norm`: p_l = 0.9 s_l / sum_k s_k + 0.1 / L, where the score s_l is a moving average of the norm of the
              block's gradient per weight. A block without a score (0) counts as the mean of the others.

    Returns:
        Shape (num_layers,), float64 on the CPU, sums to 1.

    Raises:
        UsageError: The distribution is unknown, or the scores or weights can't be turned into probabilities.
    """
    scores = torch.as_tensor(ratios, dtype=torch.float64, device="cpu")
    if scores.dim() != 1 or len(scores) == 0:
        raise UsageError(f"scores: expected one number a block, got shape {tuple(scores.shape)}; give a flat list")
    blocks = len(scores)
    if not isinstance(distribution, str):
        weights, key = torch.as_tensor(distribution, dtype=torch.float64, device="cpu"), "sampling.distribution"
        if weights.shape != scores.shape:
            raise UsageError(f"{key}: a list of {weights.numel()} weights for {blocks} blocks; give one weight a block")
        return _normalised(weights, key, "give at least one positive weight")
    ranks = torch.arange(blocks, dtype=torch.float64, device="cpu")
    match distribution:
        case "outlier" | "window":
            return _normalised(scores, hint="no weight of any block exceeds the threshold; lower `threshold`")
        case "outlier_reverse":
            probabilities = sampling_probabilities(scores, "outlier")
            order = probabilities.argsort(stable=True)
            return torch.empty_like(probabilities).scatter_(0, order, probabilities[order.flip(0)])
        case "weight_norm":
            return _normalised(scores, hint="the weights of the model are all zero; load a trained model")
        case "uniform":
            return torch.full_like(scores, 1 / blocks)
        case "decreasing":
            return _normalised(blocks - ranks)
        case "increasing":
            return _normalised(1 + ranks)
        case "gradient_norm":
            seen = scores > 0
            filled = torch.where(seen, scores, scores[seen].mean() if seen.any() else 1.0)
            return (1 - UNIFORM_SHARE) * _normalised(filled) + UNIFORM_SHARE / blocks
    names = get_args(Distribution)
    hint = did_you_mean(distribution, names) or f"; give {', '.join(names)} or a list of weights"
    raise UsageError(f"distribution: unknown '{distribution}'{hint}")


def _normalised(scores: Tensor, key: str = "scores", hint: str = "") -> Tensor:
    """Divides scores by their sum; a UsageError under `key` if one is negative or not finite, with `hint` if all are zero."""
    bad = (~scores.isfinite() | (scores < 0)).nonzero().flatten().tolist()
    if bad:
        raise UsageError(f"{key}: block {bad[0]} has {scores[bad[0]].item()}; give finite numbers of at least 0")
    total = scores.sum()
    if total == 0:
        raise UsageError(f"{key}: all {len(scores)} are zero, {hint}")
    return scores / total if total.isfinite() else _normalised(scores / len(scores), key, hint)
