"""The `calm-ray` command. Heavy imports happen inside the commands, so that `--help` and errors are instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from calm_ray.core.exit_codes import run_command
from calm_ray.recipes.load import load_config, load_preferences
from calm_ray.recipes.merge import is_override, split_words

# Set before torch starts its threads, for Ray's workers too. Threads that spin while they wait take twice as long as
# soon as another program needs a core; threads that sleep cost a tenth on an idle machine (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ALIGN_HELP = """\
Runs rounds of self-alignment. Without a recipe it runs the demo, which needs no model and no data.

  calm-ray align
  calm-ray align demo rounds=3 train.learning_rate=5e-6
  calm-ray align my-recipe.yaml
  calm-ray align dco/base dco/mmmlu dco/joint dco/aya name=my-run
  calm-ray align 'dco/tables:table1[aya,dco]'

A recipe is a path, a name that `calm-ray recipes` lists, or a row of a table. Several are merged left to right, then
KEY=VALUE is applied. The same command resumes an interrupted run, and adds rounds if `rounds` was raised.
Exit codes: 0 done, 1 failed, 2 bad input, 3 the run does not fit on the cluster, 130 interrupted."""


PLAN_HELP = """\
Shows what a run needs before any money is spent: where engines and workers go, GPU and host memory, disk, tokens, and
an estimate of the time with its assumptions. Starts nothing.

  calm-ray plan llama3_8b --nodes 2 --gpus-per-node 8 --gpu-memory 80
  calm-ray plan llama3_8b --cluster cluster.yaml train.workers=4

A layout that does not fit is refused (exit code 3) with what is missing and what would fit, as when a run starts."""


PAIRS_HELP = """\
Votes on completions on disk, from any model, and writes preference pairs. No engine is needed.

  calm-ray pairs --completions 'samples/x_csqa_*_train_sampled.json' --preset released --out pairs
  calm-ray pairs --completions ~/calm_ray/runs/demo/rounds/1/sample --out pairs

PATH is a file, a folder or a pattern: JSON as in the CALM repository (one file per language; records with instruction,
input, output and pred), the folder rounds/R/sample of a run, or Parquet files with question_id, language, sample and
text, with their questions in --questions.

