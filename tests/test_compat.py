"""Private names of other libraries stand in `compat.py`, and every use outside it is listed here with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ows_lightning import compat

PACKAGE = Path(__file__).parents[1] / "ows_lightning"

OUTSIDE = {
    "callbacks/resume.py": {  # which rows Lightning's loggers have written, and when it steps
        "trainer._logger_connector", "loop._batches_that_stepped", "loop._should_accumulate",
    },
    "callbacks/run_folder.py": {"super()._get_next_version"},  # overridden where CSVLogger calls it
    "callbacks/run_checkpoint.py": {  # overridden where ModelCheckpoint calls them; whether min_steps lets a run end
        "super()._save_checkpoint", "super()._monitor_candidates", "super()._save_topk_checkpoint",
        "super()._should_save_on_train_epoch_end", "trainer.fit_loop._can_stop_early",
    },
    "callbacks/throughput.py": {"trainer.fit_loop.epoch_loop._batches_that_stepped"},  # the step of a validation's figures
    "trainer.py": {"callback._check_on_train_epoch_end"},  # whether EarlyStopping was told when to check
    "checkpoints/loops.py": {  # the state of Lightning's loops, which it saves a step behind
        "_FitLoop", "_Loop", "_TrainingEpochLoop", "_DataFetcher", "self._combined_loader._state_dicts",
    },
    "cli/lightning_cli.py": {"super()._prepare_subcommand_parser", "super()._run_subcommand"},  # overridden
    "cli/preflight.py": {"logger._version"},  # whether it is fixed: to ask for it publicly would choose it
    "cli/peer_watchdog.py": {"os._exit"},  # public in spite of its name
    "cli/parser.py": {"parser._actions", "argparse._SubParsersAction"},  # what a parser knows, for the nearest right name
    "memory/fake_tensors.py": {  # tensors without contents are torch's own machinery throughout
        "torch._subclasses.fake_tensor", "torch.utils._pytree", "profiler._record_function_exit",
        "profiler._record_function_exit._RecordFunction", "profiler._record_function_enter_new", "model._apply", "torch._C",
        "torch._C._disabled_torch_function_impl", "torch._C._DisableTorchDispatch", "Tensor._make_wrapper_subclass",
        "aten._local_scalar_dense", "aten._grouped_mm",
    },
    "memory/tracker.py": {  # documented by torch, but not public; operators by their names
        "torch.utils._python_dispatch", "torch.utils._pytree", "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward", "aten._grouped_mm",
    },
    "distributed/sharded_model.py": {"_InfiniteBarrier"},  # what Lightning puts around `prepare_data`
    "optim/gradient_capture.py": {"super()._init_unsaved"},  # its own
    "sampling/outliers.py": {"config._experts_implementation"},  # set and put back, which no function can do better
    "models/causal_lm.py": {"super()._apply"},  # overridden where nn.Module calls it
    "offload/access_hooks.py": {"block._apply", "type(block)._apply"},  # overridden where nn.Module calls it
}  # fmt: skip


def private_names(path: Path) -> Iterator[str]:
    """Names with a leading underscore that a file takes from elsewhere than itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("ows_lightning", "__future__")):
            if any(part.startswith("_") for part in str(node.module).split(".")):
                yield str(node.module)
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            named_tuples = node.attr in ("_replace", "_asdict")  # public in spite of the name
            yield from [] if own or named_tuples else [ast.unparse(node)]


def test_private_names_outside_compat_are_listed() -> None:
    files = {str(path.relative_to(PACKAGE)): set(private_names(path)) for path in PACKAGE.rglob("*.py")}
    del files["compat.py"]
    assert {name: used for name, used in files.items() if used} == OUTSIDE


def test_recomputation_counts_as_backward() -> None:
    seen = []

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(compat.in_backward())
            return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(Block(), x, use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_a_callback_runs_once_when_backward_ends() -> None:
    ended = []
    x = torch.ones(2, requires_grad=True)
    y = x.sin()
    y.register_hook(lambda _: compat.on_backward_end(lambda: ended.append(x.grad is not None)))
    y.sum().backward()
    assert ended == [True]


def test_buffers_that_are_not_saved_are_left_out() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("left_out", torch.ones(1), persistent=False)
    assert compat.persistent_buffer_names(module) == list(module.state_dict()) == ["kept"]


def test_a_gguf_file_is_read_as_ever(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path := tmp_path / "a.gguf", "llama")
    writer.add_context_length(64)
    writer.add_array("words", ["a", "bc"])
    writer.add_tensor("weight", np.arange(8, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    usual = gguf.GGUFReader(path)
    with compat.faster_gguf_loading():
        quick = gguf.GGUFReader(path)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert type(quick.data) is np.ndarray is not type(usual.data)  # whose slices take many times as long
    assert {key: field.contents() for key, field in quick.fields.items()} == {
        key: field.contents() for key, field in usual.fields.items()
    }
    np.testing.assert_array_equal(quick.tensors[0].data, usual.tensors[0].data)
    assert type(gguf.GGUFReader(path).data) is not np.ndarray
