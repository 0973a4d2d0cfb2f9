import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import read_error

from calm_ray.questions import records
from calm_ray.questions.records import read_records

ROWS = [{"a": "1", "b": "é, [x]"}, {"a": "2", "b": 'q "quoted" ü'}, {"a": "3", "b": "日本"}]


def to_jsonl(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def to_json(rows: list[Any]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=2).encode()


def to_csv(rows: list[Any]) -> bytes:
    cells = [list(rows[0])] + [list(row.values()) for row in rows]
    return "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells).encode()


def to_tsv(rows: list[Any]) -> bytes:
    return "\n".join("\t".join(row) for row in [list(rows[0])] + [list(row.values()) for row in rows]).encode()


WRITERS = {".jsonl": to_jsonl, ".json": to_json, ".csv": to_csv, ".tsv": to_tsv}


def read_values(file: Path) -> list[tuple[int, Any]]:
    return [(record.row, record.value) for record in read_records(str(file))]


@pytest.mark.parametrize("suffix", WRITERS)
def test_text_files_may_have_a_bom_and_crlf_line_endings(tmp_path: Path, suffix: str) -> None:
    file, data = tmp_path / f"x{suffix}", WRITERS[suffix](ROWS)
    for written in (data, b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data + b"\r\n"):
        file.write_bytes(written)
        assert read_values(file) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("suffix", WRITERS)
def test_invalid_utf8_is_reported_with_row_and_byte(tmp_path: Path, suffix: str) -> None:
    file, data = tmp_path / f"x{suffix}", WRITERS[suffix](ROWS)
    at = data.index("ü".encode())
    file.write_bytes(data[:at] + b"\xfc" + data[at + 2 :])
    assert f"row {1 if suffix == '.json' else 2}: byte {at} of the file is not UTF-8" in read_error(file)
    file.write_bytes(data.decode().encode("utf-16"))
    assert "UTF-16" in read_error(file)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_json_list_is_decoded_across_chunk_boundaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    rows: list[Any] = [*ROWS, {"n": -12.5e3, "t": [True, None, {"x": '\\"é\\u00e9'}]}, 123456, "text", [], {}]
    file = tmp_path / "x.json"
    for written in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=3), f" \n{json.dumps(rows)}\n "):
        file.write_text(written, encoding="utf-8")
        assert read_values(file) == list(enumerate(rows, start=1))
    file.write_text("[ ]")
    assert read_values(file) == []


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_truncated_json_list_is_reported_with_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    whole = json.dumps(ROWS)
    file = tmp_path / "x.json"
    for end, row in ((whole.index("quoted"), 2), (whole.index('"3"') - 4, 3), (len(whole) - 1, 4)):
        file.write_text(whole[:end])
        assert f"row {row}: not valid JSON" in read_error(file)
    file.write_text(whole + "x")
    assert "row 4: not valid JSON" in read_error(file)
    file.write_text('"text"')
    assert "neither a JSON list of records nor JSON Lines" in read_error(file)


def test_json_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(to_jsonl(ROWS))
    assert read_values(tmp_path / "x.json") == list(enumerate(ROWS, start=1))


def test_invalid_line_is_one_bad_record(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n\n{"a": \n{"a": 4}\n')
    read = list(read_records(str(file)))
    assert [(record.row, record.value) for record in read] == [(1, {"a": 1}), (3, None), (4, {"a": 4})]
    assert read[1].bad is not None
    assert read[1].bad.reason == "not valid JSON"


@pytest.mark.parametrize(("suffix", "write"), [(".csv", to_csv), (".tsv", to_tsv)])
def test_row_with_too_few_cells_is_one_bad_record(
    tmp_path: Path, suffix: str, write: Callable[[list[Any]], bytes]
) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(write([ROWS[0], {"a": "alone"}, ROWS[2]]))
    read = list(read_records(str(file)))
    assert [record.row for record in read if record.bad is None] == [1, 3]
    assert str(read[1].bad) == "the number of cells differs from the header: 1, not 2"


def test_csv_cells_may_span_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('a,b\n"two\nlines",x\ny,z\n')
    assert read_values(file) == [(1, {"a": "two\nlines", "b": "x"}), (2, {"a": "y", "b": "z"})]
    file.write_text('a,b\nx,y\n"never closed,z\n')
    assert "row 2: not valid CSV" in read_error(file)


def test_parquet_is_read_in_batches_and_refused_if_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BATCH", 3)
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": list(range(8))}), file, row_group_size=5)
    assert read_values(file) == [(n + 1, {"n": n}) for n in range(8)]
    file.write_bytes(file.read_bytes()[:-20])
    assert "cannot be read as Parquet" in read_error(file)
