"""FSDP2 for models whose trained blocks change: ``--trainer.strategy fsdp2``."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from ows_lightning.atomic_files import partial_path, replace_atomically
from ows_lightning.checkpoints.files import DCP_METADATA_FILE, META_FILE, file_crc32, save_file
from ows_lightning.checkpoints.find import read_checkpoint
from ows_lightning.checkpoints.io import AtomicCheckpointIO, save_error
from ows_lightning.checkpoints.shards import ShardWriter, load_optimizer_states, load_weights, split_checkpoint
from ows_lightning.errors import RunError, UsageError, refuse_url
from ows_lightning.models.plain_weights import full_tensor
from ows_lightning.optim.sharding import shard_state


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all processes sharding the data and the weights, on GPUs or CPUs.

    The module shards itself in ``configure_model`` (see ``shard_model``). Checkpoints hold optimizer state for what trained
    when they were saved, and are restored to just that; Lightning needs the same parameters to be trainable beforehand.

    Args:
        save_distributed_checkpoint: Every process writes its shards into a directory; otherwise all is gathered, a tensor at
            a time, into one file on rank 0, as without sharding. Either kind loads on any number of processes.
        **kwargs: Lightning's, such as ``process_group_backend`` and ``timeout``.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **kwargs: Any) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        """Starts the processes' communication."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state: this process's shards, or all of it on rank 0."""
        assert self.lightning_module is not None
        return self._to_save(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state: this process's shards, or all of it on rank 0."""
        state = optimizer.state_dict()
        return {**state, "state": {number: self._to_save(values) for number, values in state["state"].items()}}

    def _to_save(self, state: Mapping[str, Any]) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return dict(state)
        gathered = {}
        for name, value in state.items():
            whole = full_tensor(value) if isinstance(value, Tensor) else value
            if self.global_rank == 0:
                gathered[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        return gathered

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint atomically; an error on all ranks, if one of them can't write."""
        refuse_url("checkpoint.dirpath", filepath)
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            self._save_shards(checkpoint, path)
        else:
            self._on_rank_zero(path, lambda: AtomicCheckpointIO().save_checkpoint(checkpoint, path))

    def _save_shards(self, checkpoint: dict[str, Any], path: Path) -> None:
        partial = partial_path(path)
        tensors, rest = split_checkpoint(checkpoint)

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def finish() -> None:
            sums[DCP_METADATA_FILE] = file_crc32(partial / DCP_METADATA_FILE)
            save_file({**rest, "sums": sums}, partial / META_FILE)
            replace_atomically(partial, path)

        try:
            self._on_rank_zero(path, begin)
            dcp.save(tensors, storage_writer=ShardWriter(partial))
            of_ranks: list[Any] = [None] * self.world_size  # checksums of shards, each by the process that wrote it
            dist.all_gather_object(of_ranks, {p.name: file_crc32(p) for p in partial.glob(f"__{self.global_rank}_*")})
            sums = {name: value for own in of_ranks for name, value in own.items()}
            self._on_rank_zero(path, finish)
        except dcp.CheckpointException as error:  # on all processes, if it is one's
            raise save_error(path, error) from error
        finally:
            if self.global_rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _on_rank_zero(self, path: Path, act: Callable[[], None]) -> None:
        """Does on rank 0 what belongs to the writing of a checkpoint; if it fails there, it has failed everywhere."""
        failure = None
        if self.global_rank == 0:
            try:
                act()
            except Exception as error:  # any, or the others would wait for ever
                is_ours = isinstance(error, (RunError, UsageError))
                failure = error if is_ours else save_error(path, error).with_traceback(error.__traceback__)
        if failure := self.broadcast(failure):
            raise failure

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls ``load_optimizer_state_dict``, after hooks had a look at the checkpoint."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; of shards no tensors, which the two following methods read, each process its part."""
        refuse_url("ckpt_path", checkpoint_path)
        path = Path(self.broadcast(checkpoint_path))
        return {**read_checkpoint(path), "path": str(path)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Reads this process's part of the weights into the module."""
        assert self.lightning_module is not None
        module, path, saved = self.lightning_module, Path(checkpoint["path"]), checkpoint.get("state_dict")
        if saved is None:
            read_checkpoint(path, lambda path: load_weights(module, path, strict))
            return
        state = module.state_dict()
        if strict and (different := sorted(state.keys() ^ saved.keys())):
            raise UsageError(f"ckpt_path: '{path}' is of another model, as to {different[0]}")
        for name in state.keys() & saved.keys():
            state[name].copy_(_local_part(saved[name], state[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Reads this process's part of the optimizers' state."""
        states = checkpoint["optimizer_states"]
        weights = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in self.optimizers]
        if "state_dict" not in checkpoint:
            states = read_checkpoint(Path(checkpoint["path"]), lambda path: load_optimizer_states(path, states, weights))
        for own, optimizer, state in zip(weights, self.optimizers, states, strict=True):
            for number, values in state["state"].items():
                state["state"][number] = {key: _local_part(value, own[number]) for key, value in values.items()}
            optimizer.load_state_dict(state)


def _local_part(value: Any, weight: Tensor) -> Any:
    """This process's part of a tensor that is distributed as a weight is, if it has its shape."""
    return shard_state(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value
