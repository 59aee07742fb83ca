"""Where rows come from: local files, directories and globs, or a data set on the Hugging Face hub."""

import bz2
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from huggingface_hub.utils.sha import sha_fileobj
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ows_lightning.compat import fingerprint
from ows_lightning.data.formats import COLUMNS, Row, without_none
from ows_lightning.errors import UsageError, did_you_mean, first_line


def _open_zstandard(file: Path, mode: str) -> IO[bytes]:
    import pyarrow  # type: ignore[import-untyped]

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


_COMPRESSIONS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard
}  # fmt: skip
_FILE_KINDS = ".jsonl, .json, .parquet, .csv"  # for messages: the usual ones
_OTHER_DATA = {".arrow", ".pkl", ".tar", ".txt", ".xlsx", ".zip"}  # which are not read
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(:(?P<split>[^/]+))?")
_PREFERRED = {"eval_dataset": ("validation", "test"), "test_dataset": ("test", "validation")}
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLIT_WORDS |= dict.fromkeys(["val", "valid", "validation", "dev", "eval", "evaluation"], "validation")


@dataclass(frozen=True)
class DataSource:
    """One source of rows."""

    name: str  # as the user wrote it
    key: str  # the setting that named it: dataset, eval_dataset or test_dataset
    files: tuple[str, ...]  # none of a data set on the hub, or one written by `Dataset.save_to_disk`
    splits: tuple[str, ...]  # the first that it has is taken

    @property
    def requires_answer(self) -> bool:
        """Whether its rows need an answer; test rows may be prompts for `predict`."""
        return self.key != "test_dataset"

    def error(self, message: str) -> UsageError:
        """The error for this source, with the setting's name in front."""
        return UsageError(f"data.{self.key}: {message}")


def resolve(name: str, key: str, split: str = "train") -> DataSource:
    """Finds what a name stands for: a file, directory, glob, or a data set on the hub (``owner/name[/config][:split]``)."""
    source = DataSource(name, key, (), tuple(dict.fromkeys([*_PREFERRED.get(key, ()), split])))
    if not name.strip():
        raise source.error("'' names no source; give a file, a directory, a glob or a data set on the hub")
    try:
        return _resolve(source, Path(name).expanduser())
    except (OSError, RuntimeError) as error:  # the name is too long, a folder is not readable, ~user is unknown
        raise source.error(f"can't look for '{name[:100]}': {getattr(error, 'strerror', None) or error}") from None


