"""The engines and training workers of a recipe, as a cluster counts them."""

from __future__ import annotations

from calm_ray.cluster.resources import DATA_CPUS, Group, Needs
from calm_ray.config import Config


def needs_of(config: Config, training: bool = True, workers: int | None = None) -> Needs:
    """The engines of a run, and the training workers, which come and go beside them.

    `workers` is how many of them to count, by default the most that `train.workers` names. Where engines and workers
    share GPUs (`placement: colocate`), every GPU is counted once, with its engine.
    """
    engines, gpus = config.engines, config.device == "gpu"
    size = engines.tensor_parallel_size
    count = engines.count(config.languages)
    takes = {"CPU": engines.cpus if size == 1 else float(size), "GPU": float(size * gpus)}
    parts = [Group("engine", count, takes)]
    if training:
        workers = config.train.most_workers if workers is None else workers
        cpus, own = config.train.cpus_per_worker, config.placement == "split"
        parts += [Group("worker", workers, {"CPU": cpus, "GPU": float(gpus and own)})]
        spare = DATA_CPUS - workers * cpus
        parts += [Group("data task", 1, {"CPU": spare})] if spare > 0 else []
    return Needs(parts)
