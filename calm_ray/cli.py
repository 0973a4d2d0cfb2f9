"""`calm-ray …`: parses first, imports what is heavy only when something runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from calm_ray.core.exit_codes import exit_code_of
from calm_ray.recipes import DEMO_RECIPE, is_override, load_config, load_preferences, recipe_and_overrides

ALIGN_HELP = """\
Runs rounds of self-alignment. Without a recipe it is the demo, which needs no model and no data.

  calm-ray align
  calm-ray align jobs/recipes/NAME.yaml train.learning_rate=5e-6 rounds=3

The same command goes on with a run that was interrupted, with more rounds if `rounds` was raised.
Exit codes: 0 done, 1 failed, 2 bad input, 3 the cluster cannot hold the run, 130 interrupted."""


PLAN_HELP = """\
Says what a run will take before money is spent on it: engines and workers and where they go, memory of GPUs and hosts,
disk, tokens, and an estimate of the time, with what it assumes. Imports no engine and starts nothing.

  calm-ray plan jobs/recipes/llama3_8b.yaml --nodes 2 --gpus-per-node 8 --gpu-memory 80
  calm-ray plan jobs/recipes/llama3_8b.yaml --cluster cluster.yaml train.workers=4

A layout that cannot fit is refused (exit code 3) with what is short and what would fit; so it is when a run starts."""


PAIRS_HELP = """\
Votes and makes preference pairs from completions that lie on disk, of any model, without an engine.

  calm-ray pairs --completions 'samples/x_csqa_*_train_sampled.json' --preset released --out pairs
  calm-ray pairs --completions ~/calm_ray/runs/demo/rounds/1/sample --out pairs

PATH is a file, a folder or a pattern: JSON as in the CALM repository (a file for each language; records with
instruction, input, output and pred), the folder rounds/R/sample of a run, or Parquet files with question_id, language,
sample and text, whose questions --questions names.

The preset `released` makes the pairs that the paper's authors published; `strict` follows calm_ray's own rules.
A chosen side that was written in another language has its answer in the pair's language; its explanation stays in the
language that `chosen_language` names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code (see `calm_ray.core.exit_codes`)."""
    options = _parsed(arguments)
    is_run = options.command is _align
    return exit_code_of(lambda: options.command(options), goes_on=is_run, overwrites=is_run and options.overwrite)


def entry() -> None:
    """The command `calm-ray`."""
    sys.exit(main())


def align_job(recipe: Path = DEMO_RECIPE) -> None:
    """What `jobs/calm.py` and its like run: `calm-ray align` with the job's arguments, by default with this recipe."""
    words = sys.argv[1:]
    named = any(not is_override(word) and not word.startswith("-") for word in words)
    sys.exit(main(["align", *([] if named else [str(recipe)]), *words]))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command; overrides may stand on both sides of an option, which argparse does not know."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more and (not hasattr(options, "recipe") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.recipe += more
    return options


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
    align.add_argument(
        "--redo", action="store_true", help="where the configuration has changed, do again what depends on it"
    )
    align.set_defaults(command=_align)

    _add_plan(commands)

    show = commands.add_parser("show", help="print a question of a run, its completions, the vote and a pair")
    show.add_argument("run", help="the run's folder or URI")
    show.add_argument("--round", type=int, default=1, help="default: 1")
    show.add_argument("--question", help="a question_id; default: the first one with a pair")
    _add_plugins(show)
    show.set_defaults(command=_show)

    evaluate = commands.add_parser("evaluate", help="ask a run's policy the questions of a file")
    evaluate.add_argument("run", help="the run's folder or URI")
    evaluate.add_argument(
        "--questions", help="jsonl or parquet with gold answers; default: the run's held-out questions"
    )
    evaluate.add_argument("--round", type=int, help="whose policy; 0 is the base model; default: the last one")
    _add_plugins(evaluate)
    evaluate.set_defaults(command=_evaluate)

    questions = commands.add_parser("questions", help="read questions, check them, and say what they hold")
    questions.add_argument("source", help="a file, folder or pattern, or hub:owner/name[:config[:split]]")
    questions.add_argument("--format", help="default: recognised by the fields")
    questions.add_argument("--language", help="of files that do not say it")
    questions.add_argument("--rows", type=int, default=10, help="how many rows to show; default and most: 10")
    questions.add_argument("--json", action="store_true", help="print the summary as JSON")
    _add_on_bad_row(questions)
    questions.set_defaults(command=_questions)

    pairs = commands.add_parser(
        "pairs", help="vote and make pairs from completions on disk", description=PAIRS_HELP, formatter_class=raw
    )
    pairs.add_argument("--completions", required=True, nargs="+", metavar="PATH", help="see above")
    pairs.add_argument("--out", required=True, help="a folder for pairs.parquet and stats.json")
    _add_vote_options(pairs)
    pairs.set_defaults(command=_pairs)

    stats = commands.add_parser("stats", help="who votes, wins and is right, in a run or in completions on disk")
    stats.add_argument("source", nargs="+", metavar="RUN|PATH", help="a run, or completions as for `calm-ray pairs`")
    stats.add_argument("--round", type=int, default=1, help="of a run; default: 1")
    stats.add_argument("--json", action="store_true", help="print JSON")
    _add_vote_options(stats)
    stats.set_defaults(command=_stats)

    optimal = commands.add_parser("optimal", help="show the policy that DCO's reference leads to, in closed form")
    optimal.add_argument("run", help="the run's folder or URI")
    optimal.add_argument("--round", type=int, help="whose reference and policy; default: the last one")
    optimal.add_argument("--json", action="store_true", help="print JSON")
    _add_plugins(optimal)
    optimal.set_defaults(command=_optimal)

    export = commands.add_parser("export", help="write a run's policy as a whole model, the adapter merged in")
    export.add_argument("run", help="the run's folder or URI")
    export.add_argument("target", help="a folder to make")
    export.add_argument("--round", type=int, help="default: the last one")
    export.set_defaults(command=_export)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a run will take, and where it goes, without starting anything",
        description=PLAN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("recipe", nargs="*", help="as for `calm-ray align`", metavar="RECIPE|KEY=VALUE")
    plan.add_argument("--cluster", metavar="FILE", help="a file of Ray's cluster launcher: cluster.yaml")
    plan.add_argument("--nodes", type=int, help="how many machines, all alike; default: 1")
    plan.add_argument("--gpus-per-node", type=int, help="default: 8, on CPUs 0")
    plan.add_argument("--gpu-memory", type=float, metavar="GB", help="of each GPU; default: that of --gpu, or 80")
    plan.add_argument("--gpu", help="A100-40, A100-80, H100 or H200; default: by its memory")
    plan.add_argument("--cpus-per-node", type=float)
    plan.add_argument("--host-memory", type=float, metavar="GB", help="of each machine")
    plan.add_argument("--model-config", metavar="FILE", help="the config.json of a model that is not here")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(command=_plan)


