"""The failure at small scale: who saturates the softmax, when, and does the loss break?

    python scripts/instability.py                        five assignments x both step rules x lr 0.05 and 0.1, one seed
    python scripts/instability.py seeds=1,2,3            three seeds: three times as long
    python scripts/instability.py optims=manifold_muon   our step rule only, which is the faster one
    python scripts/instability.py scale=instability_one_gpu workers=1
    python scripts/instability.py seeds=1,2,3 workers=0  nothing is trained: a table of the runs that have ended

Overrides of train.py may follow and concern every run. Options of this command: scale= (instability_small), seeds= (1), rates= (0.05,0.1),
optims= (paper,manifold_muon), assignments=, workers= (2), output_dir= (outputs/<scale>), results= (results/<scale>). Finished runs are
kept: the same command goes on where it stopped, and more seeds only add theirs. instability.png tells the story in one look.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import parse, run
from scripts.failure import ROOT, case_of, directory_of, train_cases, write
from scripts.grid import Job
from scripts.runs import Run

OPTIONS = {
    "scale": "instability_small",
    "seeds": "1",
    "rates": "0.05,0.1",
    "optims": "paper,manifold_muon",
    "assignments": "unconstrained,all_stiefel,all_dgram,hetero,hetero_inv",
    "workers": 2,
    "output_dir": "",
    "results": "",
}
STEP_RULES = {"paper": "published", "manifold_muon": "certified"}
VARIED = [("step rule", "optim"), ("lr", "lr"), ("assignment", "assignment")]


def jobs_of(overrides: Sequence[str], options: dict[str, str]) -> list[Job]:
    """One job for every combination, seed by seed, so that an interrupted grid has whole seeds."""
    parent, jobs = Path(options["output_dir"] or f"outputs/{options['scale']}"), []
    for seed in options["seeds"].split(","):
        for optim in options["optims"].split(","):
            for rate in options["rates"].split(","):
                for assignment in options["assignments"].split(","):
                    case = {"optim": optim, "lr": rate, "assignment": assignment, "seed": seed}
                    settings = (f"optim={optim}", f"optim.muon.lr={rate}", f"assignment={assignment}", f"seed={seed}")
                    fixed = (f"experiment={options['scale']}", "logger.mode=disabled")
                    jobs.append(Job((*fixed, *settings, *overrides), directory_of(parent, case)))
    return jobs


def story_rows(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by step rule and learning rate, for the picture."""
    rows: dict[str, list[Run]] = {}
    for r in runs:
        case = case_of(r)
        rows.setdefault(f"{STEP_RULES.get(case['optim'], case['optim'])}, lr {case['lr']}", []).append(r)
    return rows


def work(arguments: list[str]) -> int:
    """Train, tabulate, draw."""
    from scripts.probe_figures import story

    overrides, options = parse(arguments, OPTIONS)
    runs = train_cases(jobs_of(overrides, options), options["workers"])
    results = Path(options["results"] or ROOT / "results" / options["scale"])
    command = ["python", "scripts/instability.py", *arguments]
    print(write(runs, VARIED, "instability", results, command, ""))
    print(f"written: {story(story_rows(runs), results / 'instability.png')}, instability.md, instability.json")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
