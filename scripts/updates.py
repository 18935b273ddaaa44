"""Print how far a run's steps moved each parameter and its features, each in its own norm.

    python train.py log.interval_updates=25 output_dir=outputs/first
    python scripts/updates.py outputs/first
    python scripts/updates.py outputs/first step=100

Name one run or more. step= chooses the records; 0 takes the last.
"""

from __future__ import annotations

import sys
from functools import partial

from scripts.analysis.runs import find_runs
from scripts.analysis.updates import update_table
from scripts.command import UsageError, parse, run


def work(arguments: list[str]) -> int:
    """Print a table for each run."""
    places, options = parse(arguments, {"step": 0})
    if not places:
        raise UsageError("name runs or directories of runs, such as outputs/first; see --help")
    for found in find_runs(places):
        try:
            print(update_table(found, options["step"] or None).text())
        except LookupError as error:
            raise UsageError(str(error)) from error
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
