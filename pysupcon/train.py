"""Train: ``accelerate launch pysupcon/train.py --config configs/FILE.yaml [--FIELD VALUE ...]``.

Also under ``torchrun``, or as plain ``python pysupcon/train.py``. ``--help`` explains every field. Exit
status: 0 done; 1 the run cannot go on; 2 the config cannot run; 75 stopped as asked, to be resumed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

TRY_AGAIN = 75
"""sysexits.h: EX_TEMPFAIL."""

if __name__ == "__main__":
    # A file started by its path puts its folder first on sys.path: modules there would hide their namesakes.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]


def main(args: Sequence[str] | None = None) -> int:
    """Train and evaluate; returns the exit code. A mistake of the user's gives one line on stderr."""
    from pysupcon.config import parse_args
    from pysupcon.errors import ConfigError, Interrupted, RunError

    try:
        config, name = parse_args(args)
        from pysupcon.trainer.loop import train

        run_dir = train(config, name)
    except Interrupted as stopped:
        if _is_main():
            print(f"train.py: {stopped}", file=sys.stderr)
        # torchrun would take any other status for a failure and start the processes again
        return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else TRY_AGAIN
    except (ConfigError, RunError) as error:
        if _is_main() or getattr(error, "of_one_process", False):
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if config.evaluate and _is_main():
        from pysupcon.commands.evaluate import evaluate_run

        try:
            report = evaluate_run(run_dir)
        except (ConfigError, RunError) as error:
            print(
                f"train.py: error: the training is done ({run_dir}), its evaluation failed: {error}",
                file=sys.stderr,
            )
            return 1
        print(report.table())
        print(f"\nrun: {run_dir}")
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    if _is_main():
        print("train.py: starting ...", file=sys.stderr)  # imports take seconds
    sys.exit(main())
