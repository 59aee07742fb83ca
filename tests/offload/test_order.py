"""Whole runs on a GPU that is not there: every copy as late, or as early, as events allow, and both sides kept apart.

Each run gives the bits of a run without offloading on the CPU. That the double would see a fault is shown by `MUTANTS`: each
single wait, release, record and synchronisation of the package is removed, one at a time, and a run fails.
"""

from __future__ import annotations

import ast
import copy
import gc
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import ows_lightning.offload
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.loss import next_token_loss, precompute_on_host
from ows_lightning.offload.disk import Disk
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.offload.streams import _CudaStream
from ows_lightning.optim import gradient_capture
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.activation import activate_blocks
from tests.offload.fake_gpu import FakeGpu
from tests.offload.steps import Run, train
from tests.tiny import tiny_batch, tiny_model

# Where frozen blocks are, and where copies of them in int8.
PLACES = {"host": (False, None), "disk": (True, None), "int8": (False, "device"), "int8 host": (False, "host"),
          "int8 disk": (True, "disk"), "int8 above disk": (True, "device")}  # fmt: skip


class Subject(NamedTuple):
    """A tiny model in training."""

    model: nn.Module
    offloader: BlockOffloader | None
    device: str

    def train(self, *draws: list[int]) -> Run:
        return train(self.model, self.offloader, draws=list(draws), device=self.device)

    def loss(self) -> torch.Tensor:
        return self.model(**{key: value.to(self.device) for key, value in tiny_batch().items()}, use_cache=False).loss

    def state(self) -> dict[str, torch.Tensor]:
        return {name: value.cpu().clone() for name, value in self.model.state_dict().items()}


def trained(subject: Subject) -> Any:
    """Draws, micro-batches, projection within backward."""
    return subject.train([1], [3, 0])


def validated(subject: Subject) -> Any:
    """Between training and training, as in validation, and with a block that is looked at, as in scoring."""
    losses = [*subject.train([2]).losses]
    block = decoder_layers(subject.model)[1]
    with torch.inference_mode(), subject.offloader.on_device(block) if subject.offloader else torch.inference_mode():
        losses.append(sum(p.float().abs().sum() for p in block.parameters()).cpu())
    at_home = [p.is_cuda for p in block.parameters()]
    subject.model.eval()
    with torch.inference_mode():
        losses.append(subject.loss().cpu())
    subject.model.train()
    return [losses, at_home, subject.train([2])]


def loaded(subject: Subject) -> Any:
    """Another state is loaded while blocks are fetched for the next pass."""
    subject.train([1])
    subject.model.load_state_dict(tiny_model("llama", seed=1, num_hidden_layers=4).state_dict())
    return subject.train([2])


def halved(subject: Subject) -> Any:
    """Other dtypes in between, there and back, of weights and of gradients that wait for a step."""
    subject.train([1])
    subject.model.bfloat16()
    first = subject.train([2])
    subject.loss().backward()
    subject.model.float()
    waiting = [p.grad.cpu().clone() for p in subject.model.parameters() if p.grad is not None]
    assert waiting
    return [first, waiting, subject.train([2])]


def interrupted(subject: Subject) -> Any:
    """Passes that end in the middle, forward and backward."""
    subject.train([1])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    mlp = decoder_layers(subject.model)[2].mlp
    for register in (mlp.register_forward_pre_hook, mlp.register_full_backward_pre_hook):
        handle = register(interrupt)
        with pytest.raises(KeyboardInterrupt):
            subject.loss().backward()
        handle.remove()
    kept = subject.model.state_dict()
    with torch.no_grad():
        loss = subject.loss().cpu()  # another pass, while somebody has the weights
    state = {name: value.cpu().clone() for name, value in kept.items()}
    subject.model.zero_grad()
    return [loss, state, subject.train([2])]


def copied(subject: Subject) -> Any:
    """There is a second model, with which weights may be exchanged between training and evaluation."""
    first = subject.train([1])
    other = copy.deepcopy(subject.model)
    second = subject.train([1])
    if subject.offloader is not None:
        subject.offloader.refresh_all()  # as at a validation's begin and end
    subject.model.eval()
    with torch.no_grad():
        loss = subject.loss().cpu()
    return [first, second, loss, {name: value.cpu().clone() for name, value in other.state_dict().items()}]


