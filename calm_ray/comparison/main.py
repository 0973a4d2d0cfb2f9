"""Several methods from one recipe: ordinary runs that share a cluster, its engines, and the work they have in common.

Whatever is heavy is imported only when something runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from calm_ray.comparison.contenders import BASE, TABLE_1, Comparison, Contender, named_methods, plan
from calm_ray.core.exit_codes import exit_code_of
from calm_ray.methods import METHODS
from calm_ray.recipes import RECIPES, is_override, recipe_and_overrides

DEMO_RECIPE = RECIPES / "dco_compare_demo.yaml"
HELP = f"""\
Runs several methods from one recipe and prints what became of them: the columns of DCO's Table 1.

  python jobs/compare.py
  python jobs/compare.py jobs/recipes/NAME.yaml --methods base calm 'dpo_gold->dco' dco train.batch_pairs=16

Methods are {", ".join(METHODS)}; `{BASE}` is the policy before training. 'dpo_gold->dco', in quotes, is
DCO from where DPO ended. Each is an ordinary run, NAME-METHOD; what runs have in common is made once and copied.
The same command goes on where it stopped, and uses the runs that are finished.

KEY=VALUE holds for all methods, compare.METHOD.KEY=VALUE for one, as does the recipe's section `compare`. Learning
rate, epochs and whatever else methods have defaults of their own for is the recipe's for its own method alone."""


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
    from calm_ray.comparison.shared import check_common_start, share_questions, share_start
    from calm_ray.launch import Launch, launch

    launches = [Launch(each.config, overwrite=overwrite, starts_later=each.starts_from_another) for each in contenders]
    by_name = {each.config.name: each for each in contenders}

    def others_of(each: Launch) -> list[Contender]:
        return [other for name, other in by_name.items() if name != each.config.name]

    launch(
        launches,
        check=lambda: None if overwrite else check_common_start(contenders),
        share_questions=lambda each: share_questions(each.run, [other.run for other in others_of(each)]),
        share_start=lambda each: share_start(by_name[each.config.name], others_of(each)),
    )