def _add_plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugins", nargs="+", default=[], metavar="PACKAGE", help="packages whose code a run's own method may run"
    )


def _add_on_bad_row(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-bad-row", choices=["refuse", "skip"], default="refuse", help="stop at bad rows, or leave them out; refuse"
    )


def _add_vote_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=["strict", "released"],
        default="strict",
        help="whose rules; default: strict, calm_ray's own",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="single keys of a recipe's section `preferences`"
    )
    parser.add_argument("--questions", help="of completions in Parquet that do not lie in their run")
    parser.add_argument("--seed", type=int, default=0)
    _add_on_bad_row(parser)


def _align(options: argparse.Namespace) -> None:
    config = load_config(*recipe_and_overrides(options.recipe))
    if options.dry_run:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        return
    from calm_ray.core.console import say
    from calm_ray.job.summary import print_summary
    from calm_ray.launch import align

    run = align(config, overwrite=options.overwrite, redo=options.redo)
    print_summary(config, run.summary)
    say(f"run: {run.uri}")


def _plan(options: argparse.Namespace) -> None:
    from calm_ray.commands.plan import show_plan

    recipe, overrides = recipe_and_overrides(options.recipe)
    show_plan(
        recipe,
        overrides,
        cluster=options.cluster,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu_memory=options.gpu_memory,
        cpus_per_node=options.cpus_per_node,
        host_memory=options.host_memory,
        as_json=options.json,
        model_config=options.model_config,
        gpu=options.gpu,
    )


def _show(options: argparse.Namespace) -> None:
    from calm_ray.commands.show import show

    show(options.run, options.round, options.question, options.plugins)


def _evaluate(options: argparse.Namespace) -> None:
    from calm_ray.commands.evaluate import evaluate_again

    evaluate_again(options.run, options.questions, options.round, options.plugins)


def _questions(options: argparse.Namespace) -> None:
    from calm_ray.commands.questions import show_questions

    show_questions(
        options.source,
        format=options.format,
        language=options.language,
        on_bad_row=options.on_bad_row,
        as_json=options.json,
        rows=options.rows,
    )


def _pairs(options: argparse.Namespace) -> None:
    preferences = load_preferences(options.preset, options.set)
    from calm_ray.methods.calm.from_disk import write_pairs
    from calm_ray.methods.calm.print_vote import print_statistics

    stats = write_pairs(
        options.completions,
        options.out,
        preferences,
        seed=options.seed,
        questions=options.questions,
        on_bad_row=options.on_bad_row,
    )
    print_statistics(f"{options.out}, {options.preset}", stats)


def _stats(options: argparse.Namespace) -> None:
    preferences = load_preferences(options.preset, options.set)
    from calm_ray.commands.stats import statistics
    from calm_ray.methods.calm.print_vote import print_statistics

    title, stats = statistics(
        options.source,
        preferences,
        round_number=options.round,
        seed=options.seed,
        questions=options.questions,
        on_bad_row=options.on_bad_row,
        is_default=not options.set,
        as_json=options.json,
    )
    if options.json:
        print(json.dumps(stats, indent=2))
    else:
        print_statistics(title, stats)


def _optimal(options: argparse.Namespace) -> None:
    from calm_ray.commands.optimal import show_optimum

    show_optimum(options.run, options.round, options.json, options.plugins)


def _export(options: argparse.Namespace) -> None:
    from calm_ray.commands.export import export_policy

    export_policy(options.run, options.target, options.round)
