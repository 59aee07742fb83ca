"""Do scores find blocks that need training? ``python -m benchmarks.evidence.damaged``: the case whose truth is known.

In each trial three blocks' weights are damaged, so that these are what fine-tuning has to restore. A score finds them if it
ranks them above the others: the table has the chance that a damaged block scores higher than an intact one (AUC; 0.5 is a
coin's). No training is needed. Rows are kept in ``benchmarks/results/damaged.csv``, a row a trial and score.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import mean

import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.evidence import ledger, tasks
from benchmarks.evidence.importance import Batch, batches_of, scores_of
from benchmarks.evidence.schedule import commit
from benchmarks.evidence.study import RESULTS, ROOT, load, model_directory
from benchmarks.evidence.tables import interval
from benchmarks.report import markdown
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import load_model, load_tokenizer

COLUMNS = ("task", "damage", "seed", "blocks", "loss_before", "loss_damaged", "score", "auc", "commit")
DAMAGED = 3

KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": lambda w, g: w + w.std() * torch.randn(w.shape, generator=g),
    "zeros": lambda w, g: w * (torch.rand(w.shape, generator=g) < 0.5),
    "shuffled": lambda w, g: w[:, torch.randperm(w.shape[1], generator=g)],
}
"""What becomes of each matrix of a damaged block: as much noise as there is weight, half of it gone, its inputs mixed up."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the trials that are missing, and prints and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.damaged", description=__doc__)
    parser.add_argument("--model", default=load("importance").model)
    parser.add_argument("--task", default="spell_backward")
    parser.add_argument("--trials", type=int, default=5, help="of each kind of damage")
    parser.add_argument("--batches", type=int, default=2, help="of eight rows, from which scores are computed")
    parser.add_argument("--data-root", type=Path, help="folder of the multiple-choice tasks' files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--tables", action="store_true", help="make the table alone, from the CSV file")
    args = parser.parse_args(arguments)
    rows = ledger.Ledger(args.results / "damaged.csv", COLUMNS)
    if not args.tables:
        run(args, rows)
    text = f"# damaged: chance that a score ranks a damaged block above an intact one\n\n{table(rows)}\n"
    (args.results / "damaged.md").write_text(text)
    print(text)


def run(args: argparse.Namespace, rows: ledger.Ledger) -> None:
    """Makes the trials; one whose rows are there is left out."""
    directory = model_directory(args.model, args.work.absolute() / "models")
    task = tasks.make(args.task, args.work.absolute() / "tasks", load("importance").evaluation_rows, args.data_root)
    model = load_model(str(directory), torch.float32)
    batches = batches_of(task.train, load_tokenizer(str(directory)), args.batches)
    before = loss_of(model, batches)
    for seed in range(args.trials):
        for kind in KINDS:
            if rows.find(task=args.task, damage=kind, seed=seed) is None:
                known = {"task": args.task, "damage": kind, "seed": seed, "loss_before": before, "commit": commit()}
                for row in trial(model, kind, seed, batches):
                    rows.add({**known, **row})


def trial(model: PreTrainedModel, kind: str, seed: int, batches: Sequence[Batch]) -> list[dict[str, object]]:
    """Damages blocks of a model, scores its blocks, and mends it; returns a row a score."""
    layers = decoder_layers(model)
    generator = torch.Generator().manual_seed(seed)
    damaged = sorted(torch.randperm(len(layers), generator=generator)[:DAMAGED].tolist())
    intact = {block: {name: p.detach().clone() for name, p in layers[block].named_parameters()} for block in damaged}
    with torch.no_grad():
        for block in damaged:
            for p in layers[block].parameters():
                if p.ndim == 2:
                    p.copy_(KINDS[kind](p, generator))
    loss, scores = loss_of(model, batches), scores_of(model, batches)
    with torch.no_grad():
        for block, weights in intact.items():
            for name, p in layers[block].named_parameters():
                p.copy_(weights[name])
    known = {"blocks": " ".join(map(str, damaged)), "loss_damaged": loss}
    return [{**known, "score": name, "auc": auc(values, damaged)} for name, values in scores.items()]


def loss_of(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean loss over batches (nats a target token, a batch counts as another)."""
    with torch.no_grad():
        return mean(float(model(**batch).loss) for batch in batches)


def auc(scores: Sequence[float], damaged: Collection[int]) -> float:
    """The chance that a damaged block scores higher than an intact one; ties count half."""
    high = [score for block, score in enumerate(scores) if block in damaged]
    low = [score for block, score in enumerate(scores) if block not in damaged]
    return float(stats.mannwhitneyu(high, low).statistic) / (len(high) * len(low))


def table(rows: ledger.Ledger) -> str:
    """A row a score: mean, 95 % interval and standard deviation over trials, for each kind of damage."""
    names = list(dict.fromkeys(row["score"] for row in rows.rows))
    cells = []
    for name in names:
        values = {k: [float(r["auc"]) for r in rows.rows if r["score"] == name and r["damage"] == k] for k in KINDS}
        cells.append([name, *(interval(values[kind]) for kind in KINDS)])
    trials = {k: len({row["seed"] for row in rows.rows if row["damage"] == k}) for k in KINDS}
    return markdown(["Score", *(f"{kind}, {trials[kind]} trials" for kind in KINDS)], cells)


if __name__ == "__main__":
    main()