The preset `released` makes the pairs that the paper's authors published; `strict` follows calm_ray's own rules.
If a chosen side was written in another language, its answer is translated into the pair's language; its explanation
stays in the language that `chosen_language` names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code (see `calm_ray.core.exit_codes`)."""
    options = _parsed(arguments)
    is_run = options.command is _align
    return run_command(lambda: options.command(options), resumable=is_run, overwrites=is_run and options.overwrite)


def entry() -> None:
    """The entry point of `calm-ray`."""
    sys.exit(main())


def align_job(default: str = "demo") -> None:
    """Runs `calm-ray align` with the job's arguments; `default` is the recipe if they name none."""
    words = sys.argv[1:]
    is_named = any(not is_override(word) and not word.startswith("-") for word in words)
    sys.exit(main(["align", *([] if is_named else [default]), *words]))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses options; unlike argparse, allows recipes and overrides on both sides of an option."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more and (not hasattr(options, "words") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.words += more
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "calm-ray", description="Trains a language model, without labels, to agree with itself."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    align = commands.add_parser(
        "align", help="run rounds of self-alignment", description=ALIGN_HELP, formatter_class=raw
    )
    _add_words(align)
    align.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    align.add_argument("--overwrite", action="store_true", help="delete an existing run of the same name first")
    align.add_argument(
        "--redo", action="store_true", help="if the configuration has changed, recompute what depends on it"
    )
    align.set_defaults(command=_align)

    _add_plan(commands)

    recipes = commands.add_parser("recipes", help="list the recipes that come with calm_ray, or print one")
    recipes.add_argument("name", nargs="?", help="print this recipe")
    recipes.set_defaults(command=_recipes)

    atlas = commands.add_parser("atlas", help="write the atlas's questions about countries as question files")
    atlas.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    atlas.add_argument("--seed", type=int, default=0, help="draws the held-out countries and the choices; default: 0")
    atlas.add_argument("--languages", nargs="+", metavar="CODE", help="default: all that the atlas has")
    atlas.set_defaults(command=_atlas)

    keys = commands.add_parser("keys", help="print every key of a recipe with its values, default and meaning")
    keys.set_defaults(command=_keys)

    show = commands.add_parser("show", help="print one question of a run with its completions, votes and pairs")
    show.add_argument("run", help="the run's folder or URI")
    show.add_argument("--round", type=int, default=1, help="default: 1")
    show.add_argument("--question", help="a question_id; default: the first with a pair")
    _add_plugins(show)
    show.set_defaults(command=_show)

    evaluate = commands.add_parser("evaluate", help="evaluate a run's policy on its held-out questions or on a file")
    evaluate.add_argument("run", help="the run's folder or URI")
    evaluate.add_argument(
        "--questions", help="JSONL or Parquet with gold answers; default: the run's held-out questions"
    )
    evaluate.add_argument("--round", type=int, help="round of the policy; 0 is the base model; default: the last")
    _add_plugins(evaluate)
    evaluate.set_defaults(command=_evaluate)

    questions = commands.add_parser("questions", help="read and check questions, and summarize them")
    questions.add_argument("source", help="a file, folder or pattern, or hub:owner/name[:config[:split]]")
    questions.add_argument("--format", help="default: detected from the fields")
    questions.add_argument("--language", help="language of files that do not state it")
    questions.add_argument("--rows", type=int, default=10, help="rows to show; default and maximum: 10")
    questions.add_argument("--json", action="store_true", help="print the summary as JSON")
    _add_on_bad_row(questions)
    questions.set_defaults(command=_questions)

    pairs = commands.add_parser(
        "pairs", help="vote on completions on disk and write pairs", description=PAIRS_HELP, formatter_class=raw
    )
    pairs.add_argument("--completions", required=True, nargs="+", metavar="PATH", help="see above")
    pairs.add_argument("--out", required=True, help="output folder for pairs.parquet and stats.json")
    _add_vote_options(pairs)
    pairs.set_defaults(command=_pairs)

    stats = commands.add_parser("stats", help="print vote statistics of a run or of completions on disk")
    stats.add_argument("source", nargs="+", metavar="RUN|PATH", help="a run, or completions as for `calm-ray pairs`")
    stats.add_argument("--round", type=int, default=1, help="round of the run; default: 1")
    stats.add_argument("--json", action="store_true", help="print JSON")
    _add_vote_options(stats)
    stats.set_defaults(command=_stats)

    optimal = commands.add_parser("optimal", help="print DCO's optimal policy, in closed form")
    optimal.add_argument("run", help="the run's folder or URI")
    optimal.add_argument("--round", type=int, help="round of the reference and policy; default: the last")
    optimal.add_argument("--json", action="store_true", help="print JSON")
    _add_plugins(optimal)
    optimal.set_defaults(command=_optimal)

    export = commands.add_parser("export", help="write a run's policy as a standalone model, with the adapter merged")
    export.add_argument("run", help="the run's folder or URI")
    export.add_argument("target", help="output folder")
    export.add_argument("--round", type=int, help="default: the last")
    export.set_defaults(command=_export)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="show what a run needs and where it goes, without starting anything",
        description=PLAN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_words(plan)
    plan.add_argument("--cluster", metavar="FILE", help="a file of Ray's cluster launcher, such as cluster.yaml")
    plan.add_argument("--nodes", type=int, help="number of identical nodes; default: 1")
    plan.add_argument("--gpus-per-node", type=int, help="default: 8, or 0 with device: cpu")
    plan.add_argument("--gpu-memory", type=float, metavar="GB", help="memory per GPU; default: that of --gpu, else 80")
    plan.add_argument("--gpu", help="A100-40, A100-80, H100 or H200; default: chosen by memory")
    plan.add_argument("--cpus-per-node", type=float)
    plan.add_argument("--host-memory", type=float, metavar="GB", help="memory of each node")
    plan.add_argument("--model-config", metavar="FILE", help="config.json of a model that is not on this machine")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(command=_plan)


def _add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", help="recipes, merged left to right, and overrides: section.key=value",
        metavar="RECIPE|KEY=VALUE",
    )  # fmt: skip


def _add_plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugins", nargs="+", default=[], metavar="PACKAGE", help="plug-in packages that may run, if the run uses one"
    )


def _add_on_bad_row(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-bad-row",
        choices=["refuse", "skip"],
        default="refuse",
        help="stop at bad rows (default), or skip them",
    )


def _add_vote_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=["strict", "released"],
        default="strict",
        help="rules for voting; default: strict",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of a recipe's section `preferences`"
    )
    parser.add_argument("--questions", help="questions of Parquet completions outside a run")
    parser.add_argument("--seed", type=int, default=0)
    _add_on_bad_row(parser)


def _align(options: argparse.Namespace) -> None:
    config = load_config(*split_words(options.words))
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

    show_plan(
        *split_words(options.words),
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


def _recipes(options: argparse.Namespace) -> None:
    from calm_ray.commands.recipes import list_recipes, print_recipe

    if options.name is None:
        list_recipes()
    else:
        print_recipe(options.name)


def _atlas(options: argparse.Namespace) -> None:
    from calm_ray.commands.atlas import write_atlas

    write_atlas(options.out, options.seed, options.languages)


def _keys(options: argparse.Namespace) -> None:
    from calm_ray.commands.keys import keys_as_markdown

    print(keys_as_markdown(), end="")


def _show(options: argparse.Namespace) -> None:
    from calm_ray.commands.show import show

    show(options.run, options.round, options.question, options.plugins)


def _evaluate(options: argparse.Namespace) -> None:
    from calm_ray.commands.evaluate import evaluate_policy

    evaluate_policy(options.run, options.questions, options.round, options.plugins)


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
