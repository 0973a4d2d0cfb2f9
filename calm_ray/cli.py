"""`calm-ray …`: parses first, imports what is heavy only when something runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import yaml

from calm_ray.config import load_config
from calm_ray.errors import CalmRayError, InputError

ALIGN_HELP = """\
Runs rounds of self-alignment. Without a recipe it is the demo, which needs no model and no data.

  calm-ray align
  calm-ray align jobs/recipes/NAME.yaml train.learning_rate=5e-6 rounds=3

The same command goes on with a run that was interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except CalmRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """The command `calm-ray`."""
    sys.exit(main())


def align_job() -> None:
    """What `jobs/calm.py` runs: `calm-ray align` with the job's arguments."""
    sys.exit(main(["align", *sys.argv[1:]]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("calm-ray", description="A language model learns to agree with its better self.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    align = commands.add_parser(
        "align", help="run rounds of self-alignment", description=ALIGN_HELP, formatter_class=raw
    )
    align.add_argument(
        "recipe", nargs="*", help="a recipe (YAML) and overrides: section.key=value", metavar="RECIPE|KEY=VALUE"
    )
    align.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    align.add_argument("--overwrite", action="store_true", help="delete a run of the same name first")
    align.set_defaults(command=_align)

    show = commands.add_parser("show", help="print a question of a run, its completions, the vote and a pair")
    show.add_argument("run", help="the run's folder or URI")
    show.add_argument("--round", type=int, default=1, help="default: 1")
    show.add_argument("--question", help="a question_id; default: the first one with a pair")
    show.set_defaults(command=_show)

    evaluate = commands.add_parser("evaluate", help="ask a run's policy the questions of a file")
    evaluate.add_argument("run", help="the run's folder or URI")
    evaluate.add_argument(
        "--questions", help="jsonl or parquet with gold answers; default: the run's held-out questions"
    )
    evaluate.add_argument("--round", type=int, help="whose policy; 0 is the base model; default: the last one")
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser("export", help="write a run's policy as a whole model, the adapter merged in")
    export.add_argument("run", help="the run's folder or URI")
    export.add_argument("target", help="a folder to make")
    export.add_argument("--round", type=int, help="default: the last one")
    export.set_defaults(command=_export)
    return parser


def _align(options: argparse.Namespace) -> None:
    recipes = [word for word in options.recipe if "=" not in word]
    if len(recipes) > 1:
        raise InputError(f"one recipe at a time, not {' and '.join(recipes)}; an override looks like section.key=value")
    config = load_config(recipes[0] if recipes else None, [word for word in options.recipe if "=" in word])
    if options.dry_run:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        return
    from calm_ray.progress import say
    from calm_ray.rounds import align
    from calm_ray.summary import print_summary

    run = align(config, overwrite=options.overwrite)
    print_summary(run.summary)
    say(f"run: {run.uri}")


def _show(options: argparse.Namespace) -> None:
    from calm_ray.show import show

    show(options.run, options.round, options.question)


def _evaluate(options: argparse.Namespace) -> None:
    from calm_ray.evaluation.again import evaluate_again

    evaluate_again(options.run, options.questions, options.round)


def _export(options: argparse.Namespace) -> None:
    from calm_ray.export import export_policy

    export_policy(options.run, options.target, options.round)
