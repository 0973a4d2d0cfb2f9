"""Chunks, manifests, and the repair of damaged runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from calm_ray.core.errors import StorageError
from calm_ray.recipes.load import load_config
from calm_ray.run.bad_prompts import BadPrompts, FoundBadPrompt
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy
from calm_ray.run.repair import repair
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

GRAPH = load_config().graph


def numbers(*values: int) -> pa.Table:
    return pa.table({"n": list(values)})


def make_stage(folder: Path, chunks: int = 3, finished: bool = True) -> Stage:
    stage = Stage(Storage(str(folder)))
    for number in range(chunks):
        stage.write(f"{number:05d}-en", numbers(number), counts={"tokens": 10})
    if finished:
        stage.finish({"policy": "base"})
    return stage


def test_chunks_are_read_in_order(tmp_path: Path) -> None:
    """Training depends on the order of its examples."""
    assert make_stage(tmp_path / "pairs", chunks=30).read()["n"].to_pylist() == list(range(30))


def test_finished_stage_has_a_single_manifest(tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "sample", finished=False)
    assert stage.storage.files("manifest") == [f"{n:05d}-en.parquet.json" for n in range(3)]
    stage.finish({})
    assert stage.storage.names() == [
        "00000-en.parquet", "00001-en.parquet", "00002-en.parquet", "manifest.json", "stage.json",
    ]  # fmt: skip
    entry = stage.manifest()["00001-en.parquet"]
    assert entry["rows"] == 1
    assert (entry["bytes"], entry["sha256"]) == stage.storage.digest("00001-en.parquet")
    assert stage.counts() == {"rows": 3, "tokens": 30}
    assert pickle.loads(pickle.dumps(stage)).chunks() == {f"{n:05d}-en" for n in range(3)}


def test_chunk_without_a_manifest_entry_is_ignored(tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "sample", finished=False)
    stage.storage.delete("manifest/00001-en.parquet.json")  # killed between the chunk and its entry
    assert stage.chunks() == {"00000-en", "00002-en"}
    assert stage.read().column("n").to_pylist() == [0, 2]


def damage(folder: Path, how: str) -> None:
    file = folder / "00001-en.parquet"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "missing":
        file.unlink()
    elif how == "bit flip":
        content = bytearray(file.read_bytes())
        content[10] ^= 1
        file.write_bytes(content)
    elif how == "truncated manifest":
        manifest = folder / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:-20])


def make_run(folder: Path, *stages: tuple[int, str]) -> RunDirectory:
    run = RunDirectory(str(folder), "run")
    run.begin({}, {}, None)
    for number, name in stages:
        make_stage(folder / "run" / "rounds" / str(number) / name)
    return run


@pytest.mark.parametrize("how", ["truncated", "missing", "bit flip"])
def test_only_corrupt_chunks_are_regenerated(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, (1, "sample"))
    finish_training(run, 1)
    sample = run.stage(1, "sample")
    before = {name: sample.storage.read(name) for name in ("00000-en.parquet", "00002-en.parquet")}
    damage(tmp_path / "run/rounds/1/sample", how)
    repair(run, GRAPH)
    assert "rounds/1/sample: 1 missing or corrupt file(s) (00001-en.parquet)" in capsys.readouterr().out
    assert not sample.is_finished
    assert sample.chunks() == {"00000-en", "00002-en"}
    assert run.stage(1, "train").is_finished
    sample.write("00001-en", numbers(1), counts={"tokens": 10})
    sample.finish({"policy": "base"})
    assert sample.counts() == {"rows": 3, "tokens": 30}
    assert before == {name: sample.storage.read(name) for name in before}
    repair(run, GRAPH)
    assert sample.is_finished


@pytest.mark.parametrize("file", ["manifest.json", "stage.json"])
def test_corrupt_manifest_is_rebuilt_from_intact_chunks(tmp_path: Path, file: str) -> None:
    run = make_run(tmp_path, (1, "sample"), (2, "sample"))
    sample, folder = run.stage(1, "sample"), tmp_path / "run/rounds/1/sample"
    before = sample.manifest()
    (folder / file).write_bytes((folder / file).read_bytes()[:-20])
    repair(run, GRAPH)
    assert not sample.is_finished
    assert sample.manifest() == before
    assert run.stage(2, "sample").is_finished


def test_corrupt_chunk_is_dropped_when_rebuilding_a_manifest(tmp_path: Path) -> None:
    run = make_run(tmp_path, (1, "sample"))
    for how in ("truncated manifest", "truncated"):
        damage(tmp_path / "run/rounds/1/sample", how)
    repair(run, GRAPH)
    assert run.stage(1, "sample").chunks() == {"00000-en", "00002-en"}


ENTRY = '{"rows": 1, "bytes": 1, "sha256": "0"}'
MALFORMED_MANIFESTS = [
    "null", "[]", '{"00000-en.parquet": {}}', '{"00000-en.parquet": null}',
    '{"00000-en.parquet": {"bytes": "1", "sha256": "0"}}', f'{{"../../../../outside": {ENTRY}}}', "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("manifest.json", content) for content in MALFORMED_MANIFESTS),
        *(("stage.json", content) for content in ("null", "[]", '"x"')),
    ],
)
def test_malformed_manifest_or_record_counts_as_corrupt(tmp_path: Path, file: str, content: str) -> None:
    run = make_run(tmp_path, (1, "sample"))
    (tmp_path / "outside").write_text("not part of the run")
    sample = run.stage(1, "sample")
    before = sample.manifest()
    sample.storage.write(file, content.encode())
    repair(run, GRAPH)
    assert not sample.is_finished
    assert sample.manifest() == before
    assert (tmp_path / "outside").exists()


@pytest.mark.parametrize("content", ["null", "{}", '{"bytes": 1, "sha256": null}'])
def test_malformed_manifest_entry_is_rebuilt(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path)
    stage = make_stage(tmp_path / "run/rounds/1/sample", finished=False)
    before = stage.manifest()
    stage.storage.write("manifest/00001-en.parquet.json", content.encode())
    repair(run, GRAPH)
    assert stage.manifest() == before


def test_stage_without_its_manifest_is_not_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path, (1, "sample"))
    sample = run.stage(1, "sample")
    before = sample.manifest()
    sample.storage.delete("manifest.json")
    damage(tmp_path / "run/rounds/1/sample", "missing")
    repair(run, GRAPH)
    assert not sample.is_finished
    assert sample.manifest() == {name: entry for name, entry in before.items() if name != "00001-en.parquet"}


def test_stray_copy_of_a_chunk_is_ignored(tmp_path: Path) -> None:
    run = make_run(tmp_path, (1, "sample"))
    sample = run.stage(1, "sample")
    before = sample.manifest()
    sample.storage.write("00000-en-backup.parquet", sample.storage.read("00000-en.parquet"))
    repair(run, GRAPH)
    assert sample.is_finished
    assert sample.manifest() == before


def test_intact_chunk_without_an_entry_is_recovered(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    stage = make_stage(tmp_path / "run/rounds/1/sample", finished=False)
    before = stage.manifest()
    stage.storage.delete("manifest/00001-en.parquet.json")
    repair(run, GRAPH)
    assert stage.manifest() == before


def test_corrupt_votes_also_discard_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path, (1, "votes"), (1, "pairs"))
    damage(tmp_path / "run/rounds/1/votes", "truncated")
    repair(run, GRAPH)
    for name in ("votes", "pairs"):
        assert run.stage(1, name).chunks() == {"00000-en", "00002-en"}
        assert not run.stage(1, name).is_finished


def finish_training(run: RunDirectory, number: int) -> Policy:
    stage = run.stage(number, "train")
    stage.storage.write("policy/adapter_model.safetensors", b"weights of round %d" % number)
    stage.storage.write("metrics.json", b"[]")
    policy = Policy(f"r{number:04d}-abcdefgh", number, "adapter", stage.storage.uri("policy"), "abc")
    stage.storage.write_json("policy.json", policy.as_json())
    stage.finish({"policy": policy.as_json()}, ["policy/adapter_model.safetensors", "metrics.json", "policy.json"])
    return policy


def test_lost_policy_is_retrained_unless_a_later_round_uses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    first, _ = finish_training(run, 1), finish_training(run, 2)
    for number in (1, 2):
        file = tmp_path / f"run/rounds/{number}/train/policy/adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:5])
    repair(run, GRAPH)
    assert not run.stage(2, "train").is_finished
    assert not run.stage(2, "train").storage.exists("policy.json")  # otherwise it would count as trained
    assert run.stage(1, "train").record["policy"]["name"] == first.name
    assert f"policy {first.name} is lost; keeping round 2, which started from it" in capsys.readouterr().out


def test_lost_policy_is_retrained_with_the_same_reference_though_its_pairs_are_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path, (1, "votes"), (1, "pairs"))
    train = run.stage(1, "train")
    train.write("reference", numbers(1))
    finish_training(run, 1)
    damage(tmp_path / "run/rounds/1/votes", "truncated")
    train.storage.delete("policy/adapter_model.safetensors")
    repair(run, GRAPH)
    assert train.chunks() == {"reference"}
    assert not train.is_finished


def test_missing_metrics_do_not_invalidate_a_policy(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    finish_training(run, 1)
    (tmp_path / "run/rounds/1/train/metrics.json").unlink()
    repair(run, GRAPH)
    assert run.stage(1, "train").is_finished


def test_corrupt_file_of_unfinished_training_is_dropped(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    stage = make_stage(tmp_path / "run/rounds/1/train", finished=False)
    damage(tmp_path / "run/rounds/1/train", "truncated")
    repair(run, GRAPH)
    assert stage.chunks() == {"00000-en", "00002-en"}


def test_unfinished_training_on_lost_pairs_restarts(tmp_path: Path) -> None:
    run = make_run(tmp_path, (1, "pairs"), (2, "pairs"))
    make_stage(tmp_path / "run/rounds/1/train", finished=False)
    kept = finish_training(run, 2)
    for number in (1, 2):
        damage(tmp_path / f"run/rounds/{number}/pairs", "truncated")
    repair(run, GRAPH)
    assert not run.storage.exists("rounds/1/train")
    assert run.stage(2, "train").record["policy"]["name"] == kept.name


def write_chunk_by(stage: Stage, policy: str) -> None:
    stage.write("00000-en", pa.table({"policy": [policy]}))


def test_different_policy_invalidates_later_stages(tmp_path: Path) -> None:
    run = make_run(tmp_path, (0, "evaluate"), (1, "pairs"))
    for number, name in ((1, "evaluate"), (2, "sample")):
        write_chunk_by(run.stage(number, name), "r0001-first")  # neither stage is finished
    assert run.discard_stale(GRAPH, 1, "r0001-first") == []  # the same policy
    assert run.discard_stale(GRAPH, 1, "r0001-other") == ["rounds/1/evaluate", "rounds/2/sample"]
    assert run.folders() == [(0, "evaluate"), (1, "pairs")]


def test_failed_write_leaves_no_files_behind(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (tmp_path / "sample").write_text("a file where a folder should be")
    with pytest.raises(
        StorageError, match=r"sample/00000\.parquet could not be written: .*rerun the same command to resume"
    ):
        Stage(storage.under("sample")).write("00000", numbers(1))
    assert [file.name for file in tmp_path.iterdir()] == ["sample"]


def test_bad_prompts_are_known_by_question_set(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), "run")
    bad, questions = BadPrompts(run.storage), run.questions("align")
    assert bad.known(questions) == set()
    record = bad.noting(questions, run.stage(1, "sample"))
    record([FoundBadPrompt("q7", "fr", "00000", "it crashed")])
    record = bad.noting(questions, run.stage(2, "sample"))
    record([FoundBadPrompt("q8", "en", "00001", "it hung"), FoundBadPrompt("q9", "en", "00001", "so did that")])
    assert len(bad.known(questions)) == 3
    record([FoundBadPrompt("q8", "en", "00001", "it hung")])  # q9 turned out to be fine
    assert bad.known(questions) == {("q7", "fr"), ("q8", "en")}
    assert bad.known(run.questions("held_out")) == set()
    assert json.loads(json.dumps(run.storage.read_table("bad_prompts.parquet").to_pylist()[0])) == {
        "question_id": "q7", "language": "fr", "questions": "questions/align", "stage": "rounds/1/sample",
        "chunk": "00000", "error": "it crashed",
    }  # fmt: skip
