"""Keeps foreign code and credentials in recipes, the environment and library errors out of a run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import calm_ray
from calm_ray.cli import main
from calm_ray.config import parse_config
from calm_ray.core.errors import InputError
from calm_ray.core.safe_yaml import LARGEST
from calm_ray.core.safety import ENGINE_ARGS, TRL_ARGS, as_input_error, holds_secret, redact
from calm_ray.recipes.files import DEMO_RECIPE
from calm_ray.recipes.load import load_config
from calm_ray.recipes.merge import MAX_FILES
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.provenance import provenance

TOKEN = "hf_" + "aB3" * 11
KEY = "AKIA" + "ABCD1234" * 2
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


def refusal(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The command's error output for a recipe that it refuses."""
    assert main(["align", "--dry-run", str(path), *overrides]) == 2
    output = capsys.readouterr()
    assert not output.out
    return output.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "line 2: *a0: aliases are not allowed"),
        ("a: &a [*a]\n", "line 1: *a: aliases are not allowed"),
        ("seed: " + "[" * 100_000, "line 1: lists and mappings are nested more than 20 levels deep"),
        ("a:\n" + "".join(f"{' ' * i}b:\n" for i in range(1, 50)), "nested more than 20 levels deep"),
        ("rounds: 1\n" * 2, "line 2: duplicate key rounds"),
        ("train: {epochs: 1, epochs: 2}", "duplicate key epochs"),
        ("1: 2", "a key must be a string, and 1 is not"),
        ("no: 2", "a key must be a string, and no is not; put it in quotes"),
        ("? [a]\n: 2", "a key must be a string"),
        ("seed: " + "9" * 5_000, "is not a valid int"),
        ("seed: " + "9" * 30, "the number does not fit in 64 bits"),
        ("train: {beta: .nan}", ".nan is not a finite number"),
        ("engines: {args: {x: -.inf}}", "-.inf is not a finite number"),
        ("seed: !!bool x", "x is not a valid bool"),
        ("engines: {args: {x: !!binary gA==}}", "tags such as !!binary are not allowed"),
        ("seed: !!python/object/apply:os.getcwd []", "tags such as !!python/object/apply:os.getcwd"),
        ('model: "a\\0b"', "contains control characters or lone surrogates"),
        ('model: "\\ud800"', "contains control characters or lone surrogates"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        (b"name: \0", "cannot be read as YAML"),
        (b"name: \xff", "cannot be read as YAML"),
        ("# " + "x" * LARGEST, "is longer than 1,000,000 characters"),
        ("extends: {a: b}", "extends: name a recipe or a list of recipes"),
        ('extends: ["' + "x" * 300 + '"]', "cannot be used: File name too long"),
        ("extends: .", "there is no such recipe"),
    ],
    ids=lambda value: None if len(value) > 60 else value,
)
def test_unsafe_or_invalid_yaml_is_refused(
    content: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(path, capsys)
    assert str(tmp_path) in error
    assert message in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=1", "an override looks like section.key=value"),
        ("..=1", "an override looks like section.key=value"),
        (".".join("a" * 2_000) + "=1", "an override looks like section.key=value"),
        ("a.b.c=[[[[", "'a.b.c': the value cannot be read as YAML: line 1"),
        ("seed=*a", "aliases are not allowed"),
        ("seed=1e999", "seed: Input should be a valid integer"),
        ("rounds=99999999999", "rounds: Input should be less than or equal to 10000"),
        ("engines.per_language=99999999999", "engines.per_language: Input should be less than or equal to 100000"),
        ("init_from=..", "init_from: '..' is neither the name of a run nor a folder"),
        ("storage=~nobody-at-all/runs", "storage: ~nobody-at-all is not a user on this machine"),
        ("model=" + "x/" * 3_000, "model: is longer than 4000 characters"),
    ],
    ids=lambda value: value[:30],
)
def test_invalid_overrides_are_refused(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(DEMO_RECIPE, capsys, override)


def test_endless_extends_chains_are_refused(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"r{number}.yaml").write_text(f"extends: {[f'r{number + 1}.yaml'] * 9}\n")
    (tmp_path / "r12.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=rf"r0.yaml: extends more than {MAX_FILES} recipes"):
        load_config(tmp_path / "r0.yaml")
    ring = tmp_path / "ring.yaml"
    ring.symlink_to(ring)
    with pytest.raises(InputError, match=r"ring.yaml cannot be used: Too many levels of symbolic links"):
        load_config(ring)


def test_errors_do_not_quote_files_that_are_not_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_secret_access_key = abc/def: x: y\n")
    (tmp_path / "bad.yaml").write_text("extends: credentials\n")
    assert "abc/def" not in refusal(tmp_path / "bad.yaml", capsys)


@pytest.mark.parametrize(
    ("override", "secret"),
    [
        ("storage=s3://user:pass/word@bucket/runs", "pass/word"),
        ("storage=s3://bucket/runs?access_key=abcdef&secret_key=ghijkl", "ghijkl"),
        ("init_from=https://u:pw@host/run", "pw@"),
        ("questions.align=https://x/q.jsonl?X-Amz-Signature=0123abcd", "0123abcd"),
        (f"questions.evaluate=hub:a/{TOKEN}", TOKEN),
        (f"model=https://{TOKEN}@huggingface.co/a/b", TOKEN),
        (f"engines.args.served_model_name={KEY}", KEY),
        (f"engines.args.hf_token={TOKEN}", TOKEN),
        ("engines.args.hf_token=short", "short"),
        ("engines.args.x={y: [{api_key: short}]}", "short"),
        ("train.trl.hub_token=short", "short"),
        ("password=short", "short"),
        (f"{TOKEN}=1", TOKEN),
        (f"rounds={TOKEN}", TOKEN),
        (f"train={TOKEN}", TOKEN),
        (f"engines.args=[[[{TOKEN}", TOKEN),
        (TOKEN + ".=1", TOKEN),
    ],
)
def test_credentials_are_refused_and_not_echoed(override: str, secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(DEMO_RECIPE, capsys, override)
    assert secret not in error
    assert "HF_TOKEN" in error or "[hidden]" in error or "cannot be read" in error


def test_credentials_in_calm_ray_storage_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_RAY_STORAGE", "s3://user:word@bucket/runs")
    with pytest.raises(InputError, match="storage: contains a password") as refused:
        load_config()
    assert "word@" not in str(refused.value)


def test_recipe_keys_are_not_mistaken_for_credentials() -> None:
    config = load_config(None, ["storage=abfs://box@account.dfs.core.windows.net/runs", "sampling.max_new_tokens=9"])
    assert config.storage.startswith("abfs://box@")
    assert parse_config(config.as_record()) == config


@pytest.mark.parametrize("name", ENGINE_ARGS)
def test_engine_args_that_run_code_or_listen_are_refused(name: str) -> None:
    for override in (f"engines.args.{name}=x", f"engines.args.hf_overrides={{a: [{{{name}: x}}]}}"):
        with pytest.raises(InputError, match=rf"engines.args(\.hf_overrides\.a)? may not set {name}"):
            load_config(None, [override])


@pytest.mark.parametrize(
    "name",
    ["pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size", "data_parallel_rank",
     "data_parallel_size_local", "data_parallel_backend", "device_ids"],
)  # fmt: skip
def test_engine_args_that_take_more_gpus_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"args may not set {name}: an engine has engines.tensor_parallel_size GPUs"):
        load_config(None, [f"engines.args.{name}=2"])


def test_compilation_backend_may_be_a_name_but_not_a_class() -> None:
    with pytest.raises(InputError, match=r"engines.args.compilation_config may not set backend to a class \(os.system"):
        load_config(None, ["engines.args.compilation_config={backend: os.system}"])
    allowed = ["engines.args.compilation_config={backend: eager}", "engines.args.logits_processors=[here:Crash]"]
    assert load_config(None, allowed).engines.args["logits_processors"] == ["here:Crash"]


@pytest.mark.parametrize("name", [*TRL_ARGS, "hub_model_id", "hub_always_push", "trackio_space_id"])
def test_trl_args_that_publish_or_unpickle_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"train.trl may not set {name}"):
        load_config(None, ["train.engine=trl", f"train.trl.{name}=x"])


def test_refused_trl_args_exist() -> None:
    """Refusing an argument that TRL no longer has would protect against nothing."""
    from dataclasses import fields

    from trl import DPOConfig

    known = {field.name for field in fields(DPOConfig)} | {"logging_dir"}
    assert set(TRL_ARGS) <= known


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"401 for {TOKEN}: no", "401 for [hidden]: no"),
        (f"key {KEY}.", "key [hidden]."),
        ("GET s3://me:pa/ss@host/b failed", "GET s3://[hidden]@host/b failed"),
        ("https://h/x?X-Amz-Signature=ab12&n=1", "https://h/x?X-Amz-Signature=[hidden]&n=1"),
        ("Authorization: Bearer abcdefgh1234", "Authorization: Bearer [hidden]"),
        ("no access to /x with correct-horse", "no access to /x with [hidden]"),
        ("http://host:8080/me@x, s3://bucket/run, abfs://box@account/x", None),
        ("hf_overrides, pad_token, q?s=1, TOKENIZERS_PARALLELISM=falsefalse", None),
    ],
)
def test_errors_are_redacted(text: str, hidden: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "correct-horse")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    assert redact(text) == (text if hidden is None else hidden)
    assert holds_secret(text) == (hidden is not None and not text.startswith(("Auth", "no access")))