def moved(subject: Subject) -> Any:
    """From the device to host memory, and back."""
    first = subject.train([1])
    subject.model.to("cpu")
    state = subject.state()
    subject.model.to(subject.device)
    return [first, state, subject.train([2])]


def rested(subject: Subject) -> Any:
    """Offloaded blocks that train at rest, until their rest ends."""
    return train(subject.model, subject.offloader, draws=[[0]], steps_per_draw=2, device=subject.device, resting_rank=2)


RUNS: dict[str, Callable[[Subject], Any]] = {
    run.__name__: run for run in (trained, validated, loaded, halved, interrupted, copied, moved, rested)
}


def outcome(run: str, place: str | None, folder: Path, device: str) -> Any:
    """What a run comes to with blocks somewhere, or resident."""
    model = tiny_model("llama", num_hidden_layers=4)
    offloader = None
    if place is not None:
        on_disk, int8_in = PLACES[place]
        offloader = BlockOffloader(decoder_layers(model), disk=Disk(folder) if on_disk else None, int8_in=int8_in)
    model.to(device)
    return RUNS[run](Subject(model, offloader, device))


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, (Run, dict)):
        found, expected = (list(vars(x).items() if isinstance(x, Run) else x.items()) for x in (found, expected))
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


EXPECTED: dict[Any, Any] = {}  # by the run and whether blocks are in int8


def assert_run(run: str, place: str, late: bool, folder: Path) -> None:
    """Asserts that a run on the double gives the bits of one on the CPU, without offloading or in int8."""
    in_int8 = PLACES[place][1] is not None
    if (run, in_int8) not in EXPECTED:  # at rest, W + B Q^T is rounded as in a slot
        on_cpu = "int8 host" if in_int8 else "host" if run == "rested" else None
        EXPECTED[run, in_int8] = outcome(run, on_cpu, folder, "cpu")
    gpu = FakeGpu(late)
    with gpu.installed():
        found = outcome(run, place, folder, "cuda")
    assert len(gpu.streams) > 1
    assert_same(found, EXPECTED[run, in_int8])


FAST = [("trained", "host"), ("trained", "int8 disk"), ("loaded", "host"), ("halved", "int8"), ("interrupted", "disk")]


@pytest.mark.parametrize(
    ("run", "place"),
    [pytest.param(r, p, marks=() if (r, p) in FAST else pytest.mark.slow) for r in RUNS for p in PLACES],
)
def test_copies_at_the_last_moment_give_the_same_bits(run: str, place: str, tmp_path: Path) -> None:
    assert_run(run, place, True, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "place"), [(r, p) for r in RUNS for p in PLACES if r == "trained" or p == "disk"])
def test_copies_at_the_first_moment_give_the_same_bits(run: str, place: str, tmp_path: Path) -> None:
    assert_run(run, place, False, tmp_path)


def dropped_while_a_fetch_runs(folder: Path) -> None:
    """Nothing but the copy stream is left of a model, and then not even that."""
    with FakeGpu(late=True).installed():
        model = tiny_model("llama", num_hidden_layers=4)
        model.offloader = BlockOffloader(decoder_layers(model))
        model.to("cuda")
        train(model, model.offloader, draws=[[1]], device="cuda")
        stream = model.offloader._stream
        del model
        gc.collect()
        del stream


def computed_before_it_trains(place: str, folder: Path) -> None:
    """The first blocks that are fetched need more staging memory, one weight after the other."""
    with FakeGpu(late=True).installed():
        model = tiny_model("llama", num_hidden_layers=4)
        on_disk, int8_in = PLACES[place]
        offloader = BlockOffloader(decoder_layers(model), disk=Disk(folder) if on_disk else None, int8_in=int8_in)
        model.to("cuda")
        with torch.no_grad():
            found = Subject(model, offloader, "cuda").loss().cpu()
        del model, offloader
    assert torch.equal(found, tiny_model("llama", num_hidden_layers=4)(**tiny_batch()).loss)


def dropped_before_its_stream(folder: Path) -> None:
    """The memory of a fetch, but for what the fetch itself holds."""
    with FakeGpu(late=True).installed():
        stream, memory = _CudaStream(torch.device("cuda"), 1), [torch.zeros(2, device="cuda") for _ in range(2)]
        stream.wait_for_computation()
        stream.issue(0, partial(torch.Tensor.copy_, *memory))
        del memory
        del stream


