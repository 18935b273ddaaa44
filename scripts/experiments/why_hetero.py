"""Why attention and MLP ask for different manifolds."""

from scripts.analysis.contest import REMARK
from scripts.analysis.hetero import CASES, Route, draw_why, measured, pairs, sums, why_tables
from scripts.analysis.search import Axis, Search
from scripts.analysis.study import Case, Experiment, Study
from scripts.analysis.tables import FINAL

# The assignments, each at its own best settings, and the first rates of their searches.
RATES = {"unconstrained": 0.05, "all_stiefel": 0.1, "all_dgram": 0.05, "hetero": 0.1, "hetero_inv": 0.05}
RULES = {  # what is on DGram, the rest on Stiefel; all at the best settings of Hetero
    "nothing": "attn: stiefel, mlp: stiefel",
    "c_fc": "attn: stiefel, mlp.c_fc: dgram, mlp.c_proj: stiefel",
    "mlp_c_proj": "attn: stiefel, mlp.c_fc: stiefel, mlp.c_proj: dgram",
    "mlp_0-1": "attn: stiefel, h.0-1.mlp: dgram, h.2-3.mlp: stiefel",
    "mlp_2-3": "attn: stiefel, h.0-1.mlp: stiefel, h.2-3.mlp: dgram",
    "mlp_and_c_attn": "attn.c_attn: dgram, attn.c_proj: stiefel, mlp: dgram",
    "mlp_and_attn_c_proj": "attn.c_attn: stiefel, attn.c_proj: dgram, mlp: dgram",
    "mlp_and_attn_0-1": "h.0-1.attn: dgram, h.2-3.attn: stiefel, mlp: dgram",
    "mlp_and_attn_2-3": "h.0-1.attn: stiefel, h.2-3.attn: dgram, mlp: dgram",
    "all": "attn: dgram, mlp: dgram",
}
EXCHANGES = {name: ("assignment=custom", f"assignment.rules={{{rules}}}") for name, rules in RULES.items()}
UNIT_LENGTH = ("init.weight_scale=3.125", "init.residual_scale=8.839")  # at width 64
CONTROLS = {  # what they are, and how: Stiefel at sizes that DGram reaches, and DGram from the lengths at which Stiefel starts
    "mlp_radius_1.5": ("all on Stiefel, MLP of radius 1.5", "assignment=all_stiefel", "optim.muon.radius={mlp: 1.5}"),
    "mlp_radius_2.5": ("all on Stiefel, MLP of radius 2.5", "assignment=all_stiefel", "optim.muon.radius={mlp: 2.5}"),
    "mlp_from_unit_length": ("Hetero, columns of the MLP start at length 1", "assignment=hetero", *UNIT_LENGTH),
}
WORDS = {name: words for name, (words, *_) in CONTROLS.items()}
SETTINGS = {**EXCHANGES, **{name: tuple(overrides) for name, (_, *overrides) in CONTROLS.items()}}
MLP = pairs({"mlp.c_fc": "c_fc", "mlp.c_proj": "mlp_c_proj"}, {"h.0-1.mlp": "mlp_0-1", "h.2-3.mlp": "mlp_2-3"})
ATTENTION = pairs(
    {"attn.c_attn": "mlp_and_c_attn", "attn.c_proj": "mlp_and_attn_c_proj"},
    {"h.0-1.attn": "mlp_and_attn_0-1", "h.2-3.attn": "mlp_and_attn_2-3"},
)
ROUTES = [Route("nothing", "hetero", MLP, WORDS), Route("hetero", "all", ATTENTION, {})]


def searched(study: Study, case: Case) -> list[Axis]:
    """Learning rate and weight decay of the matrices. On All-Stiefel no decay acts."""
    axes = [Axis("optim.muon.lr", RATES[case["setting"]]), Axis("optim.muon.weight_decay", 0.1, 4.0)]
    return axes[: 1 if case["setting"] == "all_stiefel" else 2]


EXPERIMENT = Experiment(
    hypothesis="Why do attention and MLP ask for different manifolds, and which layers make the difference of the losses?",
    base=("experiment=why_hetero",),
    axes={"setting": {**{name: (f"assignment={name}",) for name in RATES}, **SETTINGS}},
    search=Search(searched, of=lambda case: case if case["setting"] in RATES else {"setting": "hetero"}),
    seeds="1,2,3",
    options={"trials": 5, "search_seeds": "0,11,12"},
    workers=1,
    columns=lambda study: [*CASES, FINAL],
    measure=lambda study: {"matrices": measured(study)},
    tables=lambda study: why_tables(study, list(RATES), ROUTES),
    figures={"why.png": lambda study, path: draw_why(study, list(RATES), ROUTES, path)},
    remark=lambda study: f"{sums(study, ROUTES)} {REMARK}",
)
