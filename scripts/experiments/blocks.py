"""Cutting c_attn into blocks, at equal length of step and not."""

from scripts.analysis.experiment_figures import heat_map
from scripts.analysis.study import Experiment
from scripts.analysis.tables import ASSIGNMENT, BEST, FINAL, SIGMA_ATTENTION, STATUS, case

QKV, HEADS, TOGETHER = (
    "optim.muon.blocks={c_attn: 3}",
    "optim.muon.blocks={c_attn: 12}",
    "optim.muon.block_length=whole",
)
CUTS = {
    "uncut": (),
    "uncut_longer": ("optim.muon.lr_scale={c_attn: 1.7320508}",),  # as long as blocks of which each steps like a matrix
    "qkv_each": (QKV,),
    "qkv_whole": (QKV, TOGETHER),
    "heads_each": (HEADS,),  # queries, keys and values of each of four heads
    "heads_whole": (HEADS, TOGETHER),
}

EXPERIMENT = Experiment(
    hypothesis="What does a cut of c_attn do that a longer step does not?\n"
    "Blocks of which each steps as far as a matrix move c_attn √3 times as far as no cut, in root mean square; block_length=whole undoes it.",
    base=("experiment=solver_sweep", "probe.interval=null"),
    axes={"assignment": "unconstrained,all_stiefel", "cut": CUTS},
    seeds="1,2",
    columns=lambda study: [
        ASSIGNMENT,
        case("cut", "cut"),
        BEST,
        FINAL,
        SIGMA_ATTENTION,
        STATUS,
    ],
    figures={"losses.png": lambda study, path: heat_map(study.groups, "assignment", "cut", path)},
    remark=lambda study: (
        "`each` and `uncut_longer` move c_attn equally far, `whole` and `uncut` too. No case is at its own best rate."
    ),
)
