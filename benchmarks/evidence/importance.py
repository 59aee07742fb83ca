"""Do scores tell which blocks matter? ``python -m benchmarks.evidence.importance``, after the study of that name.

A block's true importance is what training it alone gains: the loss before training minus the loss after. The scores are those
of the model before training, on the task's training rows. Only ranks are compared (Spearman).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from itertools import combinations, islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evidence import ledger, tasks
from benchmarks.evidence.study import RESULTS, ROOT, load, model_directory
from benchmarks.evidence.tables import of_task
from benchmarks.report import markdown
from ows_lightning.data import InstructionDataModule
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import load_model, load_tokenizer
from ows_lightning.sampling.outliers import layer_outlier_ratios, layer_weight_norms

THRESHOLDS = (3.0, 5.0, 13.0, 20.0)

Batch = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Computes the scores that are missing, and prints and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.importance", description=__doc__)
    parser.add_argument("--study", default="importance")
    parser.add_argument("--data-root", type=Path, help="folder of the multiple-choice tasks' files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "evidence")
    args = parser.parse_args(arguments)
    study, work = load(args.study), args.work.absolute()
    counted = ledger.Ledger(args.results / f"{study.name}.csv", ledger.COUNTED)
    model = model_directory(study.model, work / "models")
    parts = [f"# {study.name}: rank correlation of scores with what training a block alone gains"]
    for name in study.tasks:
        values, before = of_task(counted, name)
        losses = {int(method.removeprefix("block_")): runs for method, runs in values.items()}
        if not losses:
            continue
        gains = [before["test_loss"] - _mean(losses[block]) for block in sorted(losses)]
        path = args.results / f"{study.name}_scores_{name}.csv"
        if not path.is_file():
            task = tasks.make(name, work / "tasks", study.evaluation_rows, args.data_root)
            batches = batches_of(task.train, load_tokenizer(str(model)), 4)
            write_scores(path, scores_of(load_model(str(model), torch.float32), batches))
        parts += [f"## {name}", correlations(gains, sorted(losses), read_scores(path)), *reliability(losses)]
        plot(gains, sorted(losses), read_scores(path), args.results / f"{study.name}_gains_{name}.png")
    text = "\n\n".join(parts) + "\n"
    (args.results / f"{study.name}_correlations.md").write_text(text)
    print(text)


def correlations(gains: Sequence[float], blocks: Sequence[int], scores: dict[str, list[float]]) -> str:
    """A row a score: Spearman's rho with the gains of these blocks, and its two-sided p."""
    rows = []
    for name, values in scores.items():
        rho, p_value = stats.spearmanr([values[block] for block in blocks], gains)
        rows.append([name, f"{rho:+.2f}", f"{p_value:.3f}"])
    rows.sort(key=lambda row: -abs(float(row[1])))
    return markdown(["Score", f"rho, {len(blocks)} blocks", "p"], rows)


def reliability(losses: dict[int, dict[int, dict[str, float]]]) -> list[str]:
    """How far two seeds agree on what a block gains: no score can be expected to agree with it more than they do."""
    blocks = sorted(losses)
    seeds = sorted(set.intersection(*(set(losses[block]) for block in blocks)))
    lines = []
    for one, other in combinations(seeds, 2):
        rho, p_value = stats.spearmanr(*([losses[block][seed]["test_loss"] for block in blocks] for seed in (one, other)))
        lines.append(f"Seeds {one} and {other} rank the blocks alike with rho {rho:+.2f} (p {p_value:.3f}).")
    return lines


def plot(gains: Sequence[float], blocks: Sequence[int], scores: dict[str, list[float]], path: Path) -> None:
    """Draws what each block gains beside the score that OWS draws by, block by block."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.bar(blocks, gains, color="tab:blue")
    above.set_ylabel("Gain of training\nthis block alone (nats)")
    below.bar(range(len(scores["outliers, tau 13"])), scores["outliers, tau 13"], color="tab:orange")
    below.set_ylabel("Outlier ratio,\ntau 13 (%)")
    below.set_xlabel("Block")
    figure.savefig(path, dpi=120)


def batches_of(rows: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Batch]:
    """Returns so many batches of eight rows, to train on: ``input_ids``, ``attention_mask`` and ``labels``, shape (8, L)."""
    data = InstructionDataModule(str(rows), val_size=0, batch_size=8, tokenizer=tokenizer)
    data.prepare_data()
    data.setup("fit")
    wanted = ("input_ids", "attention_mask", "labels")
    return [{key: batch[key] for key in wanted} for batch in islice(data.train_dataloader(), count)]


def scores_of(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """Returns a number a block for each score: outlier ratios in percent, norms of weights and gradients, and the depth."""
    inputs = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    scores = {f"outliers, tau {tau:g}": layer_outlier_ratios(model, inputs, tau).tolist() for tau in THRESHOLDS}
    scores["weight norm"] = torch.as_tensor(layer_weight_norms(model)).tolist()
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    blocks = decoder_layers(model)
    scores["gradient norm"] = [_norm([p.grad for p in block.parameters()]) for block in blocks]
    scores["depth"] = [float(block) for block in range(len(blocks))]
    return scores


def write_scores(path: Path, scores: dict[str, list[float]]) -> None:
    """Writes a row a block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["block", *scores])
        for block, row in enumerate(zip(*scores.values(), strict=True)):
            writer.writerow([block, *(f"{value:.6g}" for value in row)])


def read_scores(path: Path) -> dict[str, list[float]]:
    """Reads what `write_scores` wrote."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name != "block"}


def _norm(gradients: Sequence[Tensor | None]) -> float:
    """Root mean square of a block's gradients: per weight, so that size does not count."""
    there = [gradient for gradient in gradients if gradient is not None]
    square = sum(float(gradient.square().sum()) for gradient in there)
    return float((square / sum(gradient.numel() for gradient in there)) ** 0.5)


def _mean(runs: dict[int, dict[str, float]]) -> float:
    return sum(run["test_loss"] for run in runs.values()) / len(runs)


if __name__ == "__main__":
    main()
