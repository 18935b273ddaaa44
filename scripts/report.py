"""Print the paper's table for any runs, finished or not, and write one page that shows everything they recorded.

    python scripts/report.py outputs/sweep                            the table, and outputs/sweep/report.html
    python scripts/report.py outputs/sweep page=sweep.html            another file; page=none: no page
    python scripts/report.py outputs/sweep figures=outputs/sweep      also pictures, for a paper
    python scripts/report.py outputs/sweep live=true port=8000        the page while the runs train, on this machine only

Name runs, or directories that hold runs. Runs that differ only in the seed share a line: mean ± standard error. The page needs nothing but
a browser: verdict, curves, singular values, attention, learned scales, cost, settings. figures= names a directory for pictures of the
validation losses, of the singular values and of the learned scales.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scripts.analysis.figures import draw
from scripts.analysis.runs import find_runs
from scripts.analysis.tables import Groups, grouped, make_table, report_columns
from scripts.command import UsageError, command_line, parse, problems_of_options, refuse, run, without_effect
from training.files import write_whole

OPTIONS = {"figures": "", "page": "", "live": False, "port": 8000}
RELOAD_S = 5.0  # how often a live page asks for news
NO_LIBRARY = "no page: it needs bokeh; install it with: pip install bokeh"


def work(arguments: list[str]) -> int:
    """Print the table, write the page, and draw the pictures if figures= is given; or serve the page."""
    places, options = parse(arguments, OPTIONS, problems_of_options)
    if not places:
        raise UsageError("name runs or directories of runs, such as outputs/sweep; see --help")
    command = command_line("report.py", *arguments)
    reasons = {"port": "it is for live=true"}
    if options["live"]:
        written = ("figures",) if options["page"] == "none" else ("figures", "page")
        reasons = dict.fromkeys(written, "live=true serves the page and writes no file")
    refuse(without_effect(arguments, reasons))
    if options["live"]:
        return live(places, command, options["port"])
    groups = grouped(find_runs(places))
    files: list[Path] = []
    if options["figures"]:
        try:
            files = draw(groups, Path(options["figures"]))
        except OSError as error:
            raise UsageError(
                f"figures={options['figures']} cannot be written ({error}); name another directory"
            ) from error
    print(make_table(groups, report_columns(groups)).text())
    if options["page"] != "none" and has_library():
        files.append(write_page(groups, places, options["page"], command))
    elif options["page"] != "none":
        print(NO_LIBRARY, file=sys.stderr)
    for path in files:
        print(f"written: {path}")
    return 0


def has_library() -> bool:
    """Whether the library that draws the page is installed."""
    return importlib.util.find_spec("bokeh") is not None


def write_page(groups: Groups, places: Sequence[str], page: str, command: str) -> Path:
    """Write the page to the file `page`, or if that is empty into the first place."""
    from scripts.analysis.page.page import make  # needs the library

    path = Path(page) if page else Path(places[0]) / "report.html"
    try:
        write_whole(path, make(groups, name_of(places), command))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error}); name another file with page=, or page=none") from error
    return path


def name_of(places: Sequence[str]) -> str:
    """The name of what is reported: that of the places' directories."""
    return ", ".join(dict.fromkeys(Path(place).resolve().name for place in places))


def live(places: Sequence[str], command: str, port: int) -> int:
    """Serve the page of runs that are training until interrupted."""
    if not has_library():
        raise UsageError(NO_LIBRARY)
    from scripts.analysis.page.live import serve
    from scripts.analysis.page.page import make

    find_runs(places)  # so that a wrong place is said here
    serve(places, lambda: make(grouped(find_runs(places)), name_of(places), command, RELOAD_S), port)
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
