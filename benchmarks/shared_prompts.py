"""How much does it save to compute a prompt once for all of its continuations? Training and scoring, on CPUs.

    python benchmarks/shared_prompts.py

Takes the atlas's questions and model: four written choices behind each prompt. Training compares a step's forward and
backward pass over rows with shared prompts with one that repeats the prompt for every choice; scoring compares the
engine's own scorer with one vLLM request per choice. Both sides alternate; prints medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from calm_ray.core.sections import Engines, Lora, Train
from calm_ray.demo.atlas.model import atlas_model
from calm_ray.demo.atlas.questions import build_atlas
from calm_ray.engines.spec import EngineSpec
from calm_ray.packing.batch import Branch, PackedBatch, pack
from calm_ray.prompts.candidates import CandidateForm, as_choices
from calm_ray.run.policies import Policy, RunModel
from calm_ray.training.model import PolicyModel
from calm_ray.training.trees import Tree

LANGUAGES = ["en", "fr", "es", "de", "it", "pt"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=48, help="in one language each")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = trees(options.questions)
    shared, apart = (sum(pack(rows, share_prompts=share).input_ids.shape) for share in (True, False))
    print(f"{len(rows)} questions with four choices: {shared} tokens with shared prompts, {apart} without")
    for dtype in ("float32", "bfloat16"):
        report(f"training, {dtype}, questions/s", len(rows), training(rows, dtype), options.repeats)
    report("scoring, bfloat16, prompts with a choice/s", 4 * len(rows), scoring(rows), options.repeats)


def trees(count: int) -> list[Tree]:
    tokenizer = AutoTokenizer.from_pretrained(atlas_model()[0])
    asked = build_atlas(0, LANGUAGES).align[:count]
    found = [CandidateForm(as_choices).of(row, tokenizer) for row in asked]
    return [
        Tree(row["question_id"], row["language"], 0, row["prompt_token_ids"], tuple(map(Branch, row["token_ids"])))
        for row in found
    ]


def training(rows: list[Tree], dtype: str) -> dict[str, Callable[[], None]]:
    """Forward and backward passes over all rows, eight at a time."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train = Train(learning_rate=1e-4, warmup_ratio=0.0, dtype=dtype, lora=Lora(r=16, alpha=32, targets=TARGETS))  # type: ignore[arg-type]
    model = PolicyModel(atlas_model()[0], train, torch.device("cpu"))
    model.load(Policy(), 0)

    def step(share: bool) -> None:
        for first in range(0, len(rows), 8):
            batch: PackedBatch = pack(rows[first : first + 8], share_prompts=share)
            (-model.logps(batch).mean()).backward()

    return {"shared": lambda: step(True), "apart": lambda: step(False)}


def scoring(rows: list[Tree]) -> dict[str, Callable[[], None]]:
    from calm_ray.engines.vllm import VLLMGenerator

    engines = Engines(shared=1, args={"max_model_len": 256, "max_num_seqs": 128})
    engine = VLLMGenerator(EngineSpec(RunModel(str(atlas_model()[0])), engines, None, "cpu", seed=0))
    jobs = [(row.prompt, [branch.tokens for branch in row.branches]) for row in rows]
    return {
        "shared": lambda: consume(engine._score_with_torch(jobs)),
        "apart": lambda: consume(engine._score_texts(jobs)),
    }


def consume(scores: object) -> None:
    for _ in scores:  # type: ignore[attr-defined]
        pass


def report(title: str, count: int, sides: dict[str, Callable[[], None]], repeats: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()  # warm up
    for _ in range(repeats):
        for name, run in sides.items():
            started = time.monotonic()
            run()
            seconds[name].append(time.monotonic() - started)
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    figures = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    print(f"{title}: {figures}, ratio {rates['shared'] / rates['apart']:.2f}")


if __name__ == "__main__":
    main()
