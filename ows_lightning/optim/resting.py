"""Weights at rest: what would be frozen learns a little, each matrix in a random subspace until its rest ends."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ows_lightning.errors import UsageError
from ows_lightning.optim.projected_adamw import merge_update_
from ows_lightning.optim.sharding import local, shard_state
from ows_lightning.optim.subspace import derived_seed, random_subspace


class RestingWeights(Optimizer):
    """An optimizer whose weights may train at rest: keeps their subspaces and what they learn; a subclass takes the steps."""

    _discard_gradients: Callable[[Tensor], None]  # of the subclass: drops what a weight has for the coming step

    def _init_unsaved(self) -> None:
        """Makes the attributes that are not saved, before torch's own."""
        self.ddp_averaging = False  # True where ``average_gradients()`` comes before every step: backward takes no subspace
        self._group_and_index: dict[Tensor, tuple[dict[str, Any], int]] = {}  # each parameter's group, and its number
        self._draw_seed = 0  # of the latest draw
        self.resting_projectors: dict[Tensor, Tensor] = {}  # made again where they are missing
        self._merge_callbacks: dict[Tensor, Callable[[Sequence[Tensor]], None]] = {}  # see ``keep_updates_separate``

    def _index_parameters(self) -> None:
        self._group_and_index.clear()
        parameters = ((p, group) for group in self.param_groups for p in group["params"])
        self._group_and_index.update({p: (group, index) for index, (p, group) in enumerate(parameters)})

    def rest(self, weights: Iterable[Tensor], rank: int = 0, seed: int = 0, among: Collection[Tensor] | None = None) -> None:
        """Lets these matrices, and no others, train at rest from now on, between two steps: in a random subspace.

        A resting weight keeps one subspace, Q of shape (n, r) on the right side, until it no longer rests, at its group's
        learning rate and ``scale``, without weight decay::

            R = G Q,    W <- W - lr * scale * Adam(R) Q^T

        Its state is two moments (m x r), a step and ``rest``, the seed that Q is made from; Q itself is not saved. A weight
        loses its state where its rest begins, and where it ends, also by freezing; one that rests in this rank keeps it.

        Args:
            weights: Matrices of shape (..., m, n) with n > rank that require a gradient; another optimizer's are ignored.
            rank: Rank r.
            seed: Of this rest period; a weight's subspace follows from it and from the weight's place in the groups.
            among: The weights whose rest ends if they are not named, and that `weights` are of; None: all of the optimizer's.

        Raises:
            ValueError: A weight is no matrix that the rank makes smaller, or an offloaded one's group has no names.
        """
        self._draw_seed = seed
        resting = {p for p in weights if p in self._group_and_index}
        if wrong := [tuple(p.shape) for p in resting if p.dim() not in (2, 3) or not 0 < rank < p.size(-1)]:
            raise ValueError(f"rank: {rank} makes a weight of shape {wrong[0]} no smaller")
        if any("param_names" not in self._group_and_index[p][0] for p in resting & self._merge_callbacks.keys()):
            raise UsageError("param_groups: offloaded weights that rest need names, as in model.named_parameters()")
        concerned = [p for p in self._group_and_index if among is None or p in among]
        stay = {p for p in resting if self.is_resting(p) and self.state[p]["rest"].numel() == rank}
        self.merge_updates([p for p in concerned if p not in stay])
        for p in [p for p in concerned if p not in stay and (p in resting or self.is_resting(p))]:
            self.state.pop(p, None)
            self.resting_projectors.pop(p, None)
            self._discard_gradients(p)
            if p in resting:
                self.state[p]["rest"] = torch.full((rank,), seed)  # sharded checkpoints want tensors
        self._make_projectors(concerned)

    def _make_projectors(self, weights: Iterable[Tensor]) -> None:
        # Before a pass, whose activations would lie around them: in host memory few of the gaps between are used again.
        for p in [p for p in weights if p not in self._merge_callbacks and p not in self.resting_projectors]:
            if (q := self.resting_projector(p)) is not None and self.ddp_averaging:
                dist.broadcast(q if p.dim() == 2 else q[0], src=0)  # another CPU may round differently

    def is_resting(self, p: Tensor) -> bool:
        """Whether a parameter trains at rest."""
        return "rest" in self.state.get(p, ())

    def keep_updates_separate(self, weights: Iterable[Tensor], merge: Callable[[Sequence[Tensor]], None]) -> None:
        """Leaves these weights as they are while they rest: what they learn is kept beside them, see ``resting_updates``.

        It is for weights that are offloaded between two passes, and only read. Their state has one tensor more: B (m x r).
        ``merge`` is called with weights whose rest ends, to write W + B Q^T into them before B is dropped.
        """
        self._merge_callbacks.update((p, merge) for p in weights if p in self._group_and_index)

    def resting_updates(self, weights: Iterable[Tensor]) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Returns B (..., m, r) and Q (..., n, r) of those weights whose resting updates are kept beside them."""
        kept = [p for p in weights if "update" in self.state.get(p, ())]
        return {p: (self.state[p]["update"], q) for p in kept if (q := self.resting_projector(p)) is not None}

    @torch.no_grad()
    def merge_updates(self, weights: Iterable[Tensor] | None = None) -> None:
        """Writes what weights, by default all, learned at rest into them, where it is kept beside them; they go on resting."""
        by_callback: dict[Any, list[Tensor]] = {}
        for p in (p for p in (self._group_and_index if weights is None else weights) if "update" in self.state.get(p, ())):
            by_callback.setdefault(self._merge_callbacks.get(p, self.add_resting_updates), []).append(p)
        for merge, found in by_callback.items():
            try:
                merge(found)
            finally:  # an error leaves none to be merged twice
                for p in found:
                    del self.state[p]["update"]

    @torch.no_grad()
    def add_resting_updates(self, weights: Iterable[Tensor]) -> None:
        """W <- W + B Q^T, rounded as a step rounds, for weights that are in memory; B is not dropped."""
        for p, (update, projector) in self.resting_updates(weights).items():
            rounds = self._group_and_index[p][0]["stochastic_rounding"] and p.dtype == torch.bfloat16
            generator = self._rounding_generator(p, p.device) if rounds else None
            merge_update_(local(p.data), local(update), local(projector), generator)

    def resting_projector(self, p: Tensor) -> Tensor | None:
        """Q (n, r) of a weight (m, n) that rests, see ``rest``; None of any other."""
        if not self.is_resting(p):
            return None
        state = self.state[p]
        device = (state.get("exp_avg", p) if p in self._merge_callbacks else p).device  # where it computes: p may be offloaded
        if (q := self.resting_projectors.get(p)) is None or q.device != device:
            with torch.inference_mode(False):  # else it could not be saved for backward later
                found = _resting_subspace(p, state["rest"], self._group_and_index[p][1]).to(device)
                self.resting_projectors[p] = shard_state(found, p, "right", is_projector=True)
        return self.resting_projectors[p]

    def _rounding_generator(self, p: Tensor, device: torch.device) -> torch.Generator:
        """Gives the noise of a weight's rounding, other noise at each of its steps."""
        # And after every draw, which frees a block's state: else the same weights would always be rounded up.
        number, steps = self._group_and_index[p][1], int(self.state[p]["step"])
        return torch.Generator(device).manual_seed(derived_seed(self._draw_seed, number, steps))


