"""The file of outlier scores: written by ``score`` and by every run, read by ``LayerwiseSampling(scores=...)``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ows_lightning.errors import StrPath, UsageError, command_line
from ows_lightning.sampling.distributions import score_name, stored_score_name


def architecture_of(config: Any) -> dict[str, Any]:
    """Returns what configs of a model and of its fine-tuned or exported copies share; nothing without a config."""
    config = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    keys = ("model_type", "hidden_size", "intermediate_size")
    return {key: value for key in keys if (value := getattr(config, key, None)) is not None}


@dataclass(frozen=True)
class BlockScores:
    """The blocks' scores, and the sampling probabilities computed from them."""

    model: str  # its name, as the user gave it
    num_layers: int  # decoder blocks
    threshold: float  # tau of the outlier ratio
    calibration_samples: int  # rows of text that the activations come from; 0 if none were needed
    distribution: str | Sequence[float]  # its name, or a list of weights
    # D_l in percent, first block first (``weight_norm``, ``gradient_norm``: the norms, or their means).
    outlier_ratios: Sequence[float]
    probabilities: Sequence[float]  # p_l, first block first
    architecture: Mapping[str, Any] = field(default_factory=dict)  # see `architecture_of`; empty in files that don't have it

    def save(self, path: Path) -> None:
        """Writes the scores as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: StrPath) -> "BlockScores":
        """Reads the scores from a JSON file; a UsageError if it is missing or holds none."""
        try:
            scores = cls(**json.loads(Path(path).read_text()))
            return replace(scores, outlier_ratios=[float(ratio) for ratio in scores.outlier_ratios])
        except (OSError, ValueError, TypeError) as error:
            why = f"can't be read ({error.strerror})" if isinstance(error, OSError) else "holds no outlier scores"
            raise UsageError(f"sampling.scores: '{path}' {why}; `{command_line('score')}` writes one") from error

    def scores_for(
        self, num_layers: int, architecture: Mapping[str, Any], distribution: str | Sequence[float]
    ) -> Sequence[float]:
        """Returns the scores; a UsageError if they don't suit a model's dimensions and a distribution."""
        held = stored_score_name(self.distribution) if any(self.outlier_ratios) else "no scores"
        if score_name(distribution) not in (None, "gradient_norm", held):  # a run by gradient_norm finds its own
            fault = f"holds {held} (its distribution is {self.distribution}), from which {distribution} can't be computed"
            hint = f"run `{command_line('score')}` with sampling.distribution {distribution}"
            raise UsageError(f"sampling.scores: {fault}; {hint}")
        needed = {**architecture, "number of blocks": num_layers}
        for key, value in {"number of blocks": len(self.outlier_ratios), **self.architecture}.items():
            if (other := needed.get(key, value)) != value:
                fault = f"holds those of '{self.model}', whose {key} is {value}, but the model's is {other}"
                raise UsageError(f"sampling.scores: {fault}; run `{command_line('score')}` with this model")
        return self.outlier_ratios

    def table(self) -> str:
        """Returns the scores as lines of text, one block per line."""
        score = stored_score_name(self.distribution)
        rows = enumerate(zip(self.outlier_ratios, self.probabilities, strict=True))
        lines = [f"{block:>5}   {ratio:>{len(score)}.4f}   {probability:>11.4f}" for block, (ratio, probability) in rows]
        return "\n".join([f"block   {score}   probability", *lines])
