"""Training steps on random tokens: their rate and memory by assignment, their operations, and the cost of a probe.

`scripts/bench.py train`, `profile` and `probes` run this module. A step is forward, backward, clipping and update, as in train.py. It is
compiled and in bfloat16 on CUDA, plain float32 on a CPU. On CUDA the host runs ahead of the device: some steps are timed together, with one
wait at their end. The time of the update alone is then that of the device, from the moment at which it has the gradients.
"""

from __future__ import annotations

import statistics
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from model.gpt import GPT
from model.probes import probe
from model.spectra import Spectra
from scripts.command import UsageError, refuse
from scripts.timing import NOT_MEASURED, Rows, device, median, note_failure, peak_bytes, steps_together, take_turns
from training.attention import choose
from training.average import Average, average_of
from training.build import build_optimizers, gpt_config
from training.capture import WARM_UP, CudaGraphs
from training.config import compose
from training.library import tensors_of
from training.machine import compiled, peak_flops, resolve_device
from training.optimizers import Optimizers
from training.phases import Phases
from training.settings import Settings
from training.signals import Stopped
from training.step import accumulate, clip
from training.trace import activities, longest_operations
from training.validate import problems_of_capture

_TRACED_STEPS = 2  # how many steps a trace shows, if the command line does not say

UNTRAINED = ["optim.muon.lr=0.01"]
"""Settings for steps of an untrained model. At the default rate, which is twice as large, the columns of its mlp.c_proj are so short that
they ask for a second round of the retraction."""