class TwoInputs(nn.Module):
    """A block that also computes from the embeddings, as Zamba's do: their gradient is complete when backward ends."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return hidden + self.linear(hidden * embeddings).tanh()


def blocks_with_two_inputs(folder: Path, leaf: bool = False) -> None:
    """Frozen blocks between the loss and one that trains, with embeddings that train, too."""
    gradients = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        blocks, embeddings = nn.ModuleList(TwoInputs() for _ in range(6)), nn.Parameter(torch.rand(3, 8))
        for index, block in enumerate(blocks):
            block.requires_grad_(index == 1)
        if offloaded:
            BlockOffloader(blocks)
        for _ in range(2):
            hidden = first = embeddings if leaf else embeddings.clone()  # as a lookup returns them
            for block in blocks:
                hidden = block(hidden, first)
            hidden.square().mean().backward()
        gradients.append([embeddings.grad, *(p.grad for p in blocks[1].parameters())])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("leaf", [False, True])
def test_an_input_that_several_blocks_share_trains_too(leaf: bool, tmp_path: Path) -> None:
    blocks_with_two_inputs(tmp_path, leaf)


class Outputs(tuple):
    """What some blocks return, of a class that torch does not know."""


class ReturnsOutputs(nn.Module):
    """A block that takes and returns `Outputs`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, given: Outputs) -> Outputs:
        return Outputs((given[0] + self.linear(given[0]).tanh(),))


def test_a_gradient_passes_through_what_a_block_returns_of_any_class() -> None:
    gradients = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        blocks = nn.ModuleList(ReturnsOutputs() for _ in range(6))
        blocks[1:].requires_grad_(False)
        if offloaded:
            BlockOffloader(blocks)
        given = Outputs((torch.rand(3, 8),))
        for block in blocks:
            given = block(given)
        given[0].square().mean().backward()
        gradients.append([p.grad for p in blocks[0].parameters()])
    assert all(map(torch.equal, *gradients))


def looked_at_while_it_rests(folder: Path) -> None:
    """A resting block, of whose weights linear layers have one kind of update, and the slot itself has the other."""

    class OtherLinear(nn.Linear):
        """Not one that computes with an update."""

    with FakeGpu(late=True).installed():
        model = tiny_model("llama", num_hidden_layers=3)
        layers = decoder_layers(model)
        layers[2].mlp.down_proj.__class__ = OtherLinear
        offloader = BlockOffloader(layers)
        model.to("cuda")
        optimizer = GaLoreAdamW(galore_param_groups(model, rank=4), lr=1e-2)
        optimizer.project_in_backward(model=model)
        offloader.attach_optimizer(optimizer)
        activate_blocks(layers, [0], (), [optimizer], resting_rank=2)
        offloader.apply_draw([optimizer])
        Subject(model, offloader, "cuda").loss().backward()
        optimizer.step()
        with torch.no_grad(), offloader.on_device(layers[2]):
            assert all(p.isfinite().all() for p in layers[2].parameters())
        del model, layers, offloader, optimizer


def test_a_block_may_be_looked_at_while_it_rests(tmp_path: Path) -> None:
    looked_at_while_it_rests(tmp_path)


def test_what_a_fetch_uses_lives_until_it_has_run(tmp_path: Path) -> None:
    dropped_while_a_fetch_runs(tmp_path)
    dropped_before_its_stream(tmp_path)
    computed_before_it_trains("disk", tmp_path)


# ---------------------------------------------------------------------- what the double sees

ORDERING = {
    "wait_event", "wait_stream", "record", "synchronize", "wait", "release", "result", "exception", "wait_for_computation",
    "_drain_fetches", "finalize", "_synchronize", "_release", "release_all",
}  # fmt: skip
PACKAGE = Path(ows_lightning.offload.__file__).parent


class Mutant(NamedTuple):
    """A statement of the package that orders something."""

    file: str
    function: str
    statement: str
    number: int = 0  # among the same statements of the function


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Simple statements, in order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and not hasattr(child, "body"):
            yield child
        elif not isinstance(child, ast.expr):
            yield from statements(child)


