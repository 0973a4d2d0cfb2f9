"""vLLM engines in Ray actors: pools, seeds, switching policies, failures."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from factories import read_questions
from peft import PeftModel
from ray.exceptions import RayActorError
from small_runs import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm_ray.core.errors import CalmRayError
from calm_ray.core.rows import Completion, Question, rows_of
from calm_ray.core.sections import Engines, Lora
from calm_ray.engines.actor import EngineActor
from calm_ray.engines.dispatcher import Dispatcher
from calm_ray.engines.generator import Decoding, Generator
from calm_ray.engines.health import Health, Heartbeats
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.replica import EngineHandle
from calm_ray.engines.requests import ChunkRequest, Sample, Served, Write
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.tasks import ChunkTask
from calm_ray.engines.text_service import TextService
from calm_ray.prompts.questions import prompt_text
from calm_ray.questions.reader import write_chunks
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage

LANGUAGES = ["en", "fr"]
LORA = Lora(r=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])
ARGS = {"max_model_len": 128, "max_num_seqs": 64}


def spec(model: Path, **engines: Any) -> EngineSpec:
    settings = Engines(**{"cpus": 0.5, "args": ARGS, **engines})
    return EngineSpec(RunModel(str(model)), settings, LORA, "cpu", seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, question_files: tuple[Path, Path]) -> RunDirectory:
    run = RunDirectory(str(tmp_path_factory.mktemp("storage")), "engines")
    write_chunks(read_questions(str(question_files[0]), LANGUAGES), run.questions("align"), prompts_per_chunk=8)
    return run


@pytest.fixture(scope="module")
def pool(ray_8_cpus: None, babbler: Path) -> Iterator[EnginePool]:
    with EnginePool(spec(babbler, per_language=1, dtype="float32"), LANGUAGES, print) as pool:
        yield pool


def sample(pool: EnginePool, run: RunDirectory, output: Stage, seed: int = 0) -> list[Any]:
    questions = run.questions("align")
    tasks = [
        ChunkTask(questions, output, chunk, code, pool.policy)
        for chunk in sorted(questions.chunks())
        for code in LANGUAGES
    ]
    decoding = Decoding(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=40)
    for _ in pool.run(Sample(decoding, seed, round_number=1, prompt="choices"), Dispatcher(tasks, max_bad=0)):
        pass
    return rows_of(output.read())


def test_pool_per_language_samples_every_question(pool: EnginePool, run: RunDirectory) -> None:
    assert [replica.home for replica in pool.replicas] == ["en", "fr"]
    rows = sample(pool, run, run.stage(1, "sample"))
    ids = [(row["question_id"], row["language"], row["sample"]) for row in rows]
    assert len(ids) == len(set(ids)) == 24 * 2 * 3
    assert {row["policy"] for row in rows} == {"base"}
    assert sum(row["answer"] is not None for row in rows) > 0.5 * len(rows)
    for row in rows:
        assert (row["token_ids"][-1] == 1) == (row["finish_reason"] == "stop")  # <eos> is token 1 of this tokenizer
        assert "<eos>" not in row["text"]


def test_completion_records_the_log_probability_of_its_tokens(
    pool: EnginePool, run: RunDirectory, babbler: Path
) -> None:
    """Of all tokens including end-of-sequence, from the distribution before top-p."""
    model = AutoModelForCausalLM.from_pretrained(babbler).eval()
    for row in sample(pool, run, Stage(run.storage.under("logps")))[:20]:
        tokens = torch.tensor([[*row["prompt_token_ids"], *row["token_ids"]]])
        with torch.no_grad():
            logps = model(tokens).logits.log_softmax(-1)[0, len(row["prompt_token_ids"]) - 1 : -1]
        expected = logps.gather(1, torch.tensor(row["token_ids"])[:, None]).sum()
        assert row["logp"] == pytest.approx(expected.item(), abs=1e-3)


def test_same_seed_samples_the_same_text(pool: EnginePool, run: RunDirectory) -> None:
    first = [row["token_ids"] for row in sample(pool, run, Stage(run.storage.under("again/a")), seed=7)]
    second = [row["token_ids"] for row in sample(pool, run, Stage(run.storage.under("again/b")), seed=7)]
    third = [row["token_ids"] for row in sample(pool, run, Stage(run.storage.under("again/c")), seed=8)]
    same = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    # Batches differ between runs, and so do the last digits of probabilities.
    assert same > 0.9
    assert sum(a == b for a, b in zip(first, third, strict=True)) / len(first) < 0.5


def test_running_engines_switch_policies(pool: EnginePool, run: RunDirectory, babbler: Path, tmp_path: Path) -> None:
    before = sample(pool, run, Stage(run.storage.under("swap/before")), seed=7)
    policies = [make_adapter(babbler, tmp_path / str(n), run, n, LORA) for n in (1, 2)]
    texts = []
    for policy in policies:
        pool.refresh(policy)
        rows = sample(pool, run, Stage(run.storage.under(f"swap/{policy.name}")), seed=7)
        assert {row["policy"] for row in rows} == {policy.name}
        texts.append([row["token_ids"] for row in rows])
    pool.refresh(Policy())
    after = sample(pool, run, Stage(run.storage.under("swap/after")), seed=7)
    assert {row["policy"] for row in after} == {"base"}
    assert texts[0] != texts[1] != [row["token_ids"] for row in before]
    same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(before, after, strict=True)) / len(before)
    assert same > 0.9
    assert pool.starts == len(pool.replicas) == 2


def call_in_process(engine: EngineHandle, function: Callable[[Any], Any]) -> Any:
    """Calls `function(actor)` in the actor's process; returns an object reference."""
    actor: Any = engine.actor
    return actor.__ray_call__.remote(function)


