"""The order of events, without any tensor: what is fetched, when, and no more often than needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from ows_lightning.offload.fetch_schedule import FetchSchedule


class Recorder:
    """Writes events down, and checks that nothing is fetched into a slot from which a block computes."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.computing: dict[int, int] = {}

    def issue(self, block: int, slot: int) -> None:
        assert slot not in self.computing
        self.events.append(f"issue {block}")

    @property
    def fetches(self) -> int:
        return sum(event.startswith("issue") for event in self.events)

    def wait(self, block: int, slot: int) -> None:
        assert slot not in self.computing
        self.computing[slot] = block
        self.events.append(f"wait {block}")

    def release(self, block: int, slot: int) -> None:
        assert self.computing.pop(slot) == block
        self.events.append(f"release {block}")


def recorded(blocks: Iterable[int], num_slots: int = 2) -> tuple[Recorder, FetchSchedule]:
    """A schedule of these blocks, and what records its fetches."""
    recorder = Recorder()
    schedule = FetchSchedule(recorder, num_slots)
    schedule.set_blocks(blocks)
    return recorder, schedule


def micro_batch(schedule: FetchSchedule, blocks: int, lowest: int | None, first_left: bool) -> None:
    """Forward and backward over all blocks; gradients reach those from `lowest` on, whose input has a hook if `first_left`."""
    schedule.begin_forward()
    for block in range(blocks):
        if schedule.is_offloaded(block):
            schedule.enter(block)
            schedule.leave_forward(block, needed_in_backward=lowest is not None and block >= lowest)
    if lowest is None:
        return
    entered = [block for block in reversed(range(lowest, blocks)) if schedule.is_offloaded(block)]
    left = None
    for block in reversed(range(lowest, blocks)):
        if block in entered:
            schedule.enter(block)
        if left is not None:  # the hook on the output of this block comes before that on the input of the one above
            schedule.leave_backward(left)
        left = block if block in entered else None
    if left is not None and first_left:
        schedule.leave_backward(left)
    schedule.end_backward()


def test_in_forward_the_next_block_comes_while_one_computes_and_in_backward_the_one_below() -> None:
    recorder, schedule = recorded([0, 1, 3, 4])  # block 2 trains
    schedule.fetch_first()
    micro_batch(schedule, 5, lowest=2, first_left=True)
    assert recorder.events == [
        "issue 0", "issue 1",
        "wait 0", "release 0", "issue 3",
        "wait 1", "release 1", "issue 4",
        "wait 3", "release 3",
        "wait 4", "release 4",
        "wait 4", "wait 3", "release 4", "issue 1",  # for the next forward pass
        "release 3", "issue 0",
    ]  # fmt: skip


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("trained", [[], [0], [2], [6], [3, 4], [0, 6], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_micro_batch_fetches_the_least(slots: int, trained: list[int], embeddings: bool) -> None:
    blocks = 7
    offloaded = [block for block in range(blocks) if block not in trained]
    lowest = 0 if embeddings else min(trained, default=None)
    recorder, schedule = recorded(offloaded, slots)
    for _ in range(2):
        micro_batch(schedule, blocks, lowest, first_left=embeddings)
    before = recorder.fetches
    for _ in range(3):
        micro_batch(schedule, blocks, lowest, first_left=embeddings)

    needed = [rank for rank, block in enumerate(offloaded) if lowest is not None and block >= lowest]
    still_there = 0
    for slot in range(min(slots, len(offloaded))):
        ranks = range(slot, len(offloaded), slots)
        last = min(set(ranks) & set(needed), default=max(ranks))  # what lies in the slot when backward is over
        still_there += last == slot
    least = len(offloaded) + len(needed) - min(slots, len(needed)) - still_there
    assert recorder.fetches - before == 3 * least


@contextmanager
def interrupted(recorder: Recorder, method: str, *, before: bool) -> Iterator[None]:
    """Presses Ctrl-C before or after a method of the recorder does its work, and expects to see it."""
    work = getattr(recorder, method)

    def interrupt(block: int, slot: int) -> None:
        if not before:
            work(block, slot)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_fetch_that_was_interrupted_is_made_again() -> None:
    recorder, schedule = recorded(range(3))
    with interrupted(recorder, "issue", before=True):
        schedule.enter(0)
    schedule.begin_forward()
    schedule.enter(0)
    assert recorder.events == ["issue 0", "wait 0"]


def test_an_interrupt_while_a_block_comes_leaves_no_block_in_its_slot() -> None:
    """Its parameters may be the slot by then, which may hold rounded weights."""
    recorder, schedule = recorded(range(3))
    with interrupted(recorder, "wait", before=False):
        schedule.enter(0)
    schedule.release_all()
    assert recorder.events == ["issue 0", "wait 0", "release 0"]


def test_a_pass_without_gradients_fetches_each_block_once() -> None:
    recorder, schedule = recorded(range(6))
    micro_batch(schedule, 6, lowest=None, first_left=False)
    before = recorder.fetches
    micro_batch(schedule, 6, lowest=None, first_left=False)
    assert recorder.fetches - before == 6


def test_the_lowest_adapters_block_is_left_when_backward_ends() -> None:
    recorder, schedule = recorded(range(4))
    micro_batch(schedule, 4, lowest=0, first_left=False)
    assert not recorder.computing
    assert recorder.events[-1] == "release 0"


def test_a_block_that_is_left_without_having_been_entered_is_an_error() -> None:
    schedule = FetchSchedule(Recorder(), num_slots=2)
    schedule.set_blocks(range(4))
    with pytest.raises(RuntimeError, match="block 3 without"):
        schedule.leave_backward(3)
    schedule.enter(3)
    schedule.leave_forward(3, needed_in_backward=True)  # computing forward is not enough
    with pytest.raises(RuntimeError, match="block 3 without"):
        schedule.leave_backward(3)
