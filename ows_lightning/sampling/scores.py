"""The file of outlier scores: written by ``score`` and by every run, read by ``LayerwiseSampling(scores=...)``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ows_lightning.errors import UsageError, command_line
from ows_lightning.sampling.distributions import OUTLIER_DISTRIBUTIONS


def architecture_of(config: Any) -> dict[str, Any]:
    """Returns the config's values that two models must share for one to use the other's scores.

    A model and its fine-tuned or exported copies share it, whatever their names and vocabularies.

    Args:
        config: A config of transformers; any other object gives an empty dict.
    """
    config = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    keys = ("model_type", "hidden_size", "intermediate_size")
    return {key: value for key in keys if (value := getattr(config, key, None)) is not None}


@dataclass(frozen=True)
class OutlierScores:
    """The blocks' scores, and the sampling probabilities computed from them.

    Attributes:
        model: The model's name, as the user gave it.
        num_layers: Number of decoder blocks.
        threshold: Threshold tau of the outlier ratio.
        calibration_samples: Rows of text that the activations come from; 0 if none were needed.
        distribution: Name of the distribution, or a list of weights.
        outlier_ratios: D_l in percent, first block first (for ``weight_norm`` the norms of the weights, for ``gradient_norm``
            the means of the gradients' norms).
        probabilities: p_l, first block first.
        architecture: See `architecture_of`; empty in files that don't have it.
    """

    model: str
    num_layers: int
    threshold: float
    calibration_samples: int
    distribution: str | Sequence[float]
    outlier_ratios: Sequence[float]
    probabilities: Sequence[float]
    architecture: Mapping[str, Any] = field(default_factory=dict)

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
            scores = cls(**json.loads(path.read_text()))
            return replace(scores, outlier_ratios=[float(ratio) for ratio in scores.outlier_ratios])
        except OSError as error:
            raise UsageError(
                f"sampling.scores: can't read '{path}' ({error.strerror}); `{command_line('score')}` writes it"
            ) from error
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"sampling.scores: '{path}' is no file of outlier scores; `{command_line('score')}` writes one"
            ) from error

    def ratios_for(
        self, num_layers: int, architecture: Mapping[str, Any], distribution: str | Sequence[float]
    ) -> Sequence[float]:
        """Returns the outlier ratios, after a check that they suit a model.

        Raises:
            UsageError: The scores are of a model with another number of blocks, of another architecture, or not of the kind
                that ``distribution`` needs.
        """
        asks_for_norms = distribution == "weight_norm"
        if asks_for_norms or distribution in OUTLIER_DISTRIBUTIONS:
            holds_norms = self.distribution == "weight_norm"
            if holds_norms != asks_for_norms or not any(self.outlier_ratios):
                what = "norms of weights" if holds_norms else "outlier ratios" if any(self.outlier_ratios) else "no scores"
                raise UsageError(
                    f"sampling.scores: holds {what} (its distribution is {self.distribution}), from which {distribution} "
                    f"can't be computed; run `{command_line('score')}` with sampling.distribution {distribution}"
                )
        if len(self.outlier_ratios) != num_layers:
            raise UsageError(
                f"sampling.scores: holds {len(self.outlier_ratios)} blocks of '{self.model}', but the model has {num_layers}; "
                f"run `{command_line('score')}` with this model"
            )
        for key, value in self.architecture.items():
            if (other := architecture.get(key, value)) != value:
                raise UsageError(
                    f"sampling.scores: holds those of '{self.model}', whose {key} is {value}, but the model's is {other}; "
                    f"run `{command_line('score')}` with this model"
                )
        return self.outlier_ratios

    def table(self) -> str:
        """Returns the scores as lines of text, a block a line."""
        rows = zip(self.outlier_ratios, self.probabilities, strict=True)
        return "\n".join(
            ["block   outliers %   probability"]
            + [f"{index:>5}   {ratio:>10.4f}   {probability:>11.4f}" for index, (ratio, probability) in enumerate(rows)]
        )
