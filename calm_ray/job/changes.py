"""What a configuration changes in an existing run."""

from __future__ import annotations

from calm_ray.config import Config, parse_config
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import Changes, Graph, changes_between


def changes_of(run: RunDirectory, config: Config) -> Changes | None:
    """What resuming the run with this configuration changes; None if there is no run.

    Does not execute plug-ins that the run names but the configuration does not allow; all steps then count as replaced.
    """
    if not run.is_there:
        return None
    before, old_graph = run.config, Graph((), (), "")
    try:
        old = parse_config(before, allowed=config.plugins)
    except ValueError:  # its method is not allowed, or keys no longer exist
        pass
    else:
        # Fill in the defaults of keys added since, but keep the plug-ins as recorded.
        before = {**old.model_dump(mode="json"), "plugins": before.get("plugins", {})}
        old_graph = old.graph
    return changes_between(before, config.as_record(), old_graph, config.graph, run.folders())
