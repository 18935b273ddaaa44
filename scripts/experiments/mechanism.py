"""The failing runs again, each with one remedy."""

from scripts.analysis.experiment_figures import warning_signs
from scripts.analysis.study import Experiment, Study
from scripts.analysis.tables import ATTENTION_COLUMNS, ATTENTION_REMARK, case

HEALTHY = 0.05  # share of saturated rows at the end below which attention counts as restored
REMEDIES = {
    "none": (),
    "qk_norm": ("attention=qk_norm",),
    "qk_clip": ("attention=qk_clip", "attention.qk_clip=20"),
    "soft_cap": ("attention=soft_cap", "attention.logit_cap=20"),
    "norm_cap": ("optim.muon.rule.norm_cap=2",),
    "decay": ("optim.muon.weight_decay=0.1",),
    "attention_lr": ("optim.muon.lr_scale={attn: 0.2}",),
    "head_blocks": ("optim.muon.blocks={c_attn: 12}",),  # separate queries, keys and values for each of four heads
}
WORDS = {
    "none": "no remedy",
    "qk_norm": "norm of queries\nand keys",
    "qk_clip": "clip of queries\nand keys at 20",
    "soft_cap": "logits capped\nat 20",
    "norm_cap": "singular values\ncapped at 2",
    "decay": "weight decay 0.1",
    "attention_lr": "learning rate of\nattention × 0.2",
    "head_blocks": "a step for\nevery head",
}
"""The remedies in the words of the picture."""


def verdict(study: Study) -> str:
    """One sentence for each assignment: which remedies restored attention, which did not."""
    sentences = [ATTENTION_REMARK]
    for assignment in study.axes["assignment"]:
        found: dict[bool, list[str]] = {True: [], False: []}
        for (name, remedy), runs in study.grouped("assignment", "remedy").items():
            if name == assignment and remedy != "none":
                last = [r.last_probe("greatest_saturation") for r in runs if r.unstable_step is None]
                healthy = len(last) == len(runs) and all(x is not None and x < HEALTHY for x in last)
                found[healthy].append(remedy)
        restored, others = (", ".join(names) for names in (found[True], found[False]))
        sentences.append(
            f"{assignment}: attention was restored by {restored or 'nothing'}; not, or not with every seed, by {others or 'none'}."
        )
    return " ".join(sentences)


EXPERIMENT = Experiment(
    hypothesis="Is it the logits? The failing runs of instability_small again, each with one suspected cause removed.",
    base=("experiment=mechanism",),
    axes={"assignment": "all_dgram,hetero_inv", "remedy": REMEDIES},
    columns=lambda study: [case("assignment", "assignment"), case("remedy", "remedy"), *ATTENTION_COLUMNS],
    figures={
        "mechanism.png": lambda study, path: warning_signs(
            {WORDS[key]: runs for (key,), runs in study.grouped("remedy").items()}, path
        )
    },
    remark=verdict,
)