def orders(statement: ast.stmt) -> bool:
    """Whether a statement waits, releases, records, synchronises, or keeps memory for that long."""
    calls = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
    names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    return bool(names & ORDERING) or ast.unparse(statement) == "self._running[slot] = fetch"


def mutants() -> Iterator[Mutant]:
    for path in sorted(PACKAGE.glob("*.py")):
        tree = ast.parse(path.read_text())
        owners = [("", tree), *((node.name + ".", node) for node in tree.body if isinstance(node, ast.ClassDef))]
        for prefix, owner in owners:
            for function in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
                seen: dict[str, int] = {}
                for statement in filter(orders, statements(function)):
                    text = ast.unparse(statement)
                    seen[text] = seen.get(text, -1) + 1
                    yield Mutant(path.stem, prefix + function.name, text, seen[text])


def remove(mutant: Mutant, patch: pytest.MonkeyPatch) -> None:
    """Takes a statement out of the package."""
    gc.collect()  # what an earlier mutant left may raise, whose report parses code, too: not in the middle of ours
    module: ModuleType = import_module(f"ows_lightning.offload.{mutant.file}")
    *owner_name, name = mutant.function.split(".")
    owner: Any = getattr(module, owner_name[0]) if owner_name else module
    explicit = f"super({', '.join([*owner_name, 'self'])})"  # code outside of its class has no other
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(owner, name))).replace("super()", explicit))
    number, statement = mutant.number, mutant.statement.replace("super()", explicit)

    class Remove(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> ast.AST:
            nonlocal number
            node = super().generic_visit(node)
            if isinstance(node, ast.stmt) and not hasattr(node, "body") and ast.unparse(node) == statement:
                number -= 1
                return ast.Pass() if number == -1 else node
            return node

    code = ast.fix_missing_locations(Remove().visit(tree))
    assert number < 0
    made: dict[str, Any] = {}
    exec(compile(code, mutant.file, "exec"), vars(module), made)
    patch.setattr(owner, name, made[name])


def _killed_by(run: str, place: str) -> Callable[[Path], None]:
    return partial(assert_run, run, place, True)


# Every mutant, and the run that fails without the statement.
MUTANTS: dict[Mutant, Callable[[Path], None]] = {
    Mutant("disk", "Disk.read_into", "copied.synchronize()"): _killed_by("trained", "disk"),
    Mutant("disk", "Disk.read_into", "copied.record(torch.cuda.current_stream(target.device))"): _killed_by("trained", "disk"),
    Mutant("offloaded", "page_locked", "weakref.finalize(whole, _unlock, address, device).atexit = False"): (
        dropped_while_a_fetch_runs
    ),
    Mutant("offloaded", "_unlock", "torch.cuda.synchronize(device)"): partial(computed_before_it_trains, "disk"),
    Mutant("offloader", "BlockOffloader.on_device", "self.schedule.release_all()"): _killed_by("validated", "host"),
    Mutant("offloader", "BlockOffloader.end_pass", "self.schedule.release_all()"): _killed_by("interrupted", "host"),
    Mutant("offloader", "BlockOffloader._merge_into_offloaded", "self._drain_fetches()"): _killed_by("rested", "host"),
    Mutant("offloader", "BlockOffloader._merge_into_offloaded", "self._stream.wait_for_computation()"): _killed_by(
        "rested", "int8"
    ),
    Mutant("offloader", "BlockOffloader._apply_updates", "self._stream.release(slot)"): looked_at_while_it_rests,
    Mutant("offloader", "BlockOffloader._apply_updates", "self._stream.wait(slot)"): _killed_by("rested", "host"),
    Mutant("offloader", "BlockOffloader.make_writable", "self._drain_fetches()"): _killed_by("loaded", "host"),
    Mutant("offloader", "BlockOffloader.refresh", "self._drain_fetches()"): _killed_by("copied", "int8"),
    Mutant("offloader", "BlockOffloader._move_blocks", "self._drain_fetches()"): _killed_by("trained", "int8"),
    Mutant("offloader", "BlockOffloader._set_active", "self._stream.wait_for_computation()"): _killed_by("trained", "int8"),
    Mutant("offloader", "BlockOffloader._drain_fetches", "self._stream.synchronize()"): _killed_by("trained", "int8"),
    Mutant("offloader", "BlockOffloader.wait", "self._stream.wait(slot)"): _killed_by("trained", "host"),
    Mutant("offloader", "BlockOffloader.release", "self._stream.release(slot)"): _killed_by("trained", "host"),
    Mutant("streams", "_synchronize", "stream.synchronize()"): _killed_by("trained", "int8"),
    Mutant(
        "streams", "_CudaStream.__init__", "weakref.finalize(self, _synchronize, self.stream, self._running).atexit = False"
    ): dropped_before_its_stream,
    Mutant("streams", "_CudaStream._run", "self.stream.wait_event(self.released[slot])"): _killed_by("trained", "host"),
    Mutant("streams", "_CudaStream._run", "self.arrived[slot].record(self.stream)"): _killed_by("trained", "host"),
    Mutant("streams", "_CudaStream._run", "self._running[slot] = fetch"): dropped_before_its_stream,
    Mutant("streams", "_CudaStream.wait", "torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])"): (
        _killed_by("trained", "host")
    ),
    Mutant("streams", "_CudaStream.release", "self.released[slot].record(torch.cuda.current_stream(self.device))"): (
        _killed_by("trained", "host")
    ),
    Mutant("streams", "_CudaStream.wait_for_computation", "self.stream.wait_stream(torch.cuda.current_stream(self.device))"): (
        _killed_by("trained", "host")
    ),
    Mutant("streams", "_CudaStream.synchronize", "_synchronize(self.stream, self._running)"): _killed_by("trained", "int8"),
    Mutant("streams", "_CudaStream.wait", "super().wait(slot)"): _killed_by("trained", "disk"),
    Mutant("streams", "_CudaStream.synchronize", "super().synchronize()"): _killed_by("loaded", "disk"),
    Mutant("streams", "CopyStream.wait", "self._fetches[slot].result()"): _killed_by("trained", "disk"),
    Mutant("streams", "CopyStream.synchronize", "fetch.exception()"): _killed_by("loaded", "disk"),
    Mutant("fetch_schedule", "FetchSchedule.enter", "self.executor.wait(block, self.slot_of(block))"): _killed_by(
        "trained", "host"
    ),
    Mutant("fetch_schedule", "FetchSchedule.enter", "self._release(above)"): blocks_with_two_inputs,
    Mutant("fetch_schedule", "FetchSchedule.leave_forward", "self._release(block)"): _killed_by("trained", "host"),
    Mutant("fetch_schedule", "FetchSchedule._after_backward", "self._release(block)"): _killed_by("trained", "host"),
    Mutant("fetch_schedule", "FetchSchedule.release_all", "self._release(block)"): _killed_by("interrupted", "host"),
    Mutant("fetch_schedule", "FetchSchedule._release", "self.executor.release(block, self.slot_of(block))"): _killed_by(
        "trained", "host"
    ),
}


def test_every_statement_that_orders_something_has_a_run_that_needs_it() -> None:
    assert set(mutants()) == set(MUTANTS)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.function}: {mutant.statement[:40]}")
