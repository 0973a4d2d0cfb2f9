"""What recipes must not contain: credentials, and arguments that make a library run foreign code or use the network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_ray.core.errors import CalmRayError, InputError
from calm_ray.core.safe_yaml import is_plain_text

CODE = "can run arbitrary code"
WEIGHTS = "loads weights that calm_ray has not checked"
NETWORK = "opens ports or sends data"

ENGINE_ARGS: dict[str, str] = {
    **dict.fromkeys(
        (
            "additional_config", "auto_map", "code_revision", "ec_manager_config", "inductor_compile_config",
            "inductor_passes", "io_processor_plugin", "log_config_file", "logging_config", "model_class_overrides",
            "reasoning_parser_plugin", "scheduler_cls", "trust_remote_code", "worker_cls", "worker_extension_cls",
        ),
        CODE,
    ),
    **dict.fromkeys(
        (
            "default_mm_loras", "hf_config_path", "model_loader_extra_config", "model_weights", "spec_method",
            "spec_model", "speculative_config",
        ),
        WEIGHTS,
    ),
    **dict.fromkeys(
        (
            "data_parallel_address", "data_parallel_rpc_port", "ec_transfer_config", "kv_events_config",
            "kv_transfer_config", "master_addr", "master_port", "nnodes", "node_rank", "otlp_traces_endpoint",
            "weight_transfer_config",
        ),
        NETWORK,
    ),
    **dict.fromkeys(("allowed_local_media_path", "allowed_media_domains"), "reads files unrelated to the questions"),
}  # fmt: skip
"""Forbidden arguments of vllm.LLM (vllm/engine/arg_utils.py of 0.32), at any depth. `logits_processors` is allowed: it
names installed classes, which a recipe may need."""

TRL_ARGS: dict[str, str] = {
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), CODE),
    **dict.fromkeys(("resume_from_checkpoint", "load_best_model_at_end"), "reads pickled checkpoints"),
    **dict.fromkeys(("push_to_hub", "report_to", "project", "run_name"), "publishes the training"),
    **dict.fromkeys(("logging_dir", "output_dir"), "writes outside the run"),
}
"""Forbidden arguments of TRL's DPOConfig, in addition to all that start with `hub_` or `trackio_`."""
_TRL_PUBLISHES = ("hub_", "trackio_")

_SECRET_KEY = re.compile(
    r"^token$|(^|_)(access|auth|bearer|hf|hub|session)_token$|secret|passwo?r?d|api_?key|access_?key|private_key"
    r"|credential|^authorization$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(^|_)TOKEN(_|$)|SECRET|PASSWO?R?D|API_?KEY|ACCESS_?KEY|CREDENTIAL")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[opsu]_[A-Za-z0-9]{20,}|A[KS]IA[A-Z0-9]{16})"
)
# Does not match the port of http://host:80/. A key may contain slashes.
_USER = re.compile(r"(?<=://)[^\s/@:]{0,200}:(?!\d+(?:/|$))[^\s@]{0,500}(?=@)")
_QUERY = re.compile(
    r"(?<=[?&;])([\w-]{0,50}(?:key|token|secret|passwo?r?d|signature|credential)[\w-]{0,50}|sig)=[^&;\s'\"]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?<=bearer )\s*[\w.~+/=-]{8,}", re.IGNORECASE)
HIDDEN = "[hidden]"
_LONGEST_PLACE = 4_000
SECRET_ADVICE = (
    "it would be saved with the run; set it in the environment instead (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "HF_TOKEN)"
)


def holds_secret(text: str) -> bool:
    """Whether a text appears to contain a token, an access key, or a URL with a password."""
    return any(pattern.search(text) for pattern in (_TOKEN, _USER, _QUERY))


def redact(text: str) -> str:
    """Hides tokens, passwords in URLs, signatures, and values of environment variables with a secret's name."""
    for name, value in os.environ.items():
        is_path = name.endswith(("_PATH", "_FILE", "_DIR"))
        if len(value) >= 8 and not is_path and _SECRET_VARIABLE.search(name.upper()):
            text = text.replace(value, HIDDEN)
    text = _USER.sub(HIDDEN, text)
    text = _QUERY.sub(lambda found: f"{found[1]}={HIDDEN}", text)
    return _BEARER.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))


def refuse_secrets(value: Any, place: str = "") -> None:
    """Raises ValueError, without repeating the secret, if a recipe's value or one of its keys is a credential."""
    if isinstance(value, str) and holds_secret(value):
        raise ValueError(f"{place or 'the value'}: contains a password, token or access key: {SECRET_ADVICE}")
    if isinstance(value, Mapping):
        for key, below in value.items():
            if isinstance(key, str) and holds_secret(key):
                raise ValueError(f"{place or 'the recipe'}: one of its keys contains a credential: {SECRET_ADVICE}")
            inside = f"{place}.{key}" if place else str(key)
            if isinstance(key, str) and _SECRET_KEY.search(key) and below is not None:
                raise ValueError(f"{inside}: is a credential: {SECRET_ADVICE}")
            refuse_secrets(below, inside)
    elif isinstance(value, list | tuple):
        for number, below in enumerate(value):
            refuse_secrets(below, f"{place}.{number}")


def refuse_engine_args(value: Any, place: str = "engines.args") -> None:
    """Raises ValueError for an argument of vLLM in `ENGINE_ARGS`, at any depth."""
    if isinstance(value, list):
        for below in value:
            refuse_engine_args(below, place)
    elif isinstance(value, Mapping):
        for key, below in value.items():
            if (reason := ENGINE_ARGS.get(key)) is not None:
                raise ValueError(f"{place} may not set {key}, which {reason}")
            if key == "backend" and isinstance(below, str) and "." in below:
                raise ValueError(f"{place} may not set {key} to a class ({below}), which {CODE}")
            refuse_engine_args(below, f"{place}.{key}")


def refuse_trl_args(args: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument of TRL that is forbidden by `TRL_ARGS`."""
    for key in args:
        reason = TRL_ARGS.get(key, TRL_ARGS["push_to_hub"] if key.startswith(_TRL_PUBLISHES) else None)
        if reason is not None:
            raise ValueError(f"train.trl may not set {key}, which {reason}")


def path_problem(place: str) -> str | None:
    """Returns why a text is not a valid path or URI, or None if it is. Does not access the file system."""
    if not place.strip() or not is_plain_text(place) or "\n" in place:
        return "is empty or contains control characters"
    if len(place) > _LONGEST_PLACE:
        return f"is longer than {_LONGEST_PLACE} characters"
    try:
        Path(place).expanduser()
    except RuntimeError:
        return f"{place.partition('/')[0]} is not a user on this machine"
    return None


def new_folder(place: str, field: str) -> Path:
    """Like `local_path`, for a folder to be filled. Raises InputError also if there is a file or a non-empty folder."""
    folder = local_path(place, field)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already exists; name a new folder")
    return folder


def local_path(place: str, field: str) -> Path:
    """Returns the path that the user gave, with `~` expanded. Raises InputError if it is invalid or inaccessible."""
    problem, path = path_problem(place), Path()
    if problem is None:
        path = Path(place).expanduser()
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # name too long, symlink loop, permission denied
            problem = f"{place[:200]} cannot be used: {error.strerror}"
    if problem is not None:
        raise InputError(f"{field}: {problem}")
    return path


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Turns any error that a library raises for a malformed file into an InputError that starts with `what`."""
    try:
        yield
    except CalmRayError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(f"{what}: {redact(lines[0])[:500] or type(error).__name__}") from None
