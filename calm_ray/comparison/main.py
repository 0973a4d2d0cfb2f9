"""Several methods from one recipe: ordinary runs that share a cluster, its engines, and the work they have in common.

Whatever is heavy is imported only when something runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from calm_ray.comparison.contenders import BASE, METHODS, TABLE_1, Comparison, Contender, named_methods, plan
from calm_ray.core.exit_codes import exit_code_of
from calm_ray.recipes import RECIPES, is_override, recipe_and_overrides

if TYPE_CHECKING:
    from calm_ray.engines.pool import EnginePool
    from calm_ray.job.preflight import Inputs
    from calm_ray.run.policies import RunModel

DEMO_RECIPE = RECIPES / "dco_compare_demo.yaml"
HELP = f"""\
Runs several methods from one recipe and prints what became of them: the columns of DCO's Table 1.

  python jobs/compare.py
  python jobs/compare.py jobs/recipes/NAME.yaml --methods base calm 'dpo_gold->dco' dco train.batch_pairs=16

Methods are {", ".join(METHODS)}; `{BASE}` is the policy before training. 'dpo_gold->dco', in quotes, is
DCO from where DPO ended. Each is an ordinary run, NAME-METHOD; what runs have in common is made once and copied.
The same command goes on where it stopped, and uses the runs that are finished.

KEY=VALUE holds for all methods, compare.METHOD.KEY=VALUE for one, as does the recipe's section `compare`. Learning
rate, epochs and whatever else has defaults by objective is taken from the recipe for its own objective alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see `calm_ray.core.exit_codes`)."""
    options = _parser().parse_intermixed_args(arguments)
    return exit_code_of(lambda: _compare(options), goes_on=True, overwrites=options.overwrite)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("compare.py", description=HELP, formatter_class=raw)
    parser.add_argument(
        "recipe",
        nargs="*",
        help=f"a recipe (default: {DEMO_RECIPE.name}) and overrides: section.key=value",
        metavar="RECIPE|KEY=VALUE",
    )
    parser.add_argument("--methods", nargs="+", default=TABLE_1, metavar="METHOD", help=f"default: {' '.join(TABLE_1)}")
    parser.add_argument("--overwrite", action="store_true", help="delete the runs of these methods first")
    return parser


def _compare(options: argparse.Namespace) -> None:
    # --methods takes all words that follow it; an override is known by its =.
    more = [word for word in options.methods if is_override(word)]
    recipe, overrides = recipe_and_overrides([*options.recipe, *more])
    methods = named_methods([word for word in options.methods if word not in more])
    comparison = plan(Path(recipe) if recipe else DEMO_RECIPE, methods, overrides)
    run_all(comparison.contenders, overwrite=options.overwrite)
    report(comparison)


def report(comparison: Comparison) -> None:
    """Prints the table and writes it, in shares, beside the runs."""
    from calm_ray.comparison.table import print_rows, table_rows
    from calm_ray.core.console import say
    from calm_ray.run.storage import Storage

    rows = table_rows(comparison)
    storage, file = Storage(comparison.contenders[0].config.storage), f"{comparison.name}-compare.json"
    storage.write_json(file, {"name": comparison.name, "rows": rows})
    print_rows(comparison.name, rows)
    say(f"table: {storage.uri(file)}")


def run_all(contenders: Sequence[Contender], *, overwrite: bool) -> None:
    """Runs what is not finished, one after the other, on one cluster and the same engines.

    Raises InputError for bad input of any of them before an engine starts.
    """
    from calm_ray.core.console import say
    from calm_ray.run.lock import locked

    with ExitStack() as locks:
        for one in contenders:
            locks.enter_context(locked(one.run.storage, say))
        _run_all(contenders, overwrite)


def _run_all(contenders: Sequence[Contender], overwrite: bool) -> None:
    from calm_ray.cluster.connection import check_resources, check_storage, cluster
    from calm_ray.cluster.resources import Needs
    from calm_ray.cluster.run_lock import locked_in_cluster
    from calm_ray.comparison.shared import check_common_start
    from calm_ray.core.console import say
    from calm_ray.engines.pool import EnginePool
    from calm_ray.job.cluster_check import check_layout
    from calm_ray.job.engines import engine_spec
    from calm_ray.planning.needs import needs_of
    from calm_ray.run.provenance import about
    from calm_ray.run.repair import mend

    for one in contenders:
        one.run.check(one.settings, overwrite)
    if not overwrite:
        check_common_start(contenders)
    todo = [one for one in contenders if overwrite or not one.run.is_complete(one.settings)]
    if not todo:
        return
    inputs = _prepare(todo, None if overwrite else _model_of(contenders), overwrite)
    needs = [needs_of(one.config) for one in todo]
    cpus = max(math.ceil(one.total["CPU"]) for one in needs)
    largest = max(needs, key=lambda one: one.count("worker"))
    with cluster(largest, least=Needs([]), local_cpus=cpus), ExitStack() as locks:
        for one in todo:
            locks.enter_context(locked_in_cluster(one.run.uri))
        for one in todo:
            check_resources(needs_of(one.config, workers=one.config.train.least_workers))
            check_layout(one.config, inputs.folder)
        for one in todo:
            for line in one.run.begin(one.settings, about(), overwrite):
                say(line)
            mend(one.run)
            one.run.share_model(inputs.model, inputs.folder)
        first = todo[0]
        check_storage(first.run.storage)
        config, model = first.config, first.run.model
        assert model is not None
        with EnginePool(engine_spec(config, model), config.languages, say) as pool:
            check_storage(first.run.storage)  # again, for nodes that came with the engines
            for one in todo:
                _run(one, contenders, pool, inputs)


def _model_of(contenders: Sequence[Contender]) -> RunModel | None:
    return next((one.run.model for one in contenders if one.run.model is not None), None)


def _prepare(todo: Sequence[Contender], known: RunModel | None, overwrite: bool) -> Inputs:
    """The questions for all methods, those with gold answers if one needs them, and the model; checked for each."""
    from calm_ray.job.initial_policy import check_start
    from calm_ray.job.preflight import prepare
    from calm_ray.training.preflight import check_training

    # Reading takes minutes where there are many questions: methods that ask the same of them are read for once.
    kinds = {(one.needs_gold, one.config.writes): one.config for one in sorted(todo, key=lambda one: one.needs_gold)}
    *_, inputs = [prepare(config, known) for config in kinds.values()]
    for one in todo:
        check_training(inputs.folder, one.config.train)
        if not one.starts_from_another:
            check_start(one.config, one.run, inputs.model, overwrite=overwrite)
    return inputs


def _run(one: Contender, contenders: Sequence[Contender], pool: EnginePool, inputs: Inputs) -> None:
    """What is left of one run, but for what another one has."""
    from calm_ray.comparison.shared import share_questions, share_start
    from calm_ray.core.console import say
    from calm_ray.job.ingest import take_questions
    from calm_ray.job.initial_policy import check_start, start_policy
    from calm_ray.methods.dco.gamma import check_gamma
    from calm_ray.rounds import run_to_end

    config, run, others = one.config, one.run, [other for other in contenders if other is not one]
    say(f"run: {run.uri}")
    if config.method == "dco":
        say(check_gamma(config.dco, config.languages, config.train.beta))
    model = run.model
    assert model is not None
    check_start(config, run, model)
    share_questions(run, [other.run for other in others])
    take_questions(config, run, model, pool, inputs)
    share_start(one, start_policy(config, run), others)
    run_to_end(config, run, model, pool)
