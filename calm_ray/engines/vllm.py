"""The `Generator` on vLLM. No other module imports vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from calm_ray.engines.generator import Decoding, Generated, Likelihoods
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.torch_scorer import TorchScorer
from calm_ray.packing.attention import keeps_branches_apart
from calm_ray.run.policies import Policy, evict_policies, require_safetensors


class VLLMGenerator:
    """A `Generator` on a vLLM engine in this process or a child of it."""

    def __init__(self, spec: EngineSpec) -> None:
        set_environment(spec)
        from vllm import LLM

        self._spec = spec
        self._folder = spec.model.local_folder()
        require_safetensors(self._folder)
        self._llm = LLM(**engine_args(spec, self._folder))
        self._adapter: Any = None
        self._scorer = self._torch_scorer()
        self._policy = Policy()
        self.steps = 0
        """Engine steps so far. A busy engine is alive as long as this grows."""
        self.is_at_work = False
        self.is_asleep = False
        self._count_steps()

    def _count_steps(self) -> None:
        step = self._llm.llm_engine.step

        def counted() -> Any:
            self._count_step()
            return step()

        self._llm.llm_engine.step = counted

    @property
    def policy(self) -> str:
        """Name of the loaded policy."""
        return self._policy.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._llm.get_tokenizer()

    @property
    def context_tokens(self) -> int:
        """Maximum number of tokens of a prompt and its answer together."""
        return int(self._llm.model_config.max_model_len)

    def load(self, policy: Policy) -> None:
        """Loads a policy into the running engine, as an adapter or as merged weights, and drops older local copies."""
        if policy.name == self.policy:
            return
        if self._spec.uses_adapters:
            self._swap_adapter(policy)
        else:
            self._reload_weights(policy)
        self._policy = policy
        evict_policies({policy.name})

    def _swap_adapter(self, policy: Policy) -> None:
        from vllm.lora.request import LoRARequest

        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = None
        if policy.kind == "adapter":
            folder = policy.local_folder()
            require_safetensors(folder)
            # The name contains the weights' hash, so vLLM's prefix cache cannot serve another adapter's results.
            self._adapter = LoRARequest(policy.name, policy.round + 1, str(folder))
            self._llm.llm_engine.add_lora(self._adapter)

    def _reload_weights(self, policy: Policy) -> None:
        from calm_ray.run.merging import delete_merged, merged_folder

        folder = merged_folder(self._spec.model, policy)
        require_safetensors(folder)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        # The cache was computed with the previous weights.
        self._llm.reset_prefix_cache()
        delete_merged(self.policy)

    def generate(self, prompts: Sequence[list[int]], decoding: Decoding, seeds: Sequence[int]) -> list[list[Generated]]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=decoding.samples,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=decoding.max_new_tokens,
                seed=seed,
                logprobs=0,  # only those of the sampled tokens
            )
            for seed in seeds
        ]
        return [
            [
                Generated(one.text, list(one.token_ids), str(one.finish_reason), one.cumulative_logprob)
                for one in output.outputs
            ]
            for output in self._generate(prompts, params)
        ]

    def score(
        self, prompts: Sequence[list[int]], candidates: Sequence[list[list[int]]], *, with_prompt: bool
    ) -> list[Likelihoods]:
        jobs = list(zip(prompts, candidates, strict=True))
        by_label = [not with_prompt and _are_labels(group) for group in candidates]
        labels = iter(self._score_labels([job for job, is_label in zip(jobs, by_label, strict=True) if is_label]))
        score_texts = self._score_texts if with_prompt or self._scorer is None else self._score_with_torch
        texts = iter(score_texts([job for job, is_label in zip(jobs, by_label, strict=True) if not is_label]))
        scored = [next(labels) if is_label else next(texts) for is_label in by_label]
        return scored if with_prompt else [Likelihoods(one.logps) for one in scored]

    def _score_labels(self, jobs: Sequence[tuple[list[int], list[list[int]]]]) -> Iterator[Likelihoods]:
        """Scores single-token candidates: one request per prompt, for the log-probabilities of its next token."""
        from vllm import SamplingParams

        params = [
            SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=[label for (label,) in candidates])
            for _, candidates in jobs
        ]
        for (_, candidates), output in zip(jobs, self._generate([prompt for prompt, _ in jobs], params), strict=True):
            logprobs = output.outputs[0].logprobs[0]
            yield Likelihoods([logprobs[label].logprob for (label,) in candidates])

    def _score_texts(self, jobs: Sequence[tuple[list[int], list[list[int]]]]) -> Iterator[Likelihoods]:
        """Scores candidates of any length: one request per candidate, for the prompt logprobs of both together.

        vLLM computes the prompt again for every candidate: its prefix cache has no logprobs of prompts.
        """
        from vllm import SamplingParams

        whole = [prompt + candidate for prompt, candidates in jobs for candidate in candidates]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = iter(zip(whole, self._generate(whole, params), strict=True))
        for prompt, candidates in jobs:
            logps, prompt_logp = [], 0.0
            for _ in candidates:
                tokens, output = next(outputs)
                each = [at[token].logprob for token, at in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
                prompt_logp = sum(each[: len(prompt) - 1])
                logps.append(sum(each[len(prompt) - 1 :]))
            yield Likelihoods(logps, prompt_logp)

    def _score_with_torch(self, jobs: Sequence[tuple[list[int], list[list[int]]]]) -> Iterator[Likelihoods]:
        """Like `_score_texts`, with every prompt computed once."""
        assert self._scorer is not None
        self.is_at_work = True
        try:
            yield from map(Likelihoods, self._scorer.score(self._policy, jobs))
        finally:
            self.is_at_work = False

    def _torch_scorer(self) -> TorchScorer | None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self._folder, trust_remote_code=False)
        if not self._spec.may_score_with_torch or not keeps_branches_apart(config):
            return None
        return TorchScorer(self._spec.model, self._spec.engines.dtype, self._count_step)

    def _count_step(self) -> None:
        self.steps += 1

    def _generate(self, prompts: Sequence[list[int]], params: Any) -> list[Any]:
        from vllm.inputs import TokensPrompt

        if not prompts:  # a chunk may have no questions in some language
            return []
        assert not self.is_asleep
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        self.is_at_work = True
        try:
            return self._llm.generate(requests, params, lora_request=self._adapter, use_tqdm=False)
        finally:
            self.is_at_work = False

    def sleep(self) -> None:
        """Moves the weights to host memory and frees the GPU's. On CPUs there is nothing to free."""
        if self._spec.device == "gpu":
            self._llm.sleep(level=1)
        self.is_asleep = True

    def wake(self) -> None:
        if self._spec.device == "gpu" and self.is_asleep:
            self._llm.wake_up()
        self.is_asleep = False


