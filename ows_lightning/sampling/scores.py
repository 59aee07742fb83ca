"""The file of outlier scores: written by ``score`` and by every run, read by ``LayerwiseSampling(scores=...)``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ows_lightning.errors import UsageError


@dataclass(frozen=True)
class OutlierScores:
    """What a run knows of its blocks: their scores, and the sampling probabilities that it made of them.

    Attributes:
        model: The model's name, as the user gave it.
        num_layers: Number of decoder blocks.
        threshold: Threshold tau of the outlier ratio.
        calibration_samples: Rows of text that the activations come from; 0 where no activations were needed.
        distribution: Name of the distribution, or a list of weights.
        outlier_ratios: D_l in percent, first block first (for ``weight_norm``: the norms of the weights).
        probabilities: p_l, first block first.
    """

    model: str
    num_layers: int
    threshold: float
    calibration_samples: int
    distribution: str | Sequence[float]
    outlier_ratios: Sequence[float]
    probabilities: Sequence[float]

    def save(self, path: Path) -> None:
        """Writes the scores as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> OutlierScores:
        """Reads the scores from a JSON file.

        Raises:
            UsageError: The file is missing or is no file of scores.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except OSError as error:
            raise UsageError(f"sampling.scores: can't read '{path}' ({error.strerror}); `main.py score` writes it") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"sampling.scores: '{path}' is no file of outlier scores; `main.py score` writes one") from error

    def ratios_for(self, num_layers: int) -> Sequence[float]:
        """Returns the outlier ratios for a model with ``num_layers`` blocks.

        Raises:
            UsageError: The scores are those of a model with another number of blocks.
        """
        if len(self.outlier_ratios) != num_layers:
            raise UsageError(
                f"sampling.scores: holds {len(self.outlier_ratios)} blocks of '{self.model}', but the model has {num_layers}; "
                "run `main.py score` with this model"
            )
        return self.outlier_ratios

    def table(self) -> str:
        """Returns the scores as lines of text, a block a line."""
        rows = zip(self.outlier_ratios, self.probabilities, strict=True)
        return "\n".join(
            ["block   outliers %   probability"]
            + [f"{index:>5}   {ratio:>10.4f}   {probability:>11.4f}" for index, (ratio, probability) in enumerate(rows)]
        )