class RandomTraining:
    """The model of a configuration in training on random tokens.

    micro: windows of one forward pass. windows: how many windows a step has.
    """

    def __init__(self, cfg: Settings, micro: int, tokens: int) -> None:
        """tokens: of a step; they are rounded down to whole micro-batches, but not below one."""
        self.cfg, self.micro, self.device, block = cfg, micro, device(), cfg.model.block_size
        self.windows = max(1, tokens // block // micro) * micro
        with self.device:
            self.model = GPT(gpt_config(cfg))
        self.attention = choose(cfg, self.device, micro)
        self.model.attend_by(self.attention.backend, self.attention.dtype)
        _, dtype = resolve_device(cfg)
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        self.replica = compiled(self.model, cfg, self.device)
        self.batch = torch.randint(cfg.model.vocab_size, (self.windows, block + 1)).numpy().astype("uint16")
        self.updates: list[Phases] = []  # the phase of each update so far

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.windows * self.cfg.model.block_size

    @cached_property
    def optimizers(self) -> Optimizers:
        """The optimizers of the configuration."""
        optimizers = build_optimizers(self.model, self.cfg, self.model.unit_vectors())
        if self.cfg.capture:
            optimizers.capture(CudaGraphs(self.device))
        return optimizers

    @cached_property
    def average(self) -> Average | None:
        """The average of the weights, if the configuration has one."""
        return average_of(self.cfg.average, self.model)

    def forward(self) -> Tensor:
        """The loss of the first micro-batch, 0-d."""
        windows = torch.from_numpy(self.batch[: self.micro].astype("int64")).to(self.device)
        with self.autocast:
            return self.replica(windows[:, :-1], windows[:, 1:])[1]

    def gradients(self) -> Tensor:
        """Compute and clip the gradients of a step; returns their norm, 0-d."""
        accumulate(self.replica, self.batch, self.micro, self.device, self.autocast)
        return clip([p.grad for p in self.model.parameters()], self.cfg.grad_clip)[0]

    def step(self) -> None:
        """One training step, without a wait for the device."""
        skip = ~self.gradients().isfinite()
        phase = Phases(self.device)
        with phase("optimizer"):
            self.optimizers.step(skip=skip)
            self.model.clip_logits(skip)
            if self.average:
                self.average.update(skip)
        self.updates.append(phase)
        self.optimizers.zero_grad()

    def update_seconds(self) -> list[float]:
        """Seconds of the update alone in every step since the last call. Waits for the device."""
        found, self.updates = [phase.read()["optimizer"] for phase in self.updates], []
        return found

    def tensors(self) -> list[Tensor]:
        """The tensors that are kept between two steps."""
        states = [t for o in self.optimizers for t in tensors_of(o.state)]
        states += tensors_of(self.average.means) if self.average else []
        return [*self.model.parameters(), *self.model.buffers(), *states]


def training_of(cfg: Settings, options: dict[str, Any]) -> RandomTraining:
    """A configuration in training, with the micro-batch size and the tokens of the command line."""
    return RandomTraining(
        cfg, options["micro_batch_size"] or (32 if torch.cuda.is_available() else 2), options["tokens"]
    )


def trainings_by_assignment(options: dict[str, Any]) -> dict[tuple[str, str, str], RandomTraining]:
    """(assignment, optim, variant) → its training. AdamW has no step rule: its optim is "-", and it occurs once for each variant.

    The option `variants` names overrides of train.py; each is a variant, besides "-", which has none.
    """
    found = {}
    for variant in ["-", *filter(None, options["variants"].split(","))]:
        for optim in options["optims"].split(","):
            for assignment in options["assignments"].split(","):
                key = (assignment, "-" if assignment == "adamw" else optim, variant)
                if key not in found:
                    overrides = [f"model={_size(options)}", f"assignment={assignment}", f"optim={optim}", *UNTRAINED]
                    cfg = compose([*overrides, *([variant] if variant != "-" else [])])
                    refuse(problems_of_capture(cfg))
                    if cfg.batches.documents:
                        raise UsageError(f"{variant} cannot be measured: the random tokens are no documents")
                    found[key] = training_of(cfg, options)
    return found


def _size(options: dict[str, Any]) -> str:
    return options["model"] or ("gpt2_124m" if torch.cuda.is_available() else "mini")


def training_rows(options: dict[str, Any]) -> Rows:
    """Some steps of every assignment, by turns; then one step of each for its memory."""
    trainings = trainings_by_assignment(options)
    steps, together = {key: training.step for key, training in trainings.items()}, steps_together()
    times = take_turns(steps, options["repeats"] or 5, WARM_UP + 1, options["limit_s"], together=together)
    peak = peak_flops(device())
    rows = []
    for (assignment, optim, variant), training in trainings.items():
        seconds = times[assignment, optim, variant]
        row: dict[str, Any] = {"assignment": assignment, "optim": optim, "variant": variant, "model": _size(options)}
        row |= {"attention": training.attention.backend or "-", "tokens a step": training.tokens}
        row |= dict.fromkeys(("tokens/s", "MFU", "optimizer s", "optimizer share"), NOT_MEASURED)
        row |= {"step s": median(seconds), "peak GiB": NOT_MEASURED, "all s": seconds}
        if seconds:
            rate = training.tokens / row["step s"]
            row |= {"tokens/s": rate, "MFU": rate * training.model.flops_per_token() / peak if peak else "n/a"}
        rows.append(row)

    def read_update(row: dict[str, Any], key: tuple[str, str, str]) -> None:
        update = statistics.median(trainings[key].update_seconds()[-len(times[key]) * together :])
        row |= {"optimizer s": update, "optimizer share": update / row["step s"]}

    def measure_memory(row: dict[str, Any], key: tuple[str, str, str]) -> None:
        training = trainings[key]
        # A graph keeps memory of its own, which is not told apart from that of the others.
        most = None if training.cfg.capture else peak_bytes(training.step, training.tensors())
        row["peak GiB"] = "n/a" if most is None else most / 2**30

    with suppress(Stopped):  # what is known already comes first
        for complete in (read_update, measure_memory):
            for row, key in zip(rows, trainings):
                try:
                    if times[key]:
                        complete(row, key)
                except Exception:
                    note_failure(key)
    return rows


def profile_rows(options: dict[str, Any]) -> Rows:
    """The operations of a step that take longest, by torch.profiler, over `repeats` steps. The traces are written to the folder `traces`."""
    rows: Rows = []
    steps = options["repeats"] or _TRACED_STEPS
    with suppress(Stopped):
        for (assignment, optim, _), training in trainings_by_assignment(options | {"variants": ""}).items():
            try:
                rows += traced(training, {"assignment": assignment, "optim": optim}, options["traces"], steps)
            except Exception:
                note_failure((assignment, optim))
    return rows


def traced(training: RandomTraining, names: dict[str, Any], folder: str, steps: int) -> Rows:
    """The longest operations of so many steps, a row each, which begins with `names`. The trace goes to the folder, if one is named."""
    for _ in range(3):
        training.step()
    with profile(activities=activities(training.device)) as profiler:
        for _ in range(steps):
            training.step()
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        word = "_".join(names.values()).rstrip("_-")
        profiler.export_chrome_trace(str(Path(folder) / f"trace_{word}.json.gz"))
    rows = longest_operations(profiler, steps, training.device)
    return [{**names, **row, "operation": row["operation"].replace("|", "/")} for row in rows]


def probe_rows(options: dict[str, Any]) -> Rows:
    """One probe, all spectra, and forward, backward and clipping of some tokens, scaled to a step of experiment=paper.

    The update is left out, so the shares are overstated. Of the spectra, training waits for the first part only; on a GPU, a thread of the
    CPU does the rest meanwhile.
    """
    cfg = compose(["experiment=paper", *([f"model={options['model']}"] if options["model"] else [])])
    interval = cfg.probe.interval
    if interval is None or cfg.log.interval_spectra is None:
        raise UsageError(
            "experiment=paper has no probe.interval or no log.interval_spectra, so there is no share of its time; set them there"
        )
    training = training_of(cfg, options)
    watched = torch.randint(cfg.model.vocab_size, (cfg.probe.windows, cfg.model.block_size), device=device())

    def step() -> None:
        training.gradients()
        training.model.zero_grad(set_to_none=True)

    matrices, begun = training.optimizers.ruled_matrices(dict(training.model.named_parameters())), []
    calls = {
        "step": step,
        "probe": lambda: probe(training.model, watched),
        "begun": lambda: begun.append(Spectra(matrices)),
        "rest": lambda: begun.pop().records(),  # a call of its own, so that the thread disturbs no other call
    }
    times = take_turns(calls, options["repeats"] or 3)
    if not any(times.values()):
        return []
    steps = [seconds * cfg.global_batch_tokens / training.tokens for seconds in times["step"]]
    spectra = [first + rest for first, rest in zip(times["begun"], times["rest"])]
    waited = times["begun"] if training.device.type == "cuda" else spectra
    row: dict[str, Any] = {"probe s": median(times["probe"]), "step s": median(steps)}
    row |= {"measured tokens": training.tokens, "probe.interval": interval}
    row["share of training"] = _share(times["probe"], steps, interval)
    row |= {"spectra s": median(spectra), "waited for s": median(waited)}
    row |= {"log.interval_spectra": cfg.log.interval_spectra}
    row["their share"] = _share(waited, steps, cfg.log.interval_spectra)
    return [{**row, "all probe s": times["probe"]}]


def _share(seconds: list[float], steps: list[float], interval: int) -> str:
    """What is done once in `interval` steps, as a percentage of their time."""
    if not seconds or not steps:
        return NOT_MEASURED
    return f"{100 * statistics.median(seconds) / (interval * statistics.median(steps)):.3f}%"
