"""Runs several methods from one recipe as ordinary runs that share a cluster, its engines and common work.

Defers heavy imports until something runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from calm_ray.comparison.contenders import BASE, TABLE_1, Comparison, Contender, named_methods, plan
from calm_ray.core.exit_codes import run_command
from calm_ray.methods import METHODS
from calm_ray.recipes.merge import is_override, split_words

DEMO = "dco/compare_demo"
HELP = f"""\
Runs several methods from one recipe and compares them in the columns of DCO's Table 1.

  python jobs/compare.py
  python jobs/compare.py my-recipe.yaml --methods base calm 'dpo_gold->dco' dco train.batch_pairs=16

Methods are {", ".join(METHODS)}; `{BASE}` is the policy before training. 'dpo_gold->dco', in quotes,
is DCO starting from the final DPO policy. Each method is an ordinary run, NAME-METHOD; work that runs share is done
once and copied. Repeat the command to resume; finished runs are reused.

KEY=VALUE applies to all methods, compare.METHOD.KEY=VALUE to one, like the recipe's section `compare`. Learning rate,
epochs and other keys with method-specific defaults are taken from the recipe for its own method only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see `calm_ray.core.exit_codes`)."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(lambda: _compare(options), resumable=True, overwrites=options.overwrite)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("compare.py", description=HELP, formatter_class=raw)
    parser.add_argument(
        "words",
        nargs="*",
        help=f"recipes, merged left to right (default: {DEMO}), and overrides: section.key=value",
        metavar="RECIPE|KEY=VALUE",
    )
    parser.add_argument("--methods", nargs="+", default=TABLE_1, metavar="METHOD", help=f"default: {' '.join(TABLE_1)}")
    parser.add_argument("--overwrite", action="store_true", help="delete the runs of these methods first")
    return parser


def _compare(options: argparse.Namespace) -> None:
    # --methods consumes all following words, including overrides.
    more = [word for word in options.methods if is_override(word)]
    recipes, overrides = split_words([*options.words, *more])
    methods = named_methods([word for word in options.methods if word not in more])
    comparison = plan(recipes or DEMO, methods, overrides)
    run_all(comparison.contenders, overwrite=options.overwrite)
    report(comparison)


def report(comparison: Comparison) -> None:
    """Prints the table and writes it, as fractions, next to the runs."""
    from calm_ray.comparison.table import print_rows, table_rows
    from calm_ray.core.console import say
    from calm_ray.run.storage import Storage

    rows = table_rows(comparison)
    storage, file = Storage(comparison.contenders[0].config.storage), f"{comparison.name}-compare.json"
    storage.write_json(file, {"name": comparison.name, "rows": rows})
    print_rows(comparison.name, rows)
    say(f"table: {storage.uri(file)}")


def run_all(contenders: Sequence[Contender], *, overwrite: bool) -> None:
    """Runs the unfinished contenders one after another on one cluster with the same engines.

    Raises InputError for invalid input to any of them before an engine starts.
    """
    from calm_ray.comparison.shared import check_common_start, share_questions, share_start
    from calm_ray.launch import Launch, launch

    launches = [
        Launch(each.config, overwrite=overwrite, starts_from_another=each.starts_from_another) for each in contenders
    ]
    by_name = {each.config.name: each for each in contenders}

    def others_of(each: Launch) -> list[Contender]:
        return [other for name, other in by_name.items() if name != each.config.name]

    launch(
        launches,
        check=lambda: None if overwrite else check_common_start(contenders),
        share_questions=lambda each: share_questions(each.run, [other.run for other in others_of(each)]),
        share_start=lambda each: share_start(by_name[each.config.name], others_of(each)),
    )
