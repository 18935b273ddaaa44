"""What a residual stream of 16 bits costs in loss."""

from scripts.analysis.experiment_figures import heat_map
from scripts.analysis.study import Experiment, Study
from scripts.analysis.tables import BEST, FINAL, STATUS, case

STREAM = "model.stream_dtype"


def difference(study: Study) -> str:
    """One sentence for each dtype of the products: how much the 16 bits of the stream change the final loss."""
    sentences = []
    for dtype in study.axes["dtype"]:
        by_stream = {stream: runs for (d, stream), runs in study.grouped("dtype", STREAM).items() if d == dtype}
        if {"float32", "bfloat16"} <= by_stream.keys():
            plain, rounded = (by_stream[name] for name in ("float32", "bfloat16"))
            pairs = [(a.final, b.final) for a, b in zip(plain, rounded) if a.final is not None and b.final is not None]
            found = ", ".join(f"{b - a:+.1e}" for a, b in pairs)
            sentences.append(f"With {dtype} products, the stream in bfloat16 changes the final loss by {found} nats.")
    return " ".join(sentences)


EXPERIMENT = Experiment(
    hypothesis="What does a residual stream in bfloat16 change? The demonstration in 100 steps; dtype= names the precision of the products.",
    base=("max_steps=100", "full_eval=false", "log.interval_spectra=null", "probe.interval=null"),
    axes={"dtype": "float32", STREAM: "float32,bfloat16"},
    columns=lambda study: [case("products", "dtype"), case("stream", STREAM), BEST, FINAL, STATUS],
    figures={"heat_map.png": lambda study, path: heat_map(study.groups, STREAM, "dtype", path)},
    remark=difference,
)
