"""Checkpoints that are written atomically, and hold tensors and plain values only.

A checkpoint is a file, or a directory into which every process wrote its shards (``meta.pt`` and the format of
``torch.distributed.checkpoint``). Both hold the same dict, so that either can be resumed on any number of processes.
"""

import contextlib
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ows_lightning.atomic_files import partial_path, replace_atomically
from ows_lightning.checkpoints.files import root_cause, save_file
from ows_lightning.checkpoints.find import last_good, load_verified, read_checkpoint
from ows_lightning.checkpoints.shards import load_shards
from ows_lightning.errors import RunError, first_line


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint IO, made safe against kills, full disks and damaged files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a file under a temporary name, and renames it when it is on the disk; until then the old one is there."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        partial = partial_path(path)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            save_file(checkpoint, partial)
            replace_atomically(partial, Path(path))
        except (OSError, RuntimeError) as error:
            raise save_error(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a file, whose tensors are mapped, or a directory of shards, always with ``weights_only=True``."""
        return super().load_checkpoint(path, weights_only=True) if "://" in str(path) else read_checkpoint(Path(path), _load)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint; a directory is renamed first, so that no half of it looks like a checkpoint."""
        if Path(path).is_dir():
            path = Path(path).rename(partial_path(path))
        super().remove_checkpoint(path)


def _load(path: Path) -> dict[str, Any]:
    contents = load_verified(path)
    return load_shards(path, contents) if path.is_dir() else contents


def save_error(path: Any, error: BaseException) -> BaseException:
    """The error of a checkpoint that could not be written; a user's interrupt remains one."""
    reason = root_cause(error)
    if isinstance(reason, KeyboardInterrupt):
        return reason
    before = last_good(Path(path).parent)
    kept = f"'{before}' is still good" if before else "there is no earlier one"
    hint = "; free space on the disk and resume" if isinstance(reason, (OSError, RuntimeError)) else ""
    return RunError(f"can't write the checkpoint '{path}' ({first_line(reason)}); {kept}{hint}")