def are_asleep(pool: EnginePool) -> list[bool]:
    engines = [replica.engine for replica in pool.replicas]
    return ray.get([call_in_process(engine, lambda actor: actor.generator.is_asleep) for engine in engines])


def test_engines_sleep_and_serve_again(pool: EnginePool, run: RunDirectory) -> None:
    """Only the sequence of calls: on CPUs, sleeping frees no memory."""
    pool.wait_for_all()
    with pool.asleep():
        assert are_asleep(pool) == [True, True]
    assert are_asleep(pool) == [False, False]
    assert len(sample(pool, run, Stage(run.storage.under("awake")))) == 24 * 2 * 3


@pytest.mark.slow
def test_dead_engine_is_restarted_once(pool: EnginePool, run: RunDirectory) -> None:
    pool.wait_for_all()
    before = pool.starts
    os.kill(ray.get(call_in_process(pool.replicas[0].engine, lambda actor: os.getpid())), signal.SIGKILL)
    assert len(sample(pool, run, Stage(run.storage.under("killed")))) == 24 * 2 * 3
    pool.wait_for_all()
    assert pool.starts == before + 1


class LocalRequest(ChunkRequest[Question, Completion]):
    """A plug-in's request, whose module the engines cannot import."""

    def serve(
        self, generator: Generator, rows: Sequence[Question], skipped: Sequence[Question] = ()
    ) -> Served[Completion]:
        return Served(Completion, [])


def buggy_request() -> ChunkRequest[Question, Completion]:
    """A request whose code raises. Its class is local, so that Ray pickles it by value."""

    class Buggy(ChunkRequest[Question, Completion]):
        def serve(
            self, generator: Generator, rows: Sequence[Question], skipped: Sequence[Question] = ()
        ) -> Served[Completion]:
            return Served(Completion, [row["completion"] for row in rows])  # type: ignore[typeddict-item]

    return Buggy()


@pytest.mark.parametrize(
    ("make_request", "message"),
    [
        (buggy_request, "the request Buggy failed: KeyError: 'completion'"),
        (LocalRequest, "cannot import test_engines: a plug-in must be installed on every node"),
    ],
)
def test_bug_in_a_request_is_not_blamed_on_the_engine(
    pool: EnginePool, run: RunDirectory, make_request: Callable[[], ChunkRequest[Question, Completion]], message: str
) -> None:
    pool.wait_for_all()
    before, questions = pool.starts, run.questions("align")
    task = ChunkTask(questions, Stage(run.storage.under("buggy")), min(questions.chunks()), "en", pool.policy)
    with pytest.raises(CalmRayError, match=message):
        list(pool.run(make_request(), Dispatcher([task], max_bad=0)))
    assert pool.starts == before


def is_up(engine: Any) -> bool:
    try:
        ray.get(engine.ready.remote())
    except RayActorError:
        return False
    return True


