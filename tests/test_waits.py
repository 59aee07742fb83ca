"""How often a run waits for its device: never in a micro-batch, once in an optimizer step, and once more where blocks enter.

A GPU works through what the host has asked of it; the host waits where it takes a number from there, or gives it one.
In these tests both sides are host memory; `Waits` tells them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from ows_lightning.callbacks.throughput import LearningRates, Throughput
from ows_lightning.compat import storage_key
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling
from tests.tiny import tiny_batch

INTERVAL, ACCUMULATE, STEPS = 3, 2, 9

HOST, DEVICE = torch.device("cpu"), torch.device("cpu", 0)  # as which tensors of the two sides name themselves


class Waits(TorchFunctionMode):
    """Counts what would wait for a device, by ``phase``.

    Tensors know on which side they are, as on a GPU: what is made for ``DEVICE``, or computed from a tensor there, or has been
    there before, says so (``device``, ``is_cuda``). These wait: what gives Python, or a result's shape, a number of its;
    decompositions of which torch says so; and copies from one side to the other that are not ``non_blocking``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase: Any = None
        self.counts: Counter[Any] = Counter()
        self.kinds: Counter[Any] = Counter()
        self.sides = Sides(self)

    def count(self, kind: str) -> None:
        self.counts[self.phase] += 1
        self.kinds[self.phase, kind] += 1

    def __enter__(self) -> Waits:
        self.sides.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.sides.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            real = func(*args, **kwargs)
            return real if real.type == "meta" else DEVICE if self.sides.on_device(args[0]) else HOST
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.sides.on_device(args[0])
        if func == Tensor.backward:  # as it does itself, but that hooks are seen
            with Resumed(self):
                ones = (torch.ones_like(args[0]),)
                return _engine_run_backward((args[0],), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)
        if name in ("tolist", "numpy") and self.sides.on_device(args[0]):
            self.count(name)
        if name in ("to", "cpu") and (side := self._side_of([HOST] if name == "cpu" else [*args[1:], *kwargs.values()])):
            return self._moved(func(*args, **kwargs), args[0], side, kwargs.get("non_blocking", False))
        kwargs.pop("pin_memory", None)
        self.sides.explicit = self._side_of([kwargs.get("device")])
        if name in ("tensor", "as_tensor") and self.sides.explicit == DEVICE and not isinstance(args[0], Tensor):
            self.count(name)
        if name == "new_tensor" and self.sides.on_device(args[0]):
            self.count(name)
        try:
            result = func(*args, **kwargs)
        finally:
            explicit, self.sides.explicit = self.sides.explicit, None
        if name in ("tensor", "as_tensor") and not isinstance(args[0], Tensor):
            self.sides.put(result, explicit or HOST)
        return result

    def _side_of(self, given: list[Any]) -> torch.device | None:
        for it in given:
            if isinstance(it, Tensor):
                return DEVICE if self.sides.on_device(it) else HOST
            if isinstance(it, (torch.device, str)):
                return torch.device(it)
        return None

    def _moved(self, result: Tensor, source: Tensor, side: torch.device, non_blocking: bool) -> Tensor:
        if self.sides.on_device(source) == (side == DEVICE):
            return result
        if not non_blocking:
            self.count(f"copy to {side}")
        result = result.clone()
        self.sides.put(result, side)
        return result


class Resumed(TorchFunctionMode):
    """Lets a mode see what is called within one of its own calls."""

    def __init__(self, mode: Waits) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self.mode.__torch_function__(func, types, args, kwargs)


class Sides(TorchDispatchMode):
    """Knows on which side each tensor is, and sees what operations read."""

    READS = (
        "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
        "_linalg_svd", "_linalg_eigh", "linalg_lstsq",
    )  # fmt: skip

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits
        self.host: dict[int, Any] = {}  # storages, which are kept so that no other gets their number
        self.explicit: torch.device | None = None

    def on_device(self, tensor: Tensor) -> bool:
        return storage_key(tensor) not in self.host

    def put(self, tensor: Tensor, side: torch.device) -> None:
        if side == DEVICE:
            self.host.pop(storage_key(tensor), None)
        else:
            self.host[storage_key(tensor)] = tensor.untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sides = {self.on_device(t) for t in given}
        indices = tree_leaves(args[1:2]) if name.startswith("index") else []
        by_mask = any(isinstance(t, Tensor) and t.dtype == torch.bool for t in indices)
        if True in sides and (name in self.READS or by_mask):
            self.waits.count(name)
        if name == "copy_" and len(sides) == 2 and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.waits.count(name)
        known = {storage_key(t) for t in given}
        result = func(*args, **kwargs)
        side = self.explicit or (DEVICE if True in sides else HOST)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and storage_key(made) not in known:
                self.put(made, side)
        return result


class Begin(Callback):
    """The first callback: what comes is a draw if it is anything."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.waits.phase = trainer.global_step, "draw"

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.waits.phase = trainer.global_step, "step"


class End(Callback):
    """The last callback."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module's own hook comes after the callbacks': it moves blocks that were drawn."""
        step = pl_module.training_step

        def training_step(batch: Any, batch_idx: int) -> Any:
            self.waits.phase = trainer.global_step, "micro-batch"
            return step(batch, batch_idx)

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.waits.phase = "between"


