"""The paper's table for any runs, finished or not.

    python scripts/report.py outputs/sweep figures=outputs/sweep

Takes runs and directories of runs. Runs that differ in nothing but the seed share a line: mean ± standard error. With `figures=` the
validation losses and singular values are drawn into that directory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.analysis.runs import find_runs
from scripts.analysis.tables import grouped, make_table, report_columns
from scripts.command import UsageError, parse, run


def work(arguments: list[str]) -> int:
    """Print the table; draw if asked to."""
    places, options = parse(arguments, {"figures": ""})
    if not places:
        raise UsageError("name runs or directories of runs, such as outputs/sweep; see --help")
    groups = grouped(find_runs(places))
    drawn: list[Path] = []
    if options["figures"]:
        from scripts.analysis.figures import draw

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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
