"""Whole runs through `jobs/calm.py`, as a user would start them."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm_ray.cli import main
from calm_ray.core.rows import rows_of
from calm_ray.run.directory import RunDirectory

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def start_job(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "calm.py"), str(recipe), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_job(recipe: Path, *overrides: str) -> str:
    job = start_job(recipe, *overrides)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    return output


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run.storage.path("metrics.jsonl")).read_text().splitlines()]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Path], storage: Path) -> Path:
    return make_recipe(name="whole", storage=str(storage))


def files_in(run: RunDirectory, stage: str) -> dict[Path, tuple[int, bytes]]:
    """Modification time and content of the stage's files."""
    files = (file for file in Path(run.storage.path(stage)).iterdir() if file.is_file())
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.fixture(scope="module")
def killed(recipe: Path, storage: Path) -> dict[Path, tuple[int, bytes]]:
    """Kills a run with SIGKILL while it samples; returns the chunks that it has written."""
    run = RunDirectory(str(storage), "whole")
    job = start_job(recipe)
    while job.poll() is None and not run.stage(1, "sample").chunks():
        time.sleep(0.02)
    job.kill()
    output, _ = job.communicate()
    assert job.returncode == -signal.SIGKILL, output
    chunks = set(run.stage(1, "sample").chunks())
    return {file: state for file, state in files_in(run, "rounds/1/sample").items() if file.stem in chunks}


@pytest.fixture(scope="module")
def finished(killed: dict[Path, tuple[int, bytes]], recipe: Path, storage: Path) -> tuple[RunDirectory, str]:
    """The same run, resumed: one round with one shared engine that loads merged weights; and its output."""
    output = run_job(recipe)
    return RunDirectory(str(storage), "whole"), output


def test_killed_run_resumes_without_sampling_again(
    killed: dict[Path, tuple[int, bytes]], finished: tuple[RunDirectory, str]
) -> None:
    after = files_in(finished[0], "rounds/1/sample")
    assert killed
    assert {file: after[file] for file in killed} == killed
    assert len(rows_of(finished[0].stage(1, "sample").read())) == 24 * 2 * 3


def test_run_writes_a_complete_summary(finished: tuple[RunDirectory, str]) -> None:
    run, output = finished
    lines = output.strip().splitlines()
    assert lines[0] == lines[-1] == f"run: {run.uri}"
    assert "Consis-" in output
    summary = run.summary
    assert [entry["policy"] for entry in summary["rounds"]] == ["base", run.stage(1, "train").record["policy"]["name"]]
    for entry in summary["rounds"]:
        assert set(entry["accuracy"]) == {"en", "fr"}
        assert entry["accuracy_mean"] == pytest.approx(sum(entry["accuracy"].values()) / 2)
        assert set(entry["consistency"]) == set(entry["ac3"]) == {"2"}
    assert summary["rounds"][0]["vote_accuracy"] is not None
    assert summary["rounds"][1]["pairs"] > 0
    assert set(summary["rounds"][1]["seconds"]) == {"sample", "pairs", "train", "evaluate"}
    assert run.storage.read_json("config.json")["versions"]["ray"]
    assert run.storage.read_json("finished.json") == {"engine_starts": 1, "engines": 1}


def test_rows_name_the_policy_that_wrote_them(finished: tuple[RunDirectory, str]) -> None:
    run, _ = finished
    policy = run.summary["rounds"][1]["policy"]
    assert {row["policy"] for row in rows_of(run.stage(1, "sample").read())} == {"base"}
    assert {row["policy"] for row in rows_of(run.stage(0, "evaluate").read())} == {"base"}
    assert {row["policy"] for row in rows_of(run.stage(1, "evaluate").read())} == {policy}


