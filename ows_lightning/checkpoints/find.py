"""Finding the checkpoint that a user means, or the newest undamaged one."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

from ows_lightning.checkpoints.files import DCP_METADATA_FILE, META_FILE, READ_ERRORS, REQUIRED_KEYS, file_crc32, load_file
from ows_lightning.checkpoints.shards import ShardReader
from ows_lightning.errors import UsageError, first_line

log = logging.getLogger(__name__)


def find_checkpoint(ckpt_path: str, *places: Path) -> str | Path | None:
    """Returns the checkpoint that a user means, if it is good; else a UsageError names the last good one.

    ``last`` means the newest good checkpoint of the first of the ``places`` that has one; None if none has. A place is a
    folder of checkpoints, or of runs ``version_N``, of which the newest run with a good one counts. An address such as
    ``s3://...`` has to exist.
    """
    if "://" in ckpt_path:
        try:
            there = get_filesystem(ckpt_path).exists(ckpt_path)
        except Exception as error:  # whatever the file system of that scheme raises
            raise UsageError(f"ckpt_path: can't reach '{ckpt_path}' ({first_line(error)})") from error
        if not there:
            raise UsageError(f"ckpt_path: no checkpoint '{ckpt_path}'")
        return ckpt_path
    if ckpt_path != "last":
        read_checkpoint(Path(ckpt_path))
        return Path(ckpt_path)
    return next((path for place in places for folder in _checkpoint_folders(place) if (path := last_good(folder))), None)


def _checkpoint_folders(place: Path) -> Iterator[Path]:
    """Yields the folders of checkpoints below a folder, the newest run's first."""
    runs = [run for run in place.glob("version_*") if run.name[8:].isdecimal()]
    for run in sorted(runs, key=lambda run: int(run.name[8:]), reverse=True):
        yield run / "checkpoints"
    yield from (place / "checkpoints", place)


def last_good(folder: Path, other_than: Path | None = None) -> Path | None:
    """Returns the newest checkpoint in a folder that is whole; damaged ones are named in the log."""
    for pattern in ("*.ckpt", ".*.ckpt.old"):  # the latter is left by a kill during `replace_atomically`
        there = [path for path in folder.glob(pattern) if path.exists() and path != other_than]  # no dangling links
        for path in sorted(there, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), reverse=True):
            try:
                load_verified(path)
                return path
            except READ_ERRORS as error:
                log.warning("Passed over the damaged checkpoint %s (%s)", path, first_line(error))
    return None


def load_verified(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's contents with memory-mapped or no tensors, after all checksums were verified."""
    if not path.is_dir():
        return load_file(path)
    contents = load_file(path / META_FILE, needed=REQUIRED_KEYS[1:])
    for name, expected in contents.get("sums", {}).items():
        if file_crc32(path / name) != expected:
            raise ValueError(f"{name} has another checksum than when it was written")
    for info in ShardReader(path).read_metadata().storage_data.values():
        if (path / info.relative_path).stat().st_size < info.offset + info.length:
            raise ValueError(f"{info.relative_path} is cut short")
    return contents


def read_checkpoint(path: Path, read: Callable[[Path], Any] = load_verified) -> Any:
    """Returns `read(path)`, by default `load_verified`'s; a fault is a UsageError that names the last good checkpoint."""
    if not path.exists():
        raise UsageError(f"ckpt_path: no checkpoint '{path}'; {_hint(path)}")
    if path.is_dir() and not any((path / name).exists() for name in (META_FILE, DCP_METADATA_FILE)):
        within = next(filter(None, map(last_good, _checkpoint_folders(path))), None)
        hint = f"the last good one in it is '{within}'" if within else "there is no good one in it"
        raise UsageError(f"ckpt_path: '{path}' is a folder, not a checkpoint; {hint}")
    try:
        return read(path)
    except UsageError:
        raise
    except READ_ERRORS as error:
        reason = first_line(error)
        raise UsageError(f"ckpt_path: '{path}' is damaged or no checkpoint of a run ({reason}); {_hint(path)}") from error


def _hint(path: Path) -> str:
    good = last_good(path.parent, other_than=path)
    return f"the last good one is '{good}'" if good else "there is no good one beside it"