def test_a_run_fails_without(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(mutant, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):  # load_state_dict wraps what it meets
        MUTANTS[mutant](tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_gradients_that_wait_on_the_host_are_added_up_on_the_gpu(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches without a wait between them, in whose last one subspaces are renewed; matrices of several parts."""
    monkeypatch.setattr(gradient_capture, "rows_at_a_time", lambda elements, device: max(1, 256 // elements))

    def gradients(device: str) -> list[torch.Tensor]:
        model = tiny_model(architecture, num_hidden_layers=2)
        if architecture == "qwen3_moe":
            model.set_experts_implementation("batched_mm")  # a GPU's own has no kernel on a CPU
        model.to(device)
        optimizer = GaLoreAdamW(galore_param_groups(model, rank=4), lr=1e-2)
        optimizer.project_in_backward(model=model)
        on_host = [precompute_on_host(tiny_batch(seed=seed)) for seed in range(2)]
        batches = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in on_host]
        for micro, batch in enumerate(batches):
            optimizer.accumulating = micro == 0
            next_token_loss(model, batch).total.backward()
        return [gradient.cpu() for gradient in optimizer.gradients()]

    with FakeGpu(late=True).installed():
        found = gradients("cuda")
    torch.testing.assert_close(found, gradients("cpu"), rtol=0, atol=1e-5)  # experts' products round otherwise there
