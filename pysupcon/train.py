"""Train: ``accelerate launch pysupcon/train.py --config configs/FILE.yaml [--FIELD VALUE ...]``, or in Python
with :func:`run`.

``torchrun`` and plain ``python pysupcon/train.py`` work too; one process needs no launcher. ``--help``
explains every field. Exit status: 0 the run is finished; 1 the run failed; 2 the config is not valid; 75 the
run was stopped and can be resumed; 130 Ctrl-C before the first step or during the evaluation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from pysupcon.config import Config
    from pysupcon.reports.report import Report
    from pysupcon.trainer.run import Run

EX_TEMPFAIL = 75
"""Exit status of an interrupted run, from sysexits.h."""
EX_INTERRUPTED = 130
"""Exit status after Ctrl-C, as in a shell."""

if __name__ == "__main__":
    # Python puts the folder of a script first on sys.path. Modules in it would shadow others of the same
    # name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]


@dataclass(frozen=True)
class FinishedRun:
    """Result of :func:`run`.

    Attributes:
        dir: folder of the run.
        run: reads config, data, trained model and log; ``run.model.backbone(images)`` gives embeddings.
        report: results of the evaluators; None on other processes than the first, and without evaluation.
    """

    dir: Path
    run: Run
    report: Report | None

    @property
    def metrics(self) -> dict[str, float]:
        """The values of the report by name; empty without a report, as on all processes of a launcher but the
        first."""
        return (
            {}
            if self.report is None
            else {name: metric.value for name, metric in self.report.metrics.items()}
        )


def run(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    dataset: Any = None,
    model: nn.Module | Mapping[str, Any] | str | None = None,
    evaluators: Any = None,
    **fields: Any,
) -> FinishedRun:
    """Train and evaluate, from a program of your own. Every process of a launcher calls it.

    The config of the run records the classes of passed objects. Pass them again to resume the run, and to
    :func:`pysupcon.trainer.run.load_run` or :func:`pysupcon.evaluation.evaluate.evaluate_run`.

    Args:
        config: a config, a mapping of its fields, a YAML file, or the name of an example config, such as
            mnist_coarse_spread; None means the defaults.
        dataset: a map-style dataset of (image, label), (image, coarse, fine) or dicts, or a mapping of train,
            val and test to such datasets; see :mod:`pysupcon.data.own`. It replaces ``data.dataset``. A str
            is the value of that field.
        model: backbone: maps images [B, C, S, S] to embeddings [B, D]; trained in place, from its present
            weights. It replaces ``model.backbone``. A mapping holds fields of the section instead,
            and a str is the value of that field.
        evaluators: the evaluators that run after the training: names, references, and objects as
            :class:`pysupcon.evaluators.OwnEvaluator` describes them. They replace ``evaluation.evaluators``.
        **fields: fields that override ``config``, e.g. ``trainer={"epochs": 3}``, ``seed=1``,
            ``**{"loss.name": "sincere"}``, ``resume_from_checkpoint="latest"``.

    Returns:
        The run and its results.

    Raises:
        ConfigError: the config is not valid.
        RunError: the training or the evaluation failed.
        Interrupted: the training was stopped, and a checkpoint has been written.
    """
    from pysupcon import user_code
    from pysupcon.config import config_of
    from pysupcon.trainer.loop import train
    from pysupcon.trainer.run import Run
    from pysupcon.trainer.setup import own_accelerator_state

    passed: dict[str, Any] = {}
    own: dict[str, Any] = {}
    if isinstance(model, Mapping):
        fields, model = {**fields, "model": model}, None
    for field_name, value in (("data.dataset", dataset), ("model.backbone", model)):
        if value is not None:
            own[field_name] = value if isinstance(value, str) else next(iter(user_code.name_objects([value])))
    dataset = None if isinstance(dataset, str) else dataset
    model = None if isinstance(model, str) else model
    if evaluators is not None:
        from pysupcon.evaluators import names_and_objects

        own["evaluation.evaluators"], passed = names_and_objects(evaluators)
    made = config_of(config, {**fields, **own})
    path = isinstance(config, (str, Path))
    of_data = "own-data" if dataset is not None else made.data.dataset
    name = Path(str(config)).stem if path else f"{made.loss.name}-{of_data}"
    with own_accelerator_state():
        folder = train(made, name, dataset=dataset, model=model, evaluators=passed)
    report = None
    finished = Run(folder, made, model, dataset)
    if made.evaluate and not made.trainer.dry_run and _is_main():
        from pysupcon.evaluation.evaluate import evaluate_run

        report = evaluate_run(finished, evaluators=evaluators or ())
    return FinishedRun(folder, finished, report)


def main(args: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Train and evaluate; return the exit status. A :class:`ConfigError`, a :class:`RunError` or a file that
    cannot be read or written is printed as one line on stderr.

    Args:
        args: the command line; None means ``sys.argv[1:]``.
        program: name of the program in the help text.
    """
    from pysupcon.errors import missing_extra

    try:
        return _train_and_evaluate(args, program)
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        if _is_main():
            print(f"train.py: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # during the training pysupcon.trainer.stop handles it
        if _is_main():
            print("train.py: stopped by Ctrl-C (SIGINT) before the first step", file=sys.stderr)
        return EX_INTERRUPTED


def _train_and_evaluate(args: Sequence[str] | None, program: str) -> int:
    from pysupcon.config import parse_args
    from pysupcon.errors import ConfigError, Interrupted, RunError

    try:
        config, name = parse_args(args, program)
        from pysupcon.trainer.loop import train

        run_dir = train(config, name)
    except Interrupted as stopped:
        if _is_main():
            print(f"train.py: {stopped}", file=sys.stderr)
        # torchrun treats any other status as a failure and restarts the processes.
        return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else EX_TEMPFAIL
    except (ConfigError, RunError) as error:
        if _is_main() or getattr(error, "on_one_process", False):
            print(f"train.py: error: {error}", file=sys.stderr)
        _report_to_torchrun(error)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"train.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    if config.evaluate and not config.trainer.dry_run and _is_main():
        from pysupcon.evaluation.evaluate import evaluate_run, last_lines

        try:
            report = evaluate_run(run_dir)
        except (ConfigError, RunError, OSError) as error:
            print(
                f"train.py: error: the training is done ({run_dir}), its evaluation failed: {error}",
                file=sys.stderr,
            )
            return 1
        except KeyboardInterrupt:
            print(
                f"train.py: the training is done ({run_dir}), its evaluation was stopped by Ctrl-C (SIGINT); "
                f"python -m pysupcon evaluate {run_dir} repeats it",
                file=sys.stderr,
            )
            return EX_INTERRUPTED
        print(f"\n{last_lines(report, run_dir)}")
    return 0


def _report_to_torchrun(error: Exception) -> None:
    """Put the message into the summary that torchrun prints at the end."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        further = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": str(error), "extraInfo": further}})
        Path(file).write_text(text, encoding="utf-8")


def _is_main() -> bool:
    # RANK counts only together with WORLD_SIZE: other tools set it, too.
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    if _is_main():
        print("train.py: starting ...", file=sys.stderr)  # the imports take seconds
    sys.exit(main())
