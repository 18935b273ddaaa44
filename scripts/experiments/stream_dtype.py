"""What a residual stream of 16 bits costs in loss."""

from scripts.analysis.experiment_figures import heat_map
from scripts.analysis.runs import held_out_by_seed
from scripts.analysis.study import Experiment, Study
from scripts.analysis.tables import BEST, FINAL, STATUS, case

STREAM = "model.stream_dtype"


def difference(study: Study) -> str:
    """One sentence for each dtype of the products: how much the 16 bits of the stream change the final loss of each seed."""
    sentences = []
    for dtype in study.axes["dtype"]:
        by_stream = {stream: runs for (d, stream), runs in study.grouped("dtype", STREAM).items() if d == dtype}
        if {"float32", "bfloat16"} <= by_stream.keys():
            plain, rounded = (held_out_by_seed(by_stream[name]) for name in ("float32", "bfloat16"))
            found = ", ".join(f"{rounded[seed] - plain[seed]:+.1e}" for seed in plain if seed in rounded)
            if found:
                sentences.append(
                    f"With {dtype} products, the stream in bfloat16 changes the final loss by {found} nats."
                )
    return " ".join(sentences)


EXPERIMENT = Experiment(
    hypothesis="What does a residual stream in bfloat16 change? The demonstration in 100 steps; dtype= names the precision of the products.",
    base=("max_steps=100", "full_eval=false", "log.interval_spectra=null", "probe.interval=null"),
    axes={"dtype": "float32", STREAM: "float32,bfloat16"},
    columns=lambda study: [case("products", "dtype"), case("stream", STREAM), BEST, FINAL, STATUS],
    figures={"heat_map.png": lambda study, path: heat_map(study.groups, STREAM, "dtype", path)},
    remark=difference,
)
