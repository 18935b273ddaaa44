"""Is it the logits? The failing runs again, each with one remedy, and what that changed.

    python scripts/mechanism.py                                    All-DGram and Hetero-Inv, plain and with every remedy, one seed
    python scripts/mechanism.py remedies=none,qk_norm,norm_cap     some of them
    python scripts/mechanism.py seeds=1,2,3

Overrides of train.py may follow and concern every run. Options of this command: seeds= (1), assignments= (all_dgram,hetero_inv),
remedies= (all), workers= (2), output_dir= (outputs/mechanism), results= (results/mechanism). Finished runs are kept. A remedy counts as
having restored attention where at the end fewer than one row in twenty is saturated; what it did to the loss stands beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import UsageError, parse, run
from scripts.failure import ROOT, case_of, directory_of, last_probe, train_cases, write
from scripts.grid import Job
from scripts.runs import Run

REMEDIES = {
    "none": (),
    "qk_norm": ("attention=qk_norm",),
    "qk_clip": ("attention=qk_clip", "attention.qk_clip=20"),
    "soft_cap": ("attention=soft_cap", "attention.logit_cap=20"),
    "norm_cap": ("optim.muon.rule.norm_cap=2",),
    "decay": ("optim.muon.weight_decay=0.1",),
    "attention_lr": ("optim.muon.lr_scale={attn: 0.2}",),
    "head_blocks": ("optim.muon.blocks={c_attn: 12}",),
}
"""What is changed, by the name of the remedy; head_blocks cuts c_attn into queries, keys and values of each of four heads."""

HEALTHY_SATURATION = 0.05
OPTIONS = {
    "seeds": "1",
    "assignments": "all_dgram,hetero_inv",
    "remedies": ",".join(REMEDIES),
    "workers": 2,
    "output_dir": "outputs/mechanism",
    "results": "",
}
VARIED = [("assignment", "assignment"), ("remedy", "remedy")]


def jobs_of(overrides: Sequence[str], options: dict[str, str]) -> list[Job]:
    """One job for every combination, seed by seed."""
    jobs = []
    for name in options["remedies"].split(","):
        if name not in REMEDIES:
            raise UsageError(f"there is no remedy '{name}'; choose of {', '.join(REMEDIES)}")
    for seed in options["seeds"].split(","):
        for assignment in options["assignments"].split(","):
            for remedy in options["remedies"].split(","):
                case = {"assignment": assignment, "remedy": remedy, "seed": seed}
                settings = (f"assignment={assignment}", f"seed={seed}", *REMEDIES[remedy])
                overall = ("experiment=mechanism", "logger.mode=disabled")
                jobs.append(Job((*overall, *settings, *overrides), directory_of(Path(options["output_dir"]), case)))
    return jobs


def verdict(runs: Sequence[Run]) -> str:
    """One sentence for each assignment and seed: which remedies restored attention, which did not."""
    sentences = []
    for assignment in dict.fromkeys(case_of(r)["assignment"] for r in runs):
        found: dict[bool, dict[str, None]] = {True: {}, False: {}}
        for r in runs:
            case, saturated = case_of(r), last_probe(r, "greatest_saturation")
            if case["assignment"] == assignment and case["remedy"] != "none":
                healthy = saturated is not None and saturated < HEALTHY_SATURATION and r.unstable_step is None
                found[healthy][case["remedy"]] = None
        always = [name for name in found[True] if name not in found[False]]
        sentences.append(
            f"{assignment}: attention was restored by {', '.join(always) or 'nothing'}; not, or not with every seed, by "
            f"{', '.join(found[False]) or 'none'}."
        )
    return " ".join(sentences)


def work(arguments: list[str]) -> int:
    """Train, tabulate, draw, judge."""
    from scripts.probe_figures import story

    overrides, options = parse(arguments, OPTIONS)
    runs = train_cases(jobs_of(overrides, options), options["workers"])
    results = Path(options["results"] or ROOT / "results" / "mechanism")
    told = verdict(runs)
    print(write(runs, VARIED, "mechanism", results, ["python", "scripts/mechanism.py", *arguments], told))
    print(told)
    rows = {name: [r for r in runs if case_of(r)["remedy"] == name] for name in options["remedies"].split(",")}
    print(
        f"written: {story({k: v for k, v in rows.items() if v}, results / 'mechanism.png')}, mechanism.md, mechanism.json"
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
