"""Train: ``accelerate launch pysupcon/train.py --config configs/FILE.yaml [--FIELD VALUE ...]``.

Also under ``torchrun``, or as plain ``python pysupcon/train.py``. ``--help`` explains every field.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # A file started by its path puts its folder first on sys.path: modules there would hide their namesakes.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]


def main(args: Sequence[str] | None = None) -> int:
    """Train and evaluate; returns the exit code. A mistake of the user's gives one line on stderr."""
    from pysupcon.config import parse_args
    from pysupcon.errors import ConfigError, RunError

    try:
        config, name = parse_args(args)
        from pysupcon.trainer.loop import train

        run_dir = train(config, name)
    except (ConfigError, RunError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if config.evaluate and os.environ.get("RANK", "0") == "0":
        from pysupcon.evaluation import evaluate_run

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


if __name__ == "__main__":
    sys.exit(main())
