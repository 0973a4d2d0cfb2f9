"""Damaged or hostile model folders and question files are refused by name and never run as code."""

from __future__ import annotations

import json
import struct
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import read_error, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calm_ray.commands.export import copy_model
from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.rows import Question, table
from calm_ray.job.preflight import check_model
from calm_ray.questions import records
from calm_ray.questions.formats import FORMATS
from calm_ray.questions.hub import hub_names
from calm_ray.questions.reader import load_questions, question_of
from calm_ray.questions.records import Record, read_records
from calm_ray.questions.sources import Part, matching
from calm_ray.run.model_files import check_files, require_safetensors
from calm_ray.run.policies import RunModel

HEADER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
TENSORS = struct.pack("<Q", len(HEADER)) + HEADER + bytes(4)
NESTED = "[" * 100_000
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def write_adapter(folder: Path, weights: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / weights).write_bytes(TENSORS)
    return folder


def with_config(**values: Any) -> Callable[[Path], None]:
    """Returns a change that sets keys of config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def with_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Returns a change that writes a file with exactly this content."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def with_index(weights: Any) -> Callable[[Path], None]:
    return with_file("model.safetensors.index.json", json.dumps({"weight_map": weights}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_index({"w": "../../etc/passwd"}), "'../../etc/passwd', which is not a safetensors file in its folder"),
        (with_index({"w": "/etc/passwd"}), "which is not a safetensors file"),
        (with_index({"w": "model-00002.safetensors"}), "which is not a safetensors file"),
        (with_index(["w"]), "has no weight_map"),
        (with_index({"w": 1}), "has no weight_map"),
        (with_file("more.safetensors", b""), r"more.safetensors: cannot be read as safetensors"),
        (with_file("more.safetensors", struct.pack("<Q", 2**63) + HEADER), "cannot be read as safetensors"),
        (with_file("more.safetensors", struct.pack("<Q", 99_000_000) + HEADER), "cannot be read as safetensors"),
        (with_file("more.safetensors", struct.pack("<Q", 9) + b'{"w": 1}}'), "cannot be read as safetensors"),
        (with_file("more.safetensors", TENSORS[:-1]), "cannot be read as safetensors"),
        (with_file("config.json", "no JSON"), "config.json: cannot be read as JSON"),
        (with_file("config.json", b"\xff"), "config.json: cannot be read as JSON"),
        (with_file("config.json", NESTED), "config.json: cannot be read as JSON: nested too deeply"),
        (with_file("config.json", '{"a": ' * 5_000), "config.json: cannot be read as JSON"),
        (with_file("config.json", f'{{"vocab_size": {"9" * 5_000}}}'), "config.json: cannot be read as JSON"),
        (with_file("config.json", "[]"), "config.json: must contain a JSON object"),
        (with_file("tokenizer_config.json", "{"), "tokenizer_config.json: cannot be read as JSON"),
        (with_config(num_hidden_layers=10**9), "num_hidden_layers is 1e"),
        (with_config(model_type="nobody_knows_this"), "config.json has no model type built into transformers"),
        (with_config(model_type=None), "config.json has no model type built into transformers"),
        (with_config(hidden_size="wide"), "config.json has no model type built into transformers"),
        (with_file("tokenizer.json", "{"), "the tokenizer in .* cannot be loaded"),
        (with_file("tokenizer.json", "[]"), "the tokenizer in .* cannot be loaded"),
        (with_file("tokenizer.json", NESTED), "the tokenizer in .* cannot be loaded"),
        (with_file("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": [1]}}'), "cannot be loaded"),
    ],
)
def test_damaged_or_hostile_models_are_refused(model: Path, change: Callable[[Path], None], message: str) -> None:
    check_model(model)
    change(model)
    with pytest.raises(InputError, match=message) as refused:
        check_model(model)
    assert str(model) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_code_shipped_with_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "hostile.py").write_text(f"open({str(ran)!r}, 'w')\nclass Hostile: pass\n")
    foreign = {"auto_map": {"AutoConfig": "hostile.Hostile", "AutoModelForCausalLM": "hostile.Hostile"}}
    with_config(**foreign)(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    check_model(model)  # a built-in model type: transformers uses its own code
    with_config(model_type="hostile")(model)
    with pytest.raises(InputError, match="has no model type built into transformers"):
        check_model(model)
    assert not ran.exists()
    assert not [name for name in sys.modules if name.endswith("hostile")]


def test_symlinks_may_only_point_into_the_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "abc").write_bytes(TENSORS)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    require_safetensors(snapshot)
    copy_model(snapshot, tmp_path / "copy")
    assert not (tmp_path / "copy" / "model.safetensors").is_symlink()
    (tmp_path / "passwd.json").write_text("{}")
    for target in ("../../../passwd.json", str(tmp_path / "passwd.json"), "../../blobs/../../passwd.json"):
        (snapshot / "config.json").symlink_to(target)
        with pytest.raises(InputError, match=r"config.json: is a symlink that points outside its folder"):
            check_files(snapshot)
        (snapshot / "config.json").unlink()
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    require_safetensors(linked)


def test_adapter_weights_must_be_safetensors(tmp_path: Path) -> None:
    require_safetensors(write_adapter(tmp_path / "good", "adapter_model.safetensors"))
    for name in ("adapter_model.bin", "adapter_model.pt"):
        folder = write_adapter(tmp_path / name, name)
        with pytest.raises(InputError, match=rf"no \*.safetensors weights \({name}\); convert them first: load"):
            require_safetensors(folder)
        (folder / "other.safetensors").write_bytes(TENSORS)  # vLLM ignores this file
        with pytest.raises(InputError, match=f"expected adapter_model.safetensors, found {name}; convert"):
            require_safetensors(folder)
        (folder / "adapter_model.safetensors").write_bytes(TENSORS)
        with pytest.raises(InputError, match=f"expected adapter_model.safetensors, found {name}"):
            require_safetensors(folder)
    with pytest.raises(InputError, match=r"expected adapter_model\.safetensors, found no adapter weights"):
        require_safetensors(write_adapter(tmp_path / "none", "other.safetensors"))


def test_copying_a_model_skips_pickles_and_code(model: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "hostile.py", "run.sh", "optimizer.pt"):
        (model / name).write_text("")
    copy_model(model, tmp_path / "copy")
    copied = {file.name for file in (tmp_path / "copy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= copied
    assert {Path(name).suffix for name in copied} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize("name", ["a/../b", "x" * 5_000, "a\0b", "~nobody-at-all/x", "https://a/b"])
def test_invalid_model_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="model: "):
        RunModel(name).local_folder()


@pytest.mark.parametrize(
    ("suffix", "start", "body", "row"),
    [
        (".jsonl", '{"a": 1}\n{"a": "', "x", 2),
        (".json", '[{"a": 1}, "', "x", 2),
        (".json", '[{"a": 1}, [', "0,", 2),
        (".csv", "a\n1\n", "x", 2),
        (".csv", 'a\n1\n"', "x\n", 2),
        (".csv", "a\n1\n", '"\n",', 2),
        (".tsv", "a\n1\n", "x", 2),
    ],
)
def test_overlong_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, start: str, body: str, row: int
) -> None:
    monkeypatch.setattr(records, "_LONGEST_ROW", 1 << 20)
    monkeypatch.setattr(records, "_CHUNK", 1 << 18)
    file = tmp_path / f"x{suffix}"
    file.write_text(start + body * (1_400_000 // len(body)))
    assert f"row {row}: is longer than 1 MB" in read_error(file)


def test_gigabyte_line_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    with open(file, "wb") as sparse:
        sparse.truncate(1 << 30)
    tracemalloc.start()
    try:
        assert "row 1: is longer than 16 MB" in read_error(file)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("nested", [NESTED, '{"a":' * 100_000, "9" * 5_000])
def test_json_that_python_cannot_parse_is_refused(tmp_path: Path, nested: str) -> None:
    (tmp_path / "x.json").write_text(f'[{{"a": 1}}, {nested}')
    assert "row 2: not valid JSON" in read_error(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text(f'{{"a": 1}}\n{nested}\n{{"a": 3}}\n')
    read = list(read_records(str(tmp_path / "x.jsonl")))
    assert [record.bad and record.bad.reason for record in read] == [None, "not valid JSON", None]
    row = {"question_id": "q", "language": "en", "text": "t", "choices": ["a", "b"]}
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(row)}\n{nested}\n")
    with pytest.raises(InputError, match=r"q.jsonl, row 2: not valid JSON"):
        load_questions(str(tmp_path / "q.jsonl"), ["en"])


PARQUET = {
    "id": ["q1", "q2"] * 20,
    "map": pa.array([[("a", 1)]] * 40, pa.map_(pa.string(), pa.int32())),
    "time": pa.array(range(40), pa.timestamp("us")),
}


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_parquet_only_raises_input_errors(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    """Includes footers with wrong row counts, offsets and types."""
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table(PARQUET), file)
    content = bytearray(file.read_bytes())
    for at, byte in edits:
        content[-1 - at % len(content)] = byte
    file.write_bytes(content)
    with suppress(InputError):
        assert len(list(read_records(str(file)))) <= 40


def test_parquet_claiming_a_trillion_rows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": range(40)}), file)
    content = file.read_bytes()
    start = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    # Changes the row count in the footer (Thrift compact protocol: next field, i64, zigzag) from 40 to 2**40.
    footer = content[start:-8].replace(b"\x16\x50", b"\x16\x80\x80\x80\x80\x80\x40")
    file.write_bytes(content[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    assert pq.read_metadata(file).num_rows == 2**40
    assert "cannot be read as Parquet" in read_error(file)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"\xff"]).view(pa.string()),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int32())),
    ],
    ids=["invalid UTF-8", "invalid date", "duplicate key"],
)
def test_invalid_parquet_values_are_refused(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"x": column}), tmp_path / "x.parquet")
    assert "cannot be read as Parquet" in read_error(tmp_path / "x.parquet")


def test_pickled_parquet_extension_types_are_not_loaded(tmp_path: Path) -> None:
    """pyarrow 13 and earlier unpickled the type `arrow.py_extension_type` (CVE-2023-47248)."""
    ran = tmp_path / "ran"
    pickled = b"cbuiltins\nopen\n(S'" + str(ran).encode() + b"'\nS'w'\ntR."
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled}
    schema = pa.schema([pa.field("x", pa.int32(), metadata=metadata)], metadata={"pandas": pickled})
    pq.write_table(pa.table({"x": pa.array([1], pa.int32())}).cast(schema), tmp_path / "x.parquet")
    assert [record.value for record in read_records(str(tmp_path / "x.parquet"))] == [{"x": 1}]
    assert not ran.exists()


@pytest.mark.parametrize(
    "source",
    ["hub:../x", "hub:./x", "hub:a/..", "hub:/etc", "hub:a/b/c", "hub:~/x", "hub:a b/c", "\0", "~nobody-at-all/x"],
)
def test_unsafe_sources_are_refused(source: str) -> None:
    with pytest.raises(InputError):
        matching(source)


def test_hub_names_are_parsed() -> None:
    assert hub_names("hub:INK-USC/xcsr:X-CSQA-en:test") == ("INK-USC/xcsr", "X-CSQA-en", "test")
    assert hub_names("hub:openai/MMMLU_2.0") == ("openai/MMMLU_2.0", None, None)


FIELDS = ["question_id", "language", "text", "gold", "label", "stem", "idx", ""]
FIELDS = sorted({*FIELDS, *(name for layout in FORMATS.values() for name in layout.fields), *"ABab"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab(A)1.\n\ud800", max_size=9) | st.just("en"),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.integers(), children, max_size=4)
    ),
    max_leaves=8,
)


@FUZZ
@given(values=st.dictionaries(st.sampled_from(FIELDS), VALUES), default=VALUES)
@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_fuzzed_records_become_questions_or_bad_rows(layout: Any, values: dict[str, Any], default: Any) -> None:
    fields = {**dict.fromkeys(layout.fields, default), **values}
    if layout.language_field is not None:
        fields[layout.language_field] = "en"
    part = Part("x.jsonl", layout.name, None if layout.language_field else "en")
    with suppress(BadRow):
        table(Question, [question_of(part, Record(1, fields), 0, [])])


def test_more_options_than_letters_are_refused() -> None:
    options = {f"{number:02d}": "x" for number in range(40)}
    record = Record(1, {"question": "q", "options": options, "answer_idx": "39"})
    with pytest.raises(BadRow, match="2 to 26 choices"):
        question_of(Part("x.jsonl", "medqa", "en"), record, 0, [])
    record = Record(1, {"instruction": "", "input": "(A) " * 1_000_000, "output": "A"})
    with pytest.raises(BadRow, match="no options found"):
        question_of(Part("x.jsonl", "calm", "en"), record, 0, [])


def test_lone_surrogates_are_refused_in_every_text_field() -> None:
    row = {"question_id": "q", "language": "en", "text": "t", "choices": ["a", "b"]}
    for name in ("question_id", "text", "subject"):
        with pytest.raises(BadRow, match="contains a lone surrogate"):
            question_of(Part("x.jsonl", "questions", None), Record(1, {**row, name: "\ud800"}), 0, [])
