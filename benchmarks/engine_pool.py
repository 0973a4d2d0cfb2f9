"""Overhead of the engine pool, chunks and manifests: sampling with calm_ray compared with a bare `LLM.generate` loop.

    python benchmarks/engine_pool.py [--prompts 768] [--turns 3]

Both use one engine with the same settings, prompts, chunks, seeds and decoding: a Llama of the demo's size with random
weights. The bare loop keeps its input in memory; calm_ray reads questions, extracts answers, and writes Parquet and a
manifest. The two alternate; the result is the median ratio, without start-up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import ray

from calm_ray.cluster.connection import cluster
from calm_ray.cluster.resources import Group, Needs
from calm_ray.core.rows import Question
from calm_ray.core.sections import Engines
from calm_ray.core.seeds import derive_seed
from calm_ray.engines.dispatcher import Dispatcher
from calm_ray.engines.generator import Decoding
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.requests import Sample
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.tasks import ChunkTask
from calm_ray.engines.vllm import engine_args, set_environment
from calm_ray.prompts.questions import prompt_text
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.questions.reader import write_chunks
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import RunModel
from calm_ray.run.stage import Stage
from calm_ray.testing import word_tokenizer, write_tiny_model

WORDS = [f"w{number}" for number in range(2000)]
DECODING = Decoding(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=48)
CHUNK = 84


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=768)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, cluster(Needs([Group("data task", 1, {"CPU": 2.0})])):
        model = write_tiny_model(Path(folder) / "model", word_tokenizer([*WORDS, *"ABCD.", "\n"]), width=192, layers=4)
        run = RunDirectory(folder, "run")
        write_chunks([question(number) for number in range(options.prompts)], run.questions("align"), CHUNK)
        settings = Engines(shared=1, cpus=0.5, args={"max_model_len": 128, "max_num_seqs": 128})
        spec = EngineSpec(RunModel(str(model)), settings, None, "cpu", seed=0)
        bare = ray.remote(num_cpus=0.5)(bare_loop()).remote(spec, run.questions("align"))
        with EnginePool(spec, ["en"], print) as pool:
            ratios = [turn(pool, bare, run, number) for number in range(options.turns + 1)][1:]  # the first warms up
    cost = 100 * (median(ratios) - 1)
    print(f"median of {options.turns}: calm_ray takes {cost:+.1f}% relative to the bare loop")


def turn(pool: EnginePool, bare: Any, run: RunDirectory, number: int) -> float:
    """Time of one pass through the pool divided by that of one pass through the bare loop."""
    plain = seconds(lambda: ray.get(bare.generate_all.remote()))
    pooled = seconds(lambda: sample(pool, run, Stage(run.storage.under(f"turn-{number}"))))
    print(f"bare {plain:.1f} s, calm_ray {pooled:.1f} s, {pooled / plain:.3f}")
    return pooled / plain


def sample(pool: EnginePool, run: RunDirectory, output: Stage) -> None:
    questions = run.questions("align")
    work = Dispatcher([ChunkTask(questions, output, chunk, "en") for chunk in sorted(questions.chunks())], max_bad=0)
    for _ in pool.run(Sample(DECODING, seed=0, round_number=1, prompt="choices"), work):
        pass
    output.finish({})


def bare_loop() -> type:
    class BareLoop:
        """An engine that only generates, chunk by chunk, from the same prompts."""

        def __init__(self, spec: EngineSpec, questions: Stage) -> None:
            set_environment(spec)
            from vllm import LLM

            self._llm = LLM(**engine_args(spec, spec.model.local_folder()))
            self._chunks = [questions.read_chunk(chunk).to_pylist() for chunk in sorted(questions.chunks())]

        def generate_all(self) -> int:
            return sum(self.generate(chunk) for chunk in self._chunks)

        def generate(self, chunk: list[Any]) -> int:
            from vllm import SamplingParams
            from vllm.inputs import TokensPrompt

            tokenizer = self._llm.get_tokenizer()
            prompts = [encode_prompt(tokenizer, prompt_text(row, "choices")) for row in chunk]
            params = [
                SamplingParams(
                    n=DECODING.samples,
                    temperature=DECODING.temperature,
                    top_p=DECODING.top_p,
                    max_tokens=DECODING.max_new_tokens,
                    seed=derive_seed(0, 1, row["question_id"], "en"),
                )
                for row in chunk
            ]
            inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
            outputs = self._llm.generate(inputs, params, use_tqdm=False)
            return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    return BareLoop


def question(number: int) -> Question:
    text = " ".join(WORDS[(31 * number + 7 * i) % len(WORDS)] for i in range(30))
    return Question(
        question_id=f"q{number}", language="en", text=text, choices=["w1", "w2", "w3", "w4"], gold=None, subject=None
    )


def seconds(work: Any) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
