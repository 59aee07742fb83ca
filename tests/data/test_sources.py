from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ows_lightning.data.sources import content_hash, read_rows, resolve
from ows_lightning.errors import UsageError

ROWS = [{"prompt": "é", "completion": "a"}, {"prompt": "q", "completion": "b"}]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    """Write rows in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = ["prompt,completion", *(f'"{row["prompt"]}",{row["completion"]}' for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def rows_of(name: str | Path, split: str = "train", key: str = "dataset") -> list[dict[str, str]]:
    return [row for _, row in read_rows(resolve(str(name), key, split))]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files(tmp_path: Path, suffix: str) -> None:
    assert rows_of(write(tmp_path / f"rows.{suffix}")) == ROWS


def _zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": _zstandard}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_compressed_files(tmp_path: Path, suffix: str, compression: str) -> None:
    compress: Callable[[bytes], bytes] = COMPRESS[compression]
    whole = compress(write(tmp_path / f"rows.{suffix}").read_bytes())
    file = tmp_path / f"rows.{suffix}.{compression}"
    file.write_bytes(whole)
    assert rows_of(file) == ROWS
    for broken in (whole[:-6], b"no archive"):
        file.write_bytes(broken)
        with pytest.raises(UsageError, match=rf"^data.dataset: can't read .*rows.{suffix}.{compression}: .") as caught:
            rows_of(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ROWS.JSONL", "rows.Json", "rows.CSV", "rows.PARQUET", "rows.ndjson", "rows.jsonl.GZ"])
def test_endings_in_other_spellings(tmp_path: Path, name: str) -> None:
    kind = name.lower().removesuffix(".gz").rpartition(".")[2]
    content = write(tmp_path / f"plain.{kind}").read_bytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert rows_of(tmp_path / "a" / name) == rows_of(tmp_path / "a") == rows_of(tmp_path / "a" / "*") == ROWS


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_values_that_a_spreadsheet_separated_otherwise(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "rows.csv").write_text(f"prompt{delimiter}completion\r\nq, r{delimiter}a\r\n")
    assert rows_of(tmp_path / "rows.csv") == [{"prompt": "q, r", "completion": "a"}]


def test_a_quoted_name_may_have_the_mark_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt;completion;"notes, misc"\nq;a;n\n')
    assert rows_of(tmp_path / "rows.csv") == [{"prompt": "q", "completion": "a", "notes, misc": "n"}]


def test_tab_separated_values(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("prompt\tcompletion\nq, r\ta\n")
    assert rows_of(tmp_path / "rows.tsv") == [{"prompt": "q, r", "completion": "a"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "*.jsonl", "", "one"])
def test_a_split_of_what_has_none_is_refused(tmp_path: Path, name: str) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one") if name == "one" else write(tmp_path / "rows.jsonl")
    assert rows_of(tmp_path / name, key="eval_dataset", split="validation") == ROWS
    with pytest.raises(UsageError, match=r"has no splits, and data.split asks for 'validation'; leave data.split out"):
        rows_of(tmp_path / name, split="validation")


def test_json_under_other_shapes(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"data": ROWS}))
    assert rows_of(file) == ROWS
    file.write_text("\n".join(map(json.dumps, ROWS)))
    assert rows_of(file) == ROWS
    file.write_text("\ufeff" + json.dumps(ROWS[0]), encoding="utf-8")
    assert rows_of(file) == ROWS[:1]
    conversation = {"messages": [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "odd"}]}
    file.write_text(json.dumps(conversation))  # a file a conversation
    assert rows_of(file) == [conversation]


def test_directories_and_globs(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "more" / "b.csv")
    assert rows_of(tmp_path) == ROWS * 2
    assert rows_of(tmp_path / "*.jsonl") == ROWS


def test_linked_folders_are_read_as_a_glob_reads_them(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.jsonl", ROWS[:1])
    write(tmp_path / "elsewhere" / "b.jsonl", ROWS[1:])
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    assert rows_of(tmp_path / "data") == rows_of(tmp_path / "data" / "**" / "*.jsonl") == ROWS


def test_rows_of_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "rows.jsonl", ROWS[:1])
    write(tmp_path / "other.jsonl", ROWS[:1])
    named = [name for name, _ in read_rows(resolve(str(tmp_path), "dataset"))]
    assert named == [f"{tmp_path}/a/rows.jsonl line 1", f"{tmp_path}/b/rows.jsonl line 1", "other.jsonl line 1"]


def test_hidden_files_of_a_directory_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path / ".data" / "a.jsonl")
    write(tmp_path / ".data" / ".ipynb_checkpoints" / "a-checkpoint.jsonl", ROWS[:1])  # Jupyter's copy of an older state
    write(tmp_path / ".data" / ".a.jsonl", ROWS[:1])
    assert rows_of(tmp_path / ".data") == ROWS


def test_files_of_a_directory_that_are_not_read_are_said(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.zip").write_text("?")
    (tmp_path / "README.md").write_text("?")
    with pytest.warns(UserWarning, match=r"data.dataset: .* has files of other kinds, which are left out: b.jsonl.zip$"):
        assert rows_of(tmp_path) == ROWS


def test_a_directory_whose_files_name_splits_gives_the_split(tmp_path: Path) -> None:
    write(tmp_path / "boolq_train.jsonl", ROWS[:1])
    write(tmp_path / "boolq_test.jsonl", ROWS[1:])
    assert rows_of(tmp_path) == ROWS[:1]
    assert rows_of(tmp_path, "test") == ROWS[1:]
    with pytest.raises(UsageError, match=r"no file in .* is named for data.split 'validation' \(files: boolq_test.jsonl"):
        rows_of(tmp_path, "validation")


def test_folders_name_splits_too(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.jsonl", ROWS[:1])
    write(tmp_path / "test" / "a.jsonl", ROWS[1:])
    assert rows_of(tmp_path) == ROWS[:1]
    assert rows_of(tmp_path, "test") == ROWS[1:]


def test_files_that_name_no_split_beside_those_that_do_are_said(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:1])
    write(tmp_path / "more" / "extra.jsonl", ROWS[1:])
    with pytest.warns(UserWarning, match=r"data.dataset: .* those that name none are left out: more/extra.jsonl"):
        assert rows_of(tmp_path) == ROWS[:1]


@pytest.mark.parametrize(
    ("splits", "validation", "test"),
    [
        (["train", "dev", "test"], "dev", "test"),
        (["train", "test"], "test", "test"),
        (["train", "valid"], "valid", "valid"),
        (["train"], "train", "train"),
    ],
)
@pytest.mark.parametrize("kind", ["directory", "save_to_disk", "hub"])
@pytest.mark.filterwarnings("ignore:data.*its train split is taken")
def test_evaluation_rows_come_from_their_own_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, splits: list[str], validation: str, test: str
) -> None:
    rows = {split: [{"text": split}] for split in splits}
    name = str(tmp_path / "data")
    if kind == "directory":
        for split in splits:
            write(tmp_path / "data" / f"{split}.jsonl", rows[split])
    else:
        data = datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split]) for split in splits})
        data.save_to_disk(name)
    if kind == "hub":
        name = "owner/name"
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: data[split] if split else data)
    found = [rows_of(name, key=key) for key in ("dataset", "eval_dataset", "test_dataset")]
    assert found == [rows["train"], rows[validation], rows[test]]


def test_a_split_has_other_names_in_a_folder(tmp_path: Path) -> None:
    for split in ("training", "evaluation", "testing"):
        write(tmp_path / f"{split}.jsonl", [{"text": split}])
    found = [rows_of(tmp_path, key=key) for key in ("dataset", "eval_dataset", "test_dataset")]
    assert found == [[{"text": "training"}], [{"text": "evaluation"}], [{"text": "testing"}]]


def test_evaluation_rows_that_are_training_rows_are_said(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    with pytest.warns(UserWarning, match=r"data.eval_dataset: .* has no validation or test split; its train split is taken"):
        assert rows_of(tmp_path, key="eval_dataset") == ROWS


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    assert rows_of(tmp_path / "one") == ROWS
    assert rows_of(tmp_path / "splits", "test") == ROWS
    data.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(UsageError, match=r"none' has no rows$"):
        rows_of(tmp_path / "none")
    with pytest.raises(UsageError, match=r"has no split 'train'; set data.split to one of those it has: test$"):
        rows_of(tmp_path / "splits")


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    source = resolve(str(write(tmp_path / "a.jsonl")), "dataset")
    before = content_hash(source)
    write(tmp_path / "a.jsonl")
    assert content_hash(source) == before
    write(tmp_path / "a.jsonl", ROWS[:1])
    assert content_hash(source) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b"\n\n", "a.jsonl has no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1,}\n', "a.jsonl line 2 is not valid JSON: .* at column 9"),
        ("a.jsonl", b'{"a": 1}\n{"a":\r\n{"a": 1}\n', "a.jsonl line 2 is not valid JSON: Expecting value at column 6"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl line 2 is a list, not an object of columns and values"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a.jsonl line 2 is not UTF-8 \(byte 0xe9 at 8\); save it as UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a" 1}]', "a.json is not valid JSON: Expecting ':' delimiter: line 2 column 6"),
        ("a.jsonl", b'{"a": ' + b"[" * 20000, "a.jsonl line 1 is not valid JSON: "),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", "a.jsonl line 2 is not valid JSON: "),
        ("a.json", b"[" * 20000, "a.json is not valid JSON: "),
        ("a.json", b"3", "a.json holds a int, not a list of objects"),
        ("a.json", b"", "a.json has no rows"),
        ("a.csv", b"prompt,completion\nq,a\nq\n", "a.csv line 3 has 1 fields where the header has 2"),
        ("a.csv", b"prompt,completion\nq,a,b\n", "a.csv line 2 has 3 fields where the header has 2"),
        ("a.csv", b"prompt,completion\n", "a.csv has no rows"),
        ("a.csv", b'prompt,completion\nq,a\nq,"a"b\n', "a.csv line 3 is not valid CSV"),
        ("a.csv", b'prompt,completion\nq,"a\n', "a.csv line 2 is not valid CSV"),
        ("a.csv", b"prompt,completion,prompt\nq,a,b\n", "a.csv has the column 'prompt' twice"),
        ("a.parquet", b"PAR1", "a.parquet is not a readable parquet file"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        rows_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.jsonl", "data.dataset: no file matches '.*train.jsonl'; did you mean '.*trian.jsonl'"),
        ("*.csv", "data.dataset: no .jsonl, .json, .parquet, .csv file matches"),
        ("empty", "data.dataset: the directory '.*empty' holds no .jsonl"),
        ("notes.txt", "data.dataset: '.*notes.txt' is not a .jsonl"),
    ],
)
def test_missing_files(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path / "trian.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=message):
        resolve(str(tmp_path / name), "dataset")


def test_a_misspelt_ending_is_not_taken_for_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my.csv")
    with pytest.raises(UsageError, match=r"no file matches 'my\.cvs'; did you mean 'my\.csv'"):
        resolve("my.cvs", "dataset")
    assert resolve("tatsu-lab/alpaca", "dataset").files == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/dev/null", "^data.dataset: '/dev/null' is a device, a pipe or a broken link, not a file; save its rows"),
        ("pipe.jsonl", "^data.dataset: '.*pipe.jsonl' is a device, a pipe or a broken link"),
        ("link.jsonl", "^data.dataset: '.*link.jsonl' is a device, a pipe or a broken link"),
        ("a" * 5000, "^data.dataset: can't look for 'a.*': File name too long"),
        ("~nobody_at_all/a.jsonl", "^data.dataset: can't look for '~nobody_at_all"),
        ("\0", "^data.dataset: no file matches "),
        (" ", "^data.dataset: '' names no source"),
    ],
)
def test_names_of_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    Path("link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UsageError, match=message) as caught:
        resolve(name, "dataset")
    assert "did you mean" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreachable_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"^data.eval_dataset: 'nobody/nothing:test' is neither a local file nor a data set"):
        list(read_rows(resolve("nobody/nothing:test", "eval_dataset")))


def test_a_data_set_of_the_hub_that_is_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found old.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UsageError, match=r"^data.dataset: 'owner/old' .*: Dataset scripts are no longer supported"):
        rows_of("owner/old")
