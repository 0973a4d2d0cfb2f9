"""Folders of models and files of questions that are not what they should be: refused by name, never read as code."""

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
from factories import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calm_ray.commands.export import copy_model
from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.rows import Question, table
from calm_ray.job.preflight import check_model
from calm_ray.questions import records
from calm_ray.questions.formats import FORMATS
from calm_ray.questions.hub import hub_names
from calm_ray.questions.reader import question_of, take_in
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


def adapter(folder: Path, weights: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / weights).write_bytes(TENSORS)
    return folder


def put(**values: Any) -> Callable[[Path], None]:
    """Sets keys of config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Writes a file as it stands."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def index(weights: Any) -> Callable[[Path], None]:
    return write("model.safetensors.index.json", json.dumps({"weight_map": weights}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (index({"w": "../../etc/passwd"}), "'../../etc/passwd', which is no safetensors file of its folder"),
        (index({"w": "/etc/passwd"}), "which is no safetensors file"),
        (index({"w": "model-00002.safetensors"}), "which is no safetensors file"),
        (index(["w"]), "has no weight_map"),
        (index({"w": 1}), "has no weight_map"),
        (write("more.safetensors", b""), r"more.safetensors: not readable as safetensors"),
        (write("more.safetensors", struct.pack("<Q", 2**63) + HEADER), "not readable as safetensors"),
        (write("more.safetensors", struct.pack("<Q", 99_000_000) + HEADER), "not readable as safetensors"),
        (write("more.safetensors", struct.pack("<Q", 9) + b'{"w": 1}}'), "not readable as safetensors"),
        (write("more.safetensors", TENSORS[:-1]), "not readable as safetensors"),
        (write("config.json", "no JSON"), "config.json: not readable as JSON"),
        (write("config.json", b"\xff"), "config.json: not readable as JSON"),
        (write("config.json", NESTED), "config.json: not readable as JSON: nested too deeply"),
        (write("config.json", '{"a": ' * 5_000), "config.json: not readable as JSON"),
        (write("config.json", f'{{"vocab_size": {"9" * 5_000}}}'), "config.json: not readable as JSON"),
        (write("config.json", "[]"), "config.json: must hold a JSON object"),
        (write("tokenizer_config.json", "{"), "tokenizer_config.json: not readable as JSON"),
        (put(num_hidden_layers=10**9), "num_hidden_layers is 1e"),
        (put(model_type="nobody_knows_this"), "config.json is of no kind that transformers knows itself"),
        (put(model_type=None), "config.json is of no kind that transformers knows itself"),
        (put(hidden_size="wide"), "config.json is of no kind that transformers knows itself"),
        (write("tokenizer.json", "{"), "the tokenizer in .* cannot be read"),
        (write("tokenizer.json", "[]"), "the tokenizer in .* cannot be read"),
        (write("tokenizer.json", NESTED), "the tokenizer in .* cannot be read"),
        (write("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": [1]}}'), "cannot be read"),
    ],
)
def test_a_model_that_is_damaged_or_hostile(model: Path, change: Callable[[Path], None], message: str) -> None:
    check_model(model)
    change(model)
    with pytest.raises(InputError, match=message) as refused:
        check_model(model)
    assert str(model) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_code_that_a_model_brings_is_not_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Theirs: pass\n")
    foreign = {"auto_map": {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"}}
    put(**foreign)(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    check_model(model)  # of a kind that transformers knows: its own code is taken
    put(model_type="theirs")(model)
    with pytest.raises(InputError, match="is of no kind that transformers knows itself"):
        check_model(model)
    assert not ran.exists()
    assert not [name for name in sys.modules if name.endswith("theirs")]


def test_links_may_lead_into_the_hubs_cache_and_nowhere_else(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "abc").write_bytes(TENSORS)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    require_safetensors(snapshot)
    copy_model(snapshot, tmp_path / "copy")
    assert not (tmp_path / "copy" / "model.safetensors").is_symlink()
    (tmp_path / "passwd.json").write_text("{}")
    for there in ("../../../passwd.json", str(tmp_path / "passwd.json"), "../../blobs/../../passwd.json"):
        (snapshot / "config.json").symlink_to(there)
        with pytest.raises(InputError, match=r"config.json: is a link that leads out of its folder"):
            check_files(snapshot)
        (snapshot / "config.json").unlink()
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    require_safetensors(linked)


def test_an_adapter_is_read_from_safetensors_alone(tmp_path: Path) -> None:
    require_safetensors(adapter(tmp_path / "good", "adapter_model.safetensors"))
    for name in ("adapter_model.bin", "adapter_model.pt"):
        folder = adapter(tmp_path / name, name)
        with pytest.raises(InputError, match=rf"no \*.safetensors weights \({name}\); convert them first: load"):
            require_safetensors(folder)
        (folder / "other.safetensors").write_bytes(TENSORS)  # which vLLM does not look at
        with pytest.raises(InputError, match=f"its adapter is {name}, not adapter_model.safetensors; convert"):
            require_safetensors(folder)
        (folder / "adapter_model.safetensors").write_bytes(TENSORS)
        with pytest.raises(InputError, match=f"its adapter is {name}"):
            require_safetensors(folder)
    with pytest.raises(InputError, match="its adapter is not there"):
        require_safetensors(adapter(tmp_path / "none", "other.safetensors"))


def test_pickles_and_code_beside_a_model_are_not_copied(model: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "theirs.py", "run.sh", "optimizer.pt"):
        (model / name).write_text("")
    copy_model(model, tmp_path / "copy")
    copied = {file.name for file in (tmp_path / "copy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= copied
    assert {Path(name).suffix for name in copied} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize("name", ["a/../b", "x" * 5_000, "a\0b", "~nobody-at-all/x", "https://a/b"])
def test_a_model_with_an_odd_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="model: "):
        RunModel(name).local_folder()


def refused(file: Path) -> str:
    with pytest.raises(InputError) as error:
        list(read_records(str(file)))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


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
def test_a_row_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, start: str, body: str, row: int
) -> None:
    monkeypatch.setattr(records, "_LONGEST_ROW", 1 << 20)
    monkeypatch.setattr(records, "_CHUNK", 1 << 18)
    file = tmp_path / f"x{suffix}"
    file.write_text(start + body * (1_400_000 // len(body)))
    assert f"row {row}: is longer than 1 MB" in refused(file)


def test_a_line_of_a_gigabyte_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    with open(file, "wb") as sparse:
        sparse.truncate(1 << 30)
    tracemalloc.start()
    try:
        assert "row 1: is longer than 16 MB" in refused(file)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("nested", [NESTED, '{"a":' * 100_000, "9" * 5_000])
def test_json_that_python_cannot_hold(tmp_path: Path, nested: str) -> None:
    (tmp_path / "x.json").write_text(f'[{{"a": 1}}, {nested}')
    assert "row 2: not readable as JSON" in refused(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text(f'{{"a": 1}}\n{nested}\n{{"a": 3}}\n')
    read = list(read_records(str(tmp_path / "x.jsonl")))
    assert [record.bad and record.bad.reason for record in read] == [None, "not readable as JSON", None]
    row = {"question_id": "q", "language": "en", "text": "t", "choices": ["a", "b"]}
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(row)}\n{nested}\n")
    with pytest.raises(InputError, match=r"q.jsonl, row 2: not readable as JSON"):
        take_in(str(tmp_path / "q.jsonl"), ["en"])


PARQUET = {
    "id": ["q1", "q2"] * 20,
    "map": pa.array([[("a", 1)]] * 40, pa.map_(pa.string(), pa.int32())),
    "time": pa.array(range(40), pa.timestamp("us")),
}


@FUZZ
@given(places=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_parquet_with_damaged_bytes(places: list[tuple[int, int]], tmp_path: Path) -> None:
    """Footers that lie about rows, offsets and types are among them."""
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table(PARQUET), file)
    content = bytearray(file.read_bytes())
    for at, byte in places:
        content[-1 - at % len(content)] = byte
    file.write_bytes(content)
    with suppress(InputError):
        assert len(list(read_records(str(file)))) <= 40


def test_parquet_that_says_it_holds_a_trillion_rows(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": range(40)}), file)
    content = file.read_bytes()
    start = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    # In the footer, Thrift's compact protocol: the next field, an i64, 40 by zigzag; and 2**40.
    footer = content[start:-8].replace(b"\x16\x50", b"\x16\x80\x80\x80\x80\x80\x40")
    file.write_bytes(content[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    assert pq.read_metadata(file).num_rows == 2**40
    assert "not readable as Parquet" in refused(file)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"\xff"]).view(pa.string()),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int32())),
    ],
    ids=["no UTF-8", "no date", "a key twice"],
)
def test_parquet_with_values_that_are_none(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"x": column}), tmp_path / "x.parquet")
    assert "not readable as Parquet" in refused(tmp_path / "x.parquet")


def test_types_that_were_pickled_into_parquet_are_not_unpickled(tmp_path: Path) -> None:
    """pyarrow 13 and before loaded the type `arrow.py_extension_type` with pickle (CVE-2023-47248)."""
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
def test_sources_that_lead_elsewhere(source: str) -> None:
    with pytest.raises(InputError):
        matching(source)


def test_names_of_the_hub_are_taken() -> None:
    assert hub_names("hub:INK-USC/xcsr:X-CSQA-en:test") == ("INK-USC/xcsr", "X-CSQA-en", "test")
    assert hub_names("hub:openai/MMMLU_2.0") == ("openai/MMMLU_2.0", None, None)


FIELDS = ["question_id", "language", "text", "gold", "label", "stem", "idx", ""]
FIELDS = sorted({*FIELDS, *(name for layout in FORMATS.values() for name in layout.fields), *"ABab"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab(A)1.\n\ud800", max_size=9) | st.just("en"),
    lambda below: (
        st.lists(below, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.integers(), below, max_size=4)
    ),
    max_leaves=8,
)


@FUZZ
@given(values=st.dictionaries(st.sampled_from(FIELDS), VALUES), rest=VALUES)
@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_records_of_odd_types_are_questions_or_bad_rows(layout: Any, values: dict[str, Any], rest: Any) -> None:
    fields = {**dict.fromkeys(layout.fields, rest), **values}
    if layout.language_field is not None:
        fields[layout.language_field] = "en"
    part = Part("x.jsonl", layout.name, None if layout.language_field else "en")
    with suppress(BadRow):
        table(Question, [question_of(part, Record(1, fields), 0, [])])


def test_more_options_than_there_are_letters() -> None:
    options = {f"{number:02d}": "x" for number in range(40)}
    record = Record(1, {"question": "q", "options": options, "answer_idx": "39"})
    with pytest.raises(BadRow, match="2 to 26 choices"):
        question_of(Part("x.jsonl", "medqa", "en"), record, 0, [])
    record = Record(1, {"instruction": "", "input": "(A) " * 1_000_000, "output": "A"})
    with pytest.raises(BadRow, match="no options were found"):
        question_of(Part("x.jsonl", "calm", "en"), record, 0, [])


def test_half_characters_are_found_in_every_text() -> None:
    row = {"question_id": "q", "language": "en", "text": "t", "choices": ["a", "b"]}
    for name in ("question_id", "text", "subject"):
        with pytest.raises(BadRow, match="holds half a character"):
            question_of(Part("x.jsonl", "questions", None), Record(1, {**row, name: "\ud800"}), 0, [])
