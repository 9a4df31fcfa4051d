"""Train: ``accelerate launch pysupcon/train.py --config configs/FILE.yaml [--FIELD VALUE ...]``.

``torchrun`` and plain ``python pysupcon/train.py`` work too; one process needs no launcher. ``--help``
explains every field. Exit status: 0 the run is finished; 1 the run failed; 2 the config is not valid; 75 the
run was stopped and can be resumed; 130 Ctrl-C before the first step or during the evaluation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EX_TEMPFAIL = 75
"""Exit status of an interrupted run, from sysexits.h."""
EX_INTERRUPTED = 130
"""Exit status after Ctrl-C, as in a shell."""

if __name__ == "__main__":
    # Python puts the folder of a script first on sys.path. Modules in it would shadow others of the same
    # name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]


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
        from pysupcon.evaluation.evaluate import evaluate_run

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
        print(report.table())
        print(f"\nrun: {run_dir}")
    return 0


def _report_to_torchrun(error: Exception) -> None:
    """Put the message into the summary that torchrun prints at the end."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        further = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": str(error), "extraInfo": further}})
        Path(file).write_text(text, encoding="utf-8")


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    if _is_main():
        print("train.py: starting ...", file=sys.stderr)  # the imports take seconds
    sys.exit(main())
