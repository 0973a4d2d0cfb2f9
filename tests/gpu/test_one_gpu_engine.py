"""Engine behavior that only a GPU can show: sleeping frees its memory and does not change its output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from calm_ray.core.sections import Engines
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.spec import EngineSpec
from calm_ray.run.policies import Policy, RunModel
from calm_ray.testing import word_tokenizer, write_tiny_model

pytestmark = pytest.mark.gpu(1)


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def free_memory() -> int:
    return int(torch.cuda.mem_get_info()[0])


def test_sleeping_engine_frees_its_memory(local_ray: None, tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(1000)]
    model = write_tiny_model(tmp_path / "model", word_tokenizer(words), width=1024, layers=8)
    settings = Engines(shared=1, args={"max_model_len": 256, "gpu_memory_utilization": 0.5, "enforce_eager": True})
    spec = EngineSpec(RunModel(str(model)), settings, None, "gpu", seed=0, is_colocated=True)
    free = free_memory()
    with EnginePool(spec, ["en"], print) as pool:
        pool.refresh(Policy())
        awake = free_memory()
        before = pool.text_service(["w1 w2 w3", "w4 w5"], 32)
        with pool.asleep():
            asleep = free_memory()
        after = pool.text_service(["w1 w2 w3", "w4 w5"], 32)
    used = free - awake
    print(f"awake {used / 2**30:.1f} GiB, asleep {(free - asleep) / 2**30:.1f} GiB")
    assert free - asleep < 0.1 * used
    assert before == after
