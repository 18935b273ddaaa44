"""Print the paper's table for any runs, finished or not.

    python scripts/report.py outputs/sweep figures=outputs/sweep

Name runs, or directories that hold runs. Runs that differ only in the seed share a line: mean ± standard error. figures= names a directory
for pictures of the validation losses and of the singular values.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from scripts.analysis.figures import draw
from scripts.analysis.runs import find_runs
from scripts.analysis.tables import grouped, make_table, report_columns
from scripts.command import UsageError, parse, run


def work(arguments: list[str]) -> int:
    """Print the table, and draw the pictures if figures= is given."""
    places, options = parse(arguments, {"figures": ""})
    if not places:
        raise UsageError("name runs or directories of runs, such as outputs/sweep; see --help")
    groups = grouped(find_runs(places))
    drawn: list[Path] = []
    if options["figures"]:
        try:
            drawn = draw(groups, Path(options["figures"]))
        except OSError as error:
            raise UsageError(
                f"figures={options['figures']} cannot be written ({error}); name another directory"
            ) from error
    print(make_table(groups, report_columns(groups)).text())
    for path in drawn:
        print(f"written: {path}")
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