def test_first_loss_is_ln_2(finished: tuple[RunDirectory, str]) -> None:
    first = next(row for row in metrics(finished[0]) if "train/loss" in row)
    assert first["step"] == 1
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_finished_run_is_not_repeated(
    finished: tuple[RunDirectory, str], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished
    before = run.storage.read("summary.json")
    assert main(["align", str(recipe)]) == 0
    output = capsys.readouterr().out
    assert "already finished" in output
    assert "engine" not in output
    assert run.storage.read("summary.json") == before
    assert main(["align", str(recipe), "train.beta=0.2"]) == 2
    message = capsys.readouterr().err
    assert "train.beta: 0.1 in the run, 0.2 in the recipe" in message
    assert "--overwrite" in message


def test_show_follows_a_question_to_its_pair(
    finished: tuple[RunDirectory, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished
    assert main(["show", run.uri]) == 0
    output = capsys.readouterr().out
    row = rows_of(run.stage(1, "pairs").read())[0]
    for text in ("completions, round 1", "vote: ", "winner", "chosen", "rejected"):
        assert text in output
    assert main(["show", run.uri, "--question", row["question_id"]]) == 0
    assert row["question_id"] in capsys.readouterr().out
    assert main(["show", run.uri, "--question", "nobody-asked"]) == 2


def test_exported_model_matches_the_model_with_adapter(
    finished: tuple[RunDirectory, str], babbler: Path, tmp_path: Path
) -> None:
    run, _ = finished
    assert main(["export", run.uri, str(tmp_path / "merged")]) == 0
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("Answer: A", return_tensors="pt")["input_ids"]
    adapter = run.storage.path("rounds/1/train/policy")
    assert {Path(file).suffix for file in Path(adapter).iterdir()} == {".safetensors", ".json"}
    assert any(
        tensor.abs().max() > 0
        for name, tensor in load_file(f"{adapter}/adapter_model.safetensors").items()
        if "lora_B" in name
    )
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
        base = AutoModelForCausalLM.from_pretrained(babbler)
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, adapter)(tokens).logits
    torch.testing.assert_close(exported, adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, adapted, atol=1e-4)
    assert main(["export", run.uri, str(tmp_path / "merged")]) == 2


def test_evaluate_reproduces_the_runs_accuracy(
    finished: tuple[RunDirectory, str],
    question_files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    ray_8_cpus: None,
) -> None:
    run, _ = finished
    assert main(["evaluate", run.uri, "--questions", str(question_files[1])]) == 0
    policy = run.summary["rounds"][1]["policy"]
    assert policy in capsys.readouterr().out
    (folder,) = Path(run.storage.path("evaluations")).iterdir()
    record = json.loads((folder / policy / "stage.json").read_text())
    expected = run.summary["rounds"][1]
    # Same questions and weights, but different batches may decide a near tie differently.
    assert record["report"]["accuracy_mean"] == pytest.approx(expected["accuracy_mean"], abs=0.05)


@pytest.mark.slow
def test_interrupted_run_resumes_where_it_stopped(make_recipe: Callable[..., Path], storage: Path) -> None:
    recipe = make_recipe(
        name="stopped",
        storage=str(storage),
        placement="colocate",
        engines={"per_language": 1, "shared": None, "refresh": "adapter"},
    )
    run = RunDirectory(str(storage), "stopped")
    job = start_job(recipe)
    while job.poll() is None and not run.stage(1, "pairs").is_finished:
        time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate()
    assert job.returncode == 130, output
    assert "rerun the same command to resume" in output
    assert not run.storage.exists("finished.json")
    stages = ("rounds/1/sample", "rounds/1/pairs")
    before = [files_in(run, stage) for stage in stages]
    run_job(recipe)
    assert [files_in(run, stage) for stage in stages] == before
    assert [entry["round"] for entry in run.summary["rounds"]] == [0, 1]
    assert run.storage.read_json("finished.json") == {"engine_starts": 2, "engines": 2}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def ray_head() -> Iterator[tuple[str, dict[str, str]]]:
    """Runs `ray start --head`; yields the address for jobs and the environment. Stops only its own processes."""
    environment = {
        **os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64,
    }  # fmt: skip
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={port}", f"--temp-dir={folder}",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
        ]  # fmt: skip
        with open(Path(folder) / "head.log", "w") as log:
            head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield f"http://127.0.0.1:{dashboard}", environment
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)


def submit(address: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
    command += ["python", "jobs/calm.py", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_submitted_jobs_succeed_or_fail_with_the_command(make_recipe: Callable[..., Path], storage: Path) -> None:
    with ray_head() as (address, environment):
        deadline = time.monotonic() + 120
        while (bad := submit(address, environment, "rounds=0")).returncode and "rounds: " not in bad.stdout:
            assert time.monotonic() < deadline, bad.stdout + bad.stderr
            time.sleep(2)
        assert bad.returncode != 0
        assert "FAILED" in bad.stdout.upper() + bad.stderr.upper()
        recipe = make_recipe(name="submitted", storage=str(storage), train={"engine": "trl"})
        good = submit(address, environment, str(recipe))
        assert good.returncode == 0, good.stdout + good.stderr
        assert "joined a cluster" in good.stdout
    run = RunDirectory(str(storage), "submitted")
    assert run.storage.exists("finished.json")
    assert f"run: {run.uri}" in good.stdout
    assert any(name.startswith("trl/") for row in metrics(run) for name in row)