@pytest.mark.slow
def test_starting_engine_waits_until_the_others_wake(pool: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text service waits for the starting engine."""
    monkeypatch.setattr("calm_ray.engines.pool.WAIT_SECONDS", 0.0)
    pool.wait_for_all()
    before, one = pool.starts, pool.replicas[0]
    ray.kill(one.engine.actor, no_restart=False)
    while one.health is not Health.STARTING:
        one.becomes(Health.STALE)  # makes the pool call the engine, and so find it dead
        pool._drive_until(lambda: one.health is not Health.STALE)
    while pool.starts == before:
        time.sleep(0.1)
    starts = pool.starts
    with pool.asleep():
        while pool.starts == starts:
            assert not is_up(one.engine.actor), "it loaded the model while the pool was asleep"
            time.sleep(0.1)
    monkeypatch.setattr("calm_ray.engines.pool.WAIT_SECONDS", 600.0)
    assert len(pool.text_service.engines) == len(pool.replicas) == 2
    assert len(pool.text_service(["w1 w2", "w3 w4 w5"], 4)) == 2


@pytest.mark.slow
def test_waiting_is_logged_even_if_another_engine_is_up(
    ray_8_cpus: None, babbler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Logged(Exception): ...

    def say(line: str) -> None:
        if line.startswith("waiting for engines: 1 to start, each needs 5 CPU on one node"):
            raise Logged

    monkeypatch.setattr("calm_ray.engines.pool.WAIT_SECONDS", 0.0)
    with pytest.raises(Logged):
        EnginePool(spec(babbler, shared=2, min_engines=2, cpus=5), LANGUAGES, say)


def start_fake_engines(count: int, heartbeats: Any, once: Path) -> list[Any]:
    """Actors that reply in upper case. The first call of all hangs, and the message "poison" kills any actor."""

    class FakeEngine:
        def __init__(self, number: int) -> None:
            self._number = number
            ray.get(heartbeats.started.remote(number, ray.get_runtime_context().get_node_id()))

        def write(self, request: Write, policy: Policy, ticket: int) -> list[str]:
            ray.get(heartbeats.beat.remote(self._number, 0, at_work=False, is_asleep=False))
            ray.get(heartbeats.begins.remote(ticket, self._number))
            if not once.exists():
                once.touch()
                time.sleep(3600)
            if "poison" in request.messages:
                os._exit(1)
            return [message.upper() for message in request.messages]

    return [ray.remote(num_cpus=0, max_restarts=-1)(FakeEngine).remote(number) for number in range(count)]


@pytest.mark.slow
def test_text_service_restarts_hung_engines_and_skips_deadly_messages(ray_8_cpus: None, tmp_path: Path) -> None:
    heartbeats = ray.remote(num_cpus=0)(Heartbeats).remote()
    engines = start_fake_engines(2, heartbeats, tmp_path / "once")
    handles = [EngineHandle(actor) for actor in engines]
    text_service = TextService(handles, Policy(), heartbeats, seconds=3600, heartbeat_timeout_s=20)
    assert text_service(["one", "two", "three", "poison", "four"], 8) == ["ONE", "TWO", "THREE", None, "FOUR"]
    for actor in [*engines, heartbeats]:
        ray.kill(actor)


def scoring_engine() -> type[EngineActor]:
    """An engine that also scores given tokens. The class is local, so that Ray pickles it by value."""

    class ScoringEngine(EngineActor):
        def logps(self, tokens: list[int]) -> list[float]:
            from vllm import SamplingParams
            from vllm.inputs import TokensPrompt

            generator = self._generator
            assert generator is not None
            params = SamplingParams(max_tokens=1, prompt_logprobs=0)
            (output,) = generator._llm.generate(
                [TokensPrompt(prompt_token_ids=tokens)], params, lora_request=generator._adapter, use_tqdm=False
            )
            return [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]

        def next_token(self, prompt: list[int]) -> tuple[int, float]:
            """The greedy next token and its log-probability. Unlike `logps`, reads vLLM's prefix cache."""
            assert self._generator is not None
            (samples,) = self._generator.generate([prompt], Decoding(1, 0.0, 1.0, max_new_tokens=1), seeds=[0])
            return samples[0].token_ids[0], samples[0].logp

    return ScoringEngine


def prompt_and_answer(model: Path, question: Question) -> list[int]:
    """Token ids of a question and the model's greedy answer to it."""
    prompt = AutoTokenizer.from_pretrained(model)(prompt_text(question, "choices"), return_tensors="pt")
    language_model: Any = AutoModelForCausalLM.from_pretrained(model)
    return language_model.generate(**prompt, max_new_tokens=40, do_sample=False)[0].tolist()


def peft_logps(model: Path, adapter: Path, tokens: list[int]) -> torch.Tensor:
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
    with torch.no_grad():
        logps = adapted(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


BLOCK = 32
"""Tokens: vLLM's prefix cache keeps whole blocks, which must be shorter than the prompt."""


@pytest.mark.parametrize("refresh", ["merged", pytest.param("adapter", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-3), pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow)]
)
def test_refreshed_engine_matches_peft(
    ray_8_cpus: None,
    babbler: Path,
    question_files: tuple[Path, Path],
    run: RunDirectory,
    tmp_path: Path,
    refresh: str,
    dtype: str,
    tolerance: float,
) -> None:
    engine = ray.remote(num_cpus=0.5)(scoring_engine()).remote(
        spec(babbler, shared=1, dtype=dtype, refresh=refresh, args={**ARGS, "block_size": BLOCK})
    )
    tokens = prompt_and_answer(babbler, read_questions(str(question_files[0]), LANGUAGES)[0])
    base = torch.tensor(ray.get(engine.logps.remote(tokens)))
    long_prompt = tokens * 3
    assert len(long_prompt) > 2 * BLOCK
    ray.get(engine.next_token.remote(long_prompt))
    for number in (3, 4):
        policy = make_adapter(babbler, tmp_path / str(number), run, number, LORA)
        ray.get(engine.load.remote(policy))
        engine_logps = torch.tensor(ray.get(engine.logps.remote(tokens)))
        expected = peft_logps(babbler, tmp_path / str(number), tokens)
        differences = (engine_logps - expected).abs()
        difference = differences.mean()
        print(f"{refresh} {dtype} round {number}: mean difference {difference:.2e}, max {differences.max():.2e}")
        assert difference <= tolerance
        assert (engine_logps - base).abs().mean() > 10 * tolerance
        token, logp = ray.get(engine.next_token.remote(long_prompt))
        (expected_logp,) = peft_logps(babbler, tmp_path / str(number), [*long_prompt, token])[-1:]
        assert abs(logp - expected_logp) <= 10 * tolerance, "the prefix cache is from the weights before"
    ray.kill(engine)
