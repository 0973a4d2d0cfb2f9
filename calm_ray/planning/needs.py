"""The Ray resources that a recipe needs."""

from __future__ import annotations

from calm_ray.cluster.resources import DATA_CPUS, Group, Needs
from calm_ray.config import Config


def needs_of(config: Config, training: bool = True, workers: int | None = None) -> Needs:
    """Needs of a run's engines, training workers and data tasks.

    `workers` defaults to the maximum of `train.workers`. With `placement: colocate`, engines and workers share GPUs:
    each GPU counts once, with its engine.
    """
    engines, gpus = config.engines, config.device == "gpu"
    size = engines.tensor_parallel_size
    count = engines.count(config.languages)
    takes = {"CPU": engines.cpus if size == 1 else float(size), "GPU": float(size * gpus)}
    parts = [Group("engine", count, takes)]
    spare = DATA_CPUS  # data tasks run while workers do not
    if training:
        workers = config.train.max_workers if workers is None else workers
        cpus, own_gpus = config.train.cpus_per_worker, config.placement == "split"
        parts += [Group("worker", workers, {"CPU": cpus, "GPU": float(gpus and own_gpus)})]
        spare -= workers * cpus
    if spare > 0:
        parts += [Group("data task", 1, {"CPU": spare})]
    return Needs(parts)
