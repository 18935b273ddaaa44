"""How many fewer steps does nGPT need than GPT?"""

from scripts.analysis.contest import contest_table, cost_remark, costs
from scripts.analysis.figures import draw_scales
from scripts.analysis.search import Axis, Search
from scripts.analysis.speed_up import Race, context_table, losses_beyond, speed_table, steps_picture
from scripts.analysis.study import Case, Experiment, Study
from scripts.analysis.tables import HELD_OUT, STATUS, Table, case

CONTEXT = "model.block_size"
ARMS = {"GPT": ("model=ngpt_baseline",), "nGPT": ("model=ngpt_demo", "schedule.warmup_steps=0")}
RATES = {"GPT": 4e-3, "nGPT": 3.2e-2}  # of the first trial
RACE = Race("GPT", "nGPT", CONTEXT)
PROBED = 1024  # the longest context whose attention a probe computes explicitly


def shape(study: Study, case: Case) -> list[str]:
    """The same tokens in a step and in an evaluation at every context, in one micro-batch; five probes up to the context PROBED."""
    tokens, context, steps = study.options["tokens"], int(case[CONTEXT]), int(case["max_steps"])
    windows = max(1, tokens // context)
    probed = max(1, steps // 4) if context <= PROBED else "null"
    sizes = {"global_batch_tokens": windows * context, "micro_batch_size": windows, "eval_windows": 16 * windows}
    return [*(f"{key}={value}" for key, value in sizes.items()), f"probe.interval={probed}"]


def tables(study: Study) -> list[Table]:
    """The speed-up, the losses beyond the context of training, and every case with its best rate."""
    columns = [case("context", CONTEXT), case("steps", "max_steps"), case("model", "arm"), HELD_OUT, STATUS]
    longest = study.around["max_steps"]
    every = contest_table(
        study, columns, {f"GPT at {longest} steps": lambda case: {"arm": "GPT", "max_steps": longest}}
    )
    return [speed_table(study, RACE), context_table(study, RACE), every]


EXPERIMENT = Experiment(
    hypothesis="How many steps does nGPT need for the final loss of GPT, each at its best rate, and does the context matter?\n"
    "A run whose schedule is not finished is behind, so the speed-up is read from shorter runs of nGPT whose schedules are finished.",
    base=("experiment=ngpt_speed",),
    axes={"arm": ARMS, CONTEXT: "256,1024,4096", "max_steps": "50,100,200"},
    around={"arm": "nGPT", "max_steps": "200"},
    search=Search(lambda study, case: [Axis("optim.adamw.lr", RATES[case["arm"]])]),
    seeds="1,2,3",
    options={"trials": 4, "further_trials": 4, "tokens": 4096},
    derived=shape,
    measure=lambda study: {"costs": costs(study, "arm", CONTEXT), "beyond": losses_beyond(study, RACE)},
    tables=tables,
    figures={
        "steps.png": lambda study, path: steps_picture(study, RACE, path),
        "scales.png": lambda study, path: draw_scales(RACE.longest(study, "nGPT"), path),
    },
    remark=lambda study: cost_remark(),
)