def _resolve(source: DataSource, path: Path) -> DataSource:
    name = source.name
    if path.is_file():
        if not _suffix_of(path):
            raise source.error(f"'{name}' is not a {_FILE_KINDS} file")
        return _check_split_unset(replace(source, files=(str(path),)))
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return source
        return replace(source, files=_files_of_split(path, source))
    if "://" in name:
        hub = re.fullmatch(r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?", name)
        hint = f"give its name, '{hub[1]}'" if hub else "download the file and give its path"
        raise source.error(f"'{name}' is an address, from which no rows are read; {hint}")
    if path.exists() or path.is_symlink():
        raise source.error(f"'{name}' is a device, a pipe or a broken link, not a file; save its rows as a {_FILE_KINDS} file")
    if glob.has_magic(name):
        files = sorted(f for f in glob.glob(str(path), recursive=True) if _suffix_of(Path(f)) and Path(f).is_file())
        if not files:
            raise source.error(f"no {_FILE_KINDS} file matches '{name}'")
        return _check_split_unset(replace(source, files=tuple(files)))
    meant = did_you_mean(path.name, [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else [])
    if _suffix_of(path) or name.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(name) or (path.suffix and meant):
        raise source.error(f"no file matches '{name}'{meant}")
    return source


def _suffix_of(path: Path) -> str | None:
    """The ending that says how a file is read, without that of its compression; None for other files."""
    name = path.name.lower()
    compressed = Path(name).suffix in _COMPRESSIONS
    suffix = Path(Path(name).stem).suffix if compressed else Path(name).suffix
    return suffix if suffix in _READERS and not (compressed and suffix == ".parquet") else None


def _check_split_unset(source: DataSource) -> DataSource:
    if source.key == "dataset" and source.splits[-1] != "train":
        hint = "leave data.split out, or give the file that holds the rows (on the hub, 'owner/name:split' asks for one)"
        raise source.error(f"'{source.name}' has no splits, and data.split asks for '{source.splits[-1]}'; {hint}")
    return source


def read_rows(source: DataSource) -> Iterator[tuple[str, Row]]:
    """Yields every row of a source with the words that name it in messages, such as ``train.jsonl line 7``."""
    if not source.files:
        number = 0
        for number, row in enumerate(open_dataset(source), start=1):
            yield f"{source.name} row {number}", drop_arrow_nulls(row)
        if not number:
            raise source.error(f"'{source.name}' has no rows")
    names = Counter(Path(file).name for file in source.files)
    for file in map(Path, source.files):
        place: str | None = None
        name = str(file) if names[file.name] > 1 else file.name
        for place, row in _READERS[str(_suffix_of(file))](file, source):
            if not isinstance(row, dict):
                raise source.error(f"{name} {place} is a {type(row).__name__}, not an object of columns and values")
            yield f"{name} {place}", row
        if place is None:
            raise source.error(f"{file} has no rows")


def content_hash(source: DataSource) -> str:
    """A hash of the source's content: of the files' bytes, or of the fingerprint of a data set that is not made of files."""
    digest = hashlib.sha256()
    if not source.files:
        digest.update(fingerprint(open_dataset(source)).encode())
    for file in source.files:
        digest.update(Path(file).name.encode())
        try:
            with open(file, "rb") as stream:
                digest.update(sha_fileobj(stream))
        except OSError as error:
            raise source.error(f"can't read {file}: {error.strerror}") from None
    return digest.hexdigest()[:32]


def _files_of_split(directory: Path, source: DataSource) -> tuple[str, ...]:
    """The data files below `directory`; where names name splits (train.jsonl, test/a.jsonl), those of one of `source`'s."""
    visible = sorted(map(Path, glob.glob(f"{glob.escape(str(directory))}/**/*", recursive=True)))  # also in linked folders
    files = [p for p in visible if _suffix_of(p) and p.is_file()]  # not Jupyter's old copies in .ipynb_checkpoints
    if not files:
        raise source.error(f"the directory '{source.name}' holds no {_FILE_KINDS} file")
    if others := join_names([p.name for p in visible if p.is_file() and p.suffix in _OTHER_DATA]):
        rank_zero_warn(f"data.{source.key}: '{source.name}' has files of other kinds, which are left out: {others}")
    # By its outermost folder that names one, or by its own name.
    words = {p: re.split(r"[^a-z]+", str(p.relative_to(directory).with_suffix("")).lower()) for p in files}
    splits = {p: next((_SPLIT_WORDS[word] for word in words[p] if word in _SPLIT_WORDS), None) for p in files}
    if not any(splits.values()):
        return _check_split_unset(replace(source, files=tuple(map(str, files)))).files
    chosen = _choose_split(source, [split for split in splits.values() if split])
    names = join_names([str(p.relative_to(directory)) for p in files if splits[p] is None or not chosen])
    if chosen is None:
        raise source.error(f"no file in '{source.name}' is named for data.split '{source.splits[-1]}' (files: {names})")
    if names:
        rank_zero_warn(f"data.{source.key}: '{source.name}' has files of splits; those that name none are left out: {names}")
    return tuple(str(p) for p in files if splits[p] == chosen)


def _choose_split(source: DataSource, there: Collection[str]) -> str | None:
    """The first of `source`'s splits that exists, under any of its names."""
    names = {_SPLIT_WORDS.get(split, split): split for split in there}
    names |= {split: split for split in there}
    wanted = next((word for split in source.splits for word in (split, _SPLIT_WORDS.get(split)) if word in names), None)
    if wanted is not None and wanted == source.splits[-1] and len(source.splits) > 2:
        others = " or ".join(source.splits[:-1])
        rank_zero_warn(f"data.{source.key}: '{source.name}' has no {others} split; its {wanted} split is taken")
    return names[wanted] if wanted is not None else None


def join_names(names: Collection[str]) -> str:
    """Returns the first ten names, for a message."""
    return ", ".join(itertools.islice(names, 10)) + (", ..." if len(names) > 10 else "")


def drop_arrow_nulls(row: Row) -> Row:
    """A row of typed columns without the empty keys that Arrow adds to its objects."""
    return {column: without_none(value) for column, value in row.items()}


def open_dataset(source: DataSource, streaming: bool = False) -> Any:
    """Opens a data set of the hub, or one that `Dataset.save_to_disk` wrote, as a table or as a stream."""
    import datasets

    try:
        if (folder := Path(source.name).expanduser()).is_dir():
            data = datasets.load_from_disk(str(folder))
            if not isinstance(data, dict) and str(data.split) != source.splits[-1]:
                _check_split_unset(source)
            data = _one_split(data, source)
            return data.to_iterable_dataset() if streaming else data
        match: Any = _HUB_NAME.fullmatch(source.name)
        path, config, split = match["path"], match["config"], match["split"]
        if split is None and len(source.splits) == 1:
            split = source.splits[0]  # may be a slice, as train[:1000]
        return _one_split(datasets.load_dataset(path, config, split=split, streaming=streaming), source)
    except UsageError:
        raise
    except IndexError:  # of `load_from_disk`
        raise source.error(f"'{source.name}' has no rows") from None
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        inner = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        why = first_line(inner or error)
        raise source.error(f"'{source.name}' is neither a local file nor a data set that the hub gives us: {why}") from error


def _one_split(data: Any, source: DataSource) -> Any:
    if not isinstance(data, dict):
        return data
    if (split := _choose_split(source, data)) is None:
        hint = f"set data.split to one of those it has: {', '.join(data)}"
        raise source.error(f"'{source.name}' has no split '{source.splits[-1]}'; {hint}")
    return data[split]


def _lines(file: Path, source: DataSource) -> Iterator[tuple[int, str]]:
    opened: Callable[[Path, str], Any] = _COMPRESSIONS.get(file.suffix.lower(), open)
    try:
        with opened(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        fault = f"byte 0x{error.object[error.start]:02x} at {error.start + 1}"
        raise source.error(f"{file.name} line {number} is not UTF-8 ({fault}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise source.error(f"can't read {file}: {getattr(error, 'strerror', None) or error}") from None


def _read_jsonl(file: Path, source: DataSource) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(file, source):
        if not (text := line.rstrip()):  # with its end, a line that is cut off would be wrong in column 1 of the next
            continue
        try:
            yield f"line {number}", json.loads(text)
        except (ValueError, RecursionError) as error:
            fault = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise source.error(f"{file.name} line {number} is not valid JSON: {fault}") from None


def _read_json(file: Path, source: DataSource) -> Iterator[tuple[str, Any]]:
    """One JSON array of objects (or an object that holds one under its only key), or JSON lines under the name .json."""
    text = "".join(line for _, line in _lines(file, source))
    if not text.strip():
        return
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", None) == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(file, source)
            return
        raise source.error(f"{file.name} is not valid JSON: {error}") from None
    if isinstance(data, dict):
        only = next(iter(data.values())) if len(data) == 1 and data.keys().isdisjoint(COLUMNS) else None
        data = only if isinstance(only, list) and all(isinstance(row, dict) for row in only) else [data]
    if not isinstance(data, list):
        raise source.error(f"{file.name} holds a {type(data).__name__}, not a list of objects")
    for number, row in enumerate(data, start=1):
        yield f"row {number}", row


def _read_csv(file: Path, source: DataSource) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)
    lines = (line for _, line in _lines(file, source))
    header, known = next(lines, ""), "\t" if _suffix_of(file) == ".tsv" else ",;\t"
    names = re.sub('"[^"]*"', "", header)  # those in quotes may have any mark in them
    delimiter = next((mark for mark in known if mark in names), known[0])
    reader = csv.DictReader(itertools.chain([header], lines), strict=True, delimiter=delimiter)
    try:
        if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
            raise source.error(f"{file.name} has the column {twice[0]!r} twice; give each a name of its own")
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                expected = len(reader.fieldnames or [])
                found = expected + len(row.get(None, [])) - list(row.values()).count(None)
                raise source.error(f"{file.name} {place} has {found} fields where the header has {expected}")
            yield place, row
    except csv.Error as error:
        raise source.error(f"{file.name} line {reader.line_num + 1} is not valid CSV: {error}") from None


def _read_parquet(file: Path, source: DataSource) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"row {number}", drop_arrow_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise source.error(f"{file.name} is not a readable parquet file: {first_line(error)}") from None


_READERS = {".json": _read_json, ".parquet": _read_parquet}
_READERS |= dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl) | dict.fromkeys((".csv", ".tsv"), _read_csv)