def test_library_errors_become_one_redacted_line() -> None:
    with pytest.raises(InputError) as refused, as_input_error("model: /m"):
        raise OSError(f"no access with {TOKEN}\nand more details")
    assert str(refused.value) == "model: /m: no access with [hidden]"


def test_provenance_omits_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SOMETHING", "in-the-environment")
    recorded = json.dumps(provenance())
    assert TOKEN not in recorded
    assert "in-the-environment" not in recorded


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "/etc"])
def test_run_records_cannot_point_outside_the_cache(name: str) -> None:
    with pytest.raises(InputError, match="the run's files are corrupt"):
        Policy(name, 1, "adapter", "/runs/x", "00")
    with pytest.raises(InputError, match="the run's files are corrupt"):
        RunModel(name, "/runs/x", "00")
    with pytest.raises(InputError, match="the run's files are corrupt"):
        RunModel("world", "/runs/x", "../../..")


FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "push_to_hub", "unsafe_load", "full_load"}


def test_package_never_unpickles_evaluates_or_publishes() -> None:
    """Checks every import and call in the syntax trees of calm_ray."""
    for file in Path(calm_ray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {module.split(".")[0] for module in modules} & FORBIDDEN_MODULES, where
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            is_method = name.endswith((".eval", ".compile"))  # model.eval(), re.compile()
            assert is_method or name.rpartition(".")[2] not in FORBIDDEN_CALLS, f"{where}: {name}"
            assert name not in ("torch.load", "yaml.load", "yaml.load_all", "os.system", "np.load"), f"{where}: {name}"
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                assert keyword.arg not in ("trust_remote_code", "allow_pickle", "shell") or is_off, where
                assert keyword.arg not in ("use_safetensors", "safe_serialization", "weights_only") or not is_off, where


def test_huge_recipe_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="is longer than"):
        load_config(path)
