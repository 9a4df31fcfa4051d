"""``pysupcon evaluate RUN``: run the evaluators on a finished run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pysupcon.commands import config_parser, program
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluators import EvaluationConfig
from pysupcon.reading import join_lists, list_options

if TYPE_CHECKING:  # importing it takes seconds, which --help does not need
    from pysupcon.trainer.run import Run


def main(arguments: Sequence[str]) -> int:
    """Print the table of results; return the exit status."""
    try:
        run, config = _parse(arguments)
        from pysupcon.evaluation.evaluate import evaluate_run, last_lines

        report = evaluate_run(run, config)
    except (RunError, ConfigError) as error:
        print(f"pysupcon evaluate: {error}", file=sys.stderr)
        return 1
    print(last_lines(report, run.dir))
    return 0


def _parse(arguments: Sequence[str]) -> tuple[Run, EvaluationConfig]:
    """The run, and its evaluation config with the overrides of the command line."""
    parser = config_parser(
        prog=f"{program()} evaluate",
        usage="%(prog)s RUN [--FIELD VALUE ...]",
        description="Run the evaluators on a finished run and write the results to RUN/evaluation "
        "(with --features projection: to RUN/evaluation-projection). "
        "The defaults are the values in the run's config.",
    )
    parser.add_argument("run_dir", type=str, help="folder of the run")
    parser.add_class_arguments(EvaluationConfig)
    arguments = join_lists(arguments, list_options(EvaluationConfig))
    run_dir = parser.parse_args(arguments).run_dir
    from pysupcon.trainer.run import open_run

    run = open_run(run_dir)
    parser.set_defaults(asdict(run.config.evaluation))
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
        fields = {name: value for name, value in parsed.items() if name != "run_dir"}
        # Arguments that the run's config holds for evaluators that are not asked for have no effect.
        fields["evaluator_args"] = {
            name: given
            for name, given in fields["evaluator_args"].items()
            if name in fields["evaluators"] or run.config.evaluation.evaluator_args.get(name) != given
        }
        return run, EvaluationConfig(**fields)
    except ValueError as error:
        raise ConfigError(str(error)) from error
