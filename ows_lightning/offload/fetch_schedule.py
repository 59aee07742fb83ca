"""The order of events: which offloaded block is fetched into which slot, and when a slot is free again."""

from collections.abc import Sequence
from typing import Any


class FetchSchedule:
    """Decides which block is fetched when, from what computes now; the ``executor``, a `BlockOffloader`, carries it out.

    An offloaded block has a position among the offloaded ones, and always comes into the slot of its position modulo the
    number of slots. Autograd keeps views of weights from the forward pass: in backward a block has to lie where it lay then.

    In a forward pass a block's slot is free when the block is left; the block `num_slots` positions above is fetched then,
    while the next one computes. In backward it is the block `num_slots` positions below, and nothing below
    `lowest_in_backward`, the lowest block that a gradient reaches. A slot that this pass no longer needs gets the block that
    forward needs there first.
    With R offloaded blocks, B of them needed in backward, and n slots, a micro-batch needs at least R + B - min(n, B) - k
    fetches, where k of the first n blocks are in their slots when backward ends; it makes no more.
    """

    def __init__(self, executor: Any, num_slots: int) -> None:
        self.executor, self.num_slots = executor, num_slots
        self.set_blocks(())

    def set_blocks(self, order: Sequence[int]) -> None:
        """Sets which blocks are offloaded; no slot holds anything of use afterwards."""
        self.order = list(order)  # ascending: the block at a position
        self.position = {block: position for position, block in enumerate(self.order)}  # only offloaded blocks have one
        self._in_use: set[int] = set()
        self._left_early: set[int] = set()  # slots that went to a block below before this one's backward ended
        self.invalidate()

    def invalidate(self) -> None:
        """Drops what the slots hold: it was fetched before something wrote into the offloaded blocks."""
        self._holds: list[int | None] = [None] * self.num_slots
        self.lowest_in_backward = len(self.order)

    def is_offloaded(self, block: int) -> bool:
        """Whether a block is offloaded."""
        return block in self.position

    def slot_of(self, block: int) -> int:
        """The slot that an offloaded block comes into."""
        return self.position[block] % self.num_slots

    def fetch_first(self) -> None:
        """Fetches what the next forward pass needs first, as after a draw."""
        for block in self.order[: self.num_slots]:
            self._issue(block)

    def begin_forward(self) -> None:
        """A forward pass begins, and no slot is in use: nothing is known yet of what its backward pass will need."""
        self.lowest_in_backward = len(self.order)
        self._left_early.clear()

    def enter(self, block: int) -> None:
        """A block is about to compute, forward, backward or again: it comes into its slot now, if it is not there yet."""
        if block not in self._in_use:
            for above in [other for other in self._in_use if other > block and self.slot_of(other) == self.slot_of(block)]:
                self._release(above)  # only an input that blocks below share, too (Zamba's), has a gradient to come
                self._left_early.add(above)
            self._issue(block)
            self._in_use.add(block)  # first: an error, or Ctrl-C, while it comes leaves it to `release_all`
            self.executor.wait(block, self.slot_of(block))

    def leave_forward(self, block: int, needed_in_backward: bool) -> None:
        """A block has computed; its slot is free, unless backward begins with this block."""
        position = self.position[block]
        self._release(block)
        if needed_in_backward:
            self.lowest_in_backward = min(self.lowest_in_backward, position)
        if position + self.num_slots < len(self.order):
            self._issue(self.order[position + self.num_slots])
        elif not needed_in_backward:
            self._issue(self.order[position % self.num_slots])  # for the next forward pass

    def leave_backward(self, block: int) -> None:
        """The gradient of a block's input is there: nothing more is computed from its weights."""
        if block in self._in_use:
            self._after_backward(block)
        elif block not in self._left_early:
            raise RuntimeError(f"backward left block {block} without having entered it: no gradient came to its output")

    def end_backward(self) -> None:
        """Backward is over: a block whose input needed no gradient was not left."""
        for block in sorted(self._in_use):
            self._after_backward(block)

    def _after_backward(self, block: int) -> None:
        position = self.position[block]
        self._release(block)
        below, first = position - self.num_slots, position % self.num_slots  # which the next forward pass needs
        self._issue(self.order[below if below >= self.lowest_in_backward else first])

    def release_all(self) -> None:
        """Releases all slots that a block computes from, also where a pass was interrupted."""
        for block in sorted(self._in_use):
            self._release(block)

    def _release(self, block: int) -> None:
        if block in self._in_use:
            self.executor.release(block, self.slot_of(block))
            self._in_use.remove(block)

    def _issue(self, block: int) -> None:
        slot = self.slot_of(block)
        if self._holds[slot] == block:
            return
        for other in [other for other in self._in_use if self.slot_of(other) == slot]:
            raise RuntimeError(f"block {block} is needed while block {other} computes from the same slot")
        self._holds[slot] = None  # should the fetch be interrupted
        self.executor.issue(block, slot)
        self._holds[slot] = block