def batches() -> list[dict[str, Tensor]]:
    """Rows that are padded, without padding, and packed; of each kind two after one another."""
    padded = tiny_batch()
    padded["attention_mask"][0, 10:] = 0
    padded["labels"][0, 10:] = -100
    packed = {key: value for key, value in tiny_batch(seed=2).items() if key != "attention_mask"}
    packed["position_ids"] = torch.arange(16).remainder(9).expand(3, -1).clone()
    return [padded, padded, tiny_batch(seed=1), tiny_batch(seed=1), packed, packed] * (STEPS * ACCUMULATE // 6)


def counted(
    model: Path, folder: Path, distribution: str = "uniform", resting_rank: int = 0, **settings: Any
) -> tuple[Waits, LayerwiseSampling]:
    waits, mapped = Waits(), torch.frombuffer
    sampling = LayerwiseSampling(
        2, INTERVAL, distribution=distribution, always_train=("lm_head", "norm"), resting_rank=resting_rank  # type: ignore[arg-type]
    )  # fmt: skip
    module = CausalLMModule(str(model), warmup_steps=1, **{"rank": 4, "update_proj_gap": 100, **settings})
    trainer = Trainer(
        accelerator="cpu", strategy=SingleDeviceStrategy(DEVICE), max_steps=STEPS, accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=0.1, logger=CSVLogger(folder), log_every_n_steps=1, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Begin(waits), sampling, Throughput(), LearningRates(), End(waits)],
    )  # fmt: skip
    rows = batches()
    for tensor in tree_leaves(rows):
        waits.sides.put(tensor, HOST)

    def on_host(*args: Any, **kwargs: Any) -> Tensor:
        result = mapped(*args, **kwargs)
        waits.sides.put(result, HOST)
        return result

    with waits, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "frombuffer", on_host)
        patch.chdir(folder)  # a scratch file's
        trainer.fit(module, DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
    return waits, sampling


@pytest.mark.parametrize(
    ("distribution", "architecture"),
    [("uniform", "llama"), ("gradient_norm", "llama"), ("uniform", "gpt2")],  # gpt2 looks for padding where it gets no mask
)
def test_only_optimizer_steps_and_draws_wait(
    distribution: str, architecture: str, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    waits, sampling = counted(model_dir(architecture), tmp_path, distribution)
    drawn = {step: set(blocks) for _, step, blocks in sampling.history}
    active: set[int] = set()
    for step in range(STEPS):
        entering = drawn.get(step, active) - active
        active = drawn.get(step, active)
        counts = {phase: waits.counts[step, phase] for phase in ("draw", "micro-batch", "step")}
        seen = {kind: count for (phase, kind), count in waits.kinds.items() if phase and phase[0] == step}
        assert counts["step"] == 1 + bool(entering), f"step {step}: {counts}, {seen}"  # for the subspaces of all that enter
        assert counts["draw"] == (step in drawn and step > 0 and distribution == "gradient_norm"), f"step {step}: {seen}"
        assert counts["micro-batch"] == 0, f"step {step}: {counts}, {seen}"


@pytest.mark.parametrize(
    ("settings", "of_block"),
    [
        ({"frozen_in": "host", "resting_rank": 2}, 1),
        pytest.param({"frozen_in": "host"}, 1, marks=pytest.mark.slow),
        pytest.param({"resting_rank": 2}, 0, marks=pytest.mark.slow),
        pytest.param({"frozen_in": "disk", "resting_rank": 2}, 9, marks=pytest.mark.slow),  # each weight: no page is locked
        pytest.param({"frozen_dtype": "int8"}, 1, marks=pytest.mark.slow),
        pytest.param({"frozen_in": "host", "frozen_dtype": "int8"}, 2, marks=pytest.mark.slow),  # it and its copy
    ],
    ids=str,
)
def test_a_draw_waits_once_more_for_each_block_that_is_offloaded(
    settings: dict[str, Any], of_block: int, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    waits, sampling = counted(model_dir(), tmp_path, **settings)
    drawn = {step: set(blocks) for _, step, blocks in sampling.history}
    active: set[int] = set()
    for step in range(STEPS):
        entering, leaving = drawn.get(step, active) - active, active - drawn.get(step, active)
        active = drawn.get(step, active)
        counts = {phase: waits.counts[step, phase] for phase in ("micro-batch", "step")}
        seen = {kind: count for (phase, kind), count in waits.kinds.items() if phase and phase[0] == step}
        assert counts == {"micro-batch": 0, "step": 1 + bool(entering)}, f"step {step}: {seen}"
        merged = entering if "resting_rank" in settings else set()  # what they learned at rest is written into them first
        copies = seen.get("copy_", 0)
        assert bool(copies) == bool(of_block and leaving), f"step {step}: {seen}"
        assert copies <= of_block * len(leaving | merged), f"step {step}: {seen}"
