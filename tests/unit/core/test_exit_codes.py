"""Exit codes and error output of a command."""

from __future__ import annotations

import time

import pytest

from calm_ray.core.errors import InputError, ResourceError, StorageError
from calm_ray.core.exit_codes import run_command


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (StorageError("s3://me:secret@host is down"), 1, "error: s3://[hidden]@host is down\n"),
        (InputError("rounds: is 0"), 2, "error: rounds: is 0\n"),
        (ResourceError("no GPU"), 3, "error: no GPU\n"),
        (KeyboardInterrupt(), 130, "interrupted; rerun the same command to resume\n"),
    ],
)
def test_expected_errors_print_one_line(
    error: BaseException, code: int, stderr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: fail(error), resumable=True) == code
    assert capsys.readouterr().err == stderr


def test_resume_hint_says_to_omit_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: fail(KeyboardInterrupt()), resumable=True, overwrites=True) == 130
    assert "rerun the same command without --overwrite to resume" in capsys.readouterr().err
    run_command(lambda: fail(StorageError("the disk is full")), resumable=True, overwrites=True)
    assert "omit --overwrite" in capsys.readouterr().err
    run_command(lambda: fail(InputError("rounds: is 0")), resumable=True, overwrites=True)
    assert "--overwrite" not in capsys.readouterr().err


def fail(error: BaseException) -> None:
    raise error


def test_unexpected_errors_print_a_redacted_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "my-secret-token")
    assert run_command(lambda: fail(RuntimeError("GET https://me:secret@host with my-secret-token"))) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("Traceback")
    assert "in fail" in stderr
    assert stderr.endswith("RuntimeError: GET https://[hidden]@host with [hidden]\n")


def test_ctrl_c_raised_in_a_destructor_still_interrupts() -> None:
    """Python swallows exceptions from destructors, so the command would keep running."""

    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def command() -> None:
        victim = Interrupted()
        del victim
        time.sleep(60)
        raise AssertionError("the command kept running")

    assert run_command(command) == 130