MAX_LABELS = 128
"""Maximum number of tokens whose log-probability vLLM returns in one request."""


def _are_labels(candidates: Sequence[list[int]]) -> bool:
    return len(candidates) <= MAX_LABELS and all(len(candidate) == 1 for candidate in candidates)


def set_environment(spec: EngineSpec) -> None:
    """Sets the environment variables that vLLM reads when imported."""
    # In the actor's own process nothing outlives the actor; `ChildProcesses` watches a child.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(spec.engines.process == "child"))
    if spec.is_colocated:
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = str(spec.gpu_fraction)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if spec.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Several engines share a node's cores; by default, each would pin the same ones.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def engine_args(spec: EngineSpec, folder: Path) -> dict[str, Any]:
    """Arguments for `vllm.LLM`."""
    args: dict[str, Any] = {
        "model": str(folder),
        "dtype": spec.engines.dtype,
        "tensor_parallel_size": spec.engines.tensor_parallel_size,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "seed": spec.seed,
        "disable_log_stats": True,
    }
    if spec.device == "cpu":
        # vLLM 0.32 rewinds a seeded request's generator when a prompt is prefilled in chunks, which fails on CPUs.
        args |= {"enforce_eager": True, "enable_chunked_prefill": False}
    elif spec.is_colocated:
        args["enable_sleep_mode"] = True
    if spec.engines.tensor_parallel_size > 1:
        args["distributed_executor_backend"] = "ray"  # uses this actor's placement group
    if spec.lora is not None and spec.uses_adapters:
        args |= {"enable_lora": True, "max_lora_rank": spec.lora.r, "max_loras": 1, "max_cpu_loras": 2}
        # Wraps only the layers that the run's adapters change. This also avoids vLLM 0.32's LoRA layer for the LM head,
        # which scores prompts as if each were one token.
        args["lora_target_modules"] = list(spec.lora.targets)
    return args | spec.engines.args
