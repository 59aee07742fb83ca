"""The order of rows over ranks and epochs, and the loader that remembers its position in it."""

import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler


class RankSampler(DistributedSampler):
    """The order of rows, drawn from (seed, epoch), of which every rank takes its part.

    Rank r of w takes the rows r, r + w, ... of the order, so w ranks with batches of b rows see together the same rows at
    the same step as one process with batches of w * b rows. When the rows don't divide evenly, the missing ones have the
    index ``len(rows)``, a filler row without targets: all ranks make as many steps, and no row counts twice.

    With `group_size`, rows are sorted by their tokens within every 50 groups of as many rows, and the groups shuffled, so that
    a batch's rows have similar lengths. Lightning leaves a `DistributedSampler` in place, and tells it the epoch.
    """

    def __init__(
        self, lengths: Sequence[int], rank: int = 0, num_replicas: int = 1, group_size: int | None = None, **options: Any
    ) -> None:
        super().__init__(lengths, num_replicas, rank, **options)  # type: ignore[arg-type]
        self.lengths, self.group_size = np.asarray(lengths), group_size
        self.skip = 0  # rows of this rank that the next iteration skips

    def __iter__(self) -> Iterator[int]:
        order = np.arange(len(self.lengths))
        if self.shuffle:
            random = np.random.default_rng([self.seed, self.epoch])
            order = random.permutation(order)
            if self.group_size:
                order = self._grouped(order, self.group_size, random)
        filled = np.append(order, np.full(self.total_size - len(order), len(order)))
        skip, self.skip = self.skip, 0
        return iter(filled[self.rank :: self.num_replicas][skip:].tolist())

    def _grouped(self, order: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
        parts = (order[start : start + 50 * size] for start in range(0, len(order), 50 * size))
        order = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])
        whole, rest = np.split(order, [len(order) // size * size])
        return np.append(random.permutation(whole.reshape(-1, size)).ravel(), rest)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over a `RankSampler` that knows its position, which Lightning keeps in its checkpoints.

    The position is the epoch and how many rows all ranks have seen of it, so a run may be resumed with another batch size or
    number of ranks. At the end of an epoch it is the start of the next, where torchdata's StatefulDataLoader is exhausted.
    """

    trainer: Trainer | None = None  # tells the epoch; what Lightning tells the sampler is one ahead after some resumes
    _position = _resume_at = (0, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: this runs at the first `next`, when the epoch is set. A position in another epoch does not count.
        epoch = self.trainer.current_epoch if self.trainer else getattr(self.sampler, "epoch", 0)
        rows = self._resume_at[1] if self._resume_at[0] == epoch else 0
        self._resume_at = (0, 0)
        if isinstance(self.sampler, RankSampler):
            self.sampler.set_epoch(epoch)
            self.sampler.skip, skipped_batches = rows, 0
        else:  # overfit_batches replaces the sampler
            skipped_batches = rows // (self.batch_size or 1)
        in_epoch = len(self.sampler)  # type: ignore[arg-type]
        for batch in islice(super().__iter__(), skipped_batches, None):
            rows += self.batch_size or 0
            self._position = (epoch, rows) if rows < in_epoch else (epoch + 1, 0)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position: ``epoch``, the ``rows`` of it that all ranks have seen, and what the ``order`` depends on."""
        order: dict[str, int] = {}
        if isinstance(sampler := self.sampler, RankSampler):
            order = {"rows": len(sampler.lengths), "seed": sampler.seed, "group_size": sampler.group_size or 0}
            order["lengths"] = zlib.crc32(sampler.lengths.tobytes())  # of other rows, others
        rows = self._position[1] * getattr(self.sampler, "num_replicas", 1)
        return {"epoch": self._position[0], "rows": rows, "order": order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begins the next iteration at this position."""
        before, now = state.get("order", {}), self.state_dict()["order"]
        changed = [
            "other lengths" if name == "lengths" else f"{name} from {before[name]} to {value}"
            for name, value in now.items()
            if before.get(name, value) != value
        ]
        if changed and state["rows"]:
            risk = "what is left of this epoch may hold rows that were seen, and lack others"
            rank_zero_warn(f"The resumed run's rows are others, or in another order ({', '.join(changed)}): {risk}")
        ranks = getattr(self.sampler, "num_replicas", 1)
        self._position = self._resume_at = (state["epoch"], state["rows"] // ranks)
        if again := state["rows"] % ranks:
            rank_zero_warn(f"{again} rows of this epoch are seen again: {state['rows']} are no multiple of {ranks} processes")

    @property
    def batches_before(self) -> int | None:
        """Number of an epoch's batches before the position; None if unknown."""
        if not isinstance(self.sampler, RankSampler) or self.batch_size is None:
            return None
        # The end of an epoch is the start of the next.
        rest = len(self.sampler) - self._position[1] if self._position[1] else 0
        return len(self) - -(-rest // self.batch_size)
