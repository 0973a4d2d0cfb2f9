"""The exit code of a command, and what it says."""

from __future__ import annotations

import time

import pytest

from calm_ray.core.errors import InputError, ResourceError, StorageError
from calm_ray.core.exit_codes import exit_code_of


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StorageError("s3://me:secret@host is gone"), 1, "error: s3://[hidden]@host is gone\n"),
        (InputError("rounds: is 0"), 2, "error: rounds: is 0\n"),
        (ResourceError("no GPU"), 3, "error: no GPU\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here\n"),
    ],
)
def test_errors_of_ours_are_one_message(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(lambda: fail(error), goes_on=True) == code
    assert capsys.readouterr().err == said


def test_who_overwrites_is_told_to_leave_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: fail(KeyboardInterrupt()), goes_on=True, overwrites=True) == 130
    assert "the same command without --overwrite goes on" in capsys.readouterr().err
    exit_code_of(lambda: fail(StorageError("the disk is full")), goes_on=True, overwrites=True)
    assert "leave out --overwrite" in capsys.readouterr().err
    exit_code_of(lambda: fail(InputError("rounds: is 0")), goes_on=True, overwrites=True)
    assert "--overwrite" not in capsys.readouterr().err


def fail(error: BaseException) -> None:
    raise error


def test_any_other_error_is_told_with_where_it_came_from_and_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    assert exit_code_of(lambda: fail(RuntimeError("GET https://me:secret@host with a-token-of-mine"))) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert "in fail" in said
    assert said.endswith("RuntimeError: GET https://[hidden]@host with [hidden]\n")


def test_a_ctrl_c_that_python_swallows_is_not_lost() -> None:
    """An exception that leaves a destructor goes no further; the command would run on."""

    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def command() -> None:
        victim = Interrupted()
        del victim
        time.sleep(60)
        raise AssertionError("the command ran on")

    assert exit_code_of(command) == 130
