"""What a configuration means for the run that is there."""

from __future__ import annotations

from calm_ray.config import Config, parse_config
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import Changes, Graph, changes_between


def changes_of(run: RunDirectory, config: Config) -> Changes | None:
    """What resuming the run with this configuration changes; None where there is no run.

    Code that the run names and the configuration does not allow is not run: all its steps are taken to be replaced.
    """
    if not run.is_there:
        return None
    before, old_graph = run.config, Graph((), (), "")
    try:
        old = parse_config(before, allowed=config.plugins)
    except ValueError:  # of such a method, or with keys that are no more
        pass
    else:
        # With the defaults of keys that came after it was written, but the plug-ins as they were.
        before = {**old.model_dump(mode="json"), "plugins": before.get("plugins", {})}
        old_graph = old.graph
    return changes_between(before, config.as_record(), old_graph, config.graph, run.folders())