def merged_weights(weights: Mapping[str, Tensor], optimizers: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of a model's state dict with what they learned at rest, which is in optimizers' state dicts.

    No tensor is written to. The optimizers' groups name parameters as the state dict or as `CausalLMModule.model` does.
    """
    updates: dict[str, tuple[int, dict[str, Any], int, bool]] = {}
    for optimizer in optimizers:
        groups = [(group, name) for group in optimizer["param_groups"] for name in group.get("param_names", ())]
        for number, state in optimizer["state"].items():
            if isinstance(state, dict) and {"rest", "update"} <= state.keys():
                group, name = groups[number]
                seed = derived_seed(optimizer.get("draw_seed", 0), number, int(state["step"]))  # as of `_rounding_generator`
                updates[name] = updates[f"causal_lm.model.{name}"] = number, state, seed, group.get("stochastic_rounding")
    for name, weight in weights.items():
        if name in updates:
            number, state, seed, rounds = updates[name]
            noise = torch.Generator(weight.device).manual_seed(seed) if rounds and weight.dtype == torch.bfloat16 else None
            weight = weight.detach().clone()
            merge_update_(weight, state["update"], _resting_subspace(weight, state["rest"], number), noise)
        yield name, weight


def _resting_subspace(weight: Tensor, rest: Tensor, number: int) -> Tensor:
    """Q of a weight at rest, from the seed of the rest period, given once for each column, and its number in the optimizer."""
    return random_subspace(weight, rest.numel(), derived_seed(int(rest[0]), number))
