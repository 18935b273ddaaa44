"""Every section of the configuration as a dataclass, with the names, types and ranges of its settings.

The settings of models and data are in model/config.py, model/residual.py and data/. The YAML files in configs/ say what each setting does.
training/validate.py checks relations between settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from data.loader import ORDERS
from data.settings import Count, Data
from data.sources import SOURCES
from model.config import Attention, Init, Shape
from model.residual import RESIDUAL_RULES, Positive, ResidualRule
from optim.assignment import ADAMW
from optim.certified import LENGTHS
from optim.iterators import ITERATORS
from optim.linalg import PRECISIONS
from optim.manifolds import MANIFOLDS
from optim.norms import FEATURES
from optim.published import RETRACTIONS
from training.fields import Choice, Either, Number, Problem, Section, Several, plain
from training.kinds import Keywords, ListOfQuintics, Resume, StepsOrShare
from training.schedule import SCHEDULES
from training.stability import StabilityRules

NotNegative = Annotated[float, ("low", 0)]
Share = Annotated[float, ("low", 0), ("below", 1)]
Power = Annotated[float, ("low", -10), ("high", 10)]
Geometry = Annotated[str, Choice(lambda: (*MANIFOLDS, ADAMW))]
Precision = Annotated[str, ("options", tuple(PRECISIONS))]
Feature = Annotated[str, ("options", tuple(FEATURES))]


# ---- optimization ----


@dataclass(frozen=True)
class Assignment:
    """Which parameter gets which geometry; configs/assignment. optim/assignment.py checks the rules against the model."""

    name: Annotated[str, ("longest", 100)]
    rules: Annotated[Mapping[str, Geometry] | None, ("null", "leaves every matrix without a rule")]


Signs = Annotated[
    str | tuple[tuple[float, float, float], ...],
    Either(Choice(tuple(ITERATORS)), ListOfQuintics(Several(Number(False), 3))),
]
"""A name of optim.iterators.ITERATORS, or a list of coefficients."""


@dataclass(frozen=True)
class PublishedRule:
    """The published step rule."""

    kind: Literal["published"]
    dual_steps: Count
    alpha: Positive
    msign_steps: Count
    msign_dtype: Literal["float32", "bfloat16"]
    retraction: Annotated[str, ("options", tuple(RETRACTIONS))]
    decay_manifolds: bool
    iterator: Annotated[Signs | None, ("null", "means the step's own")]


@dataclass(frozen=True)
class CertifiedRule:
    """The certified step rule."""

    kind: Literal["certified"]
    quality: Literal["default", "high"]
    products: Annotated[Precision | None, ("null", "means float16 on CUDA, float32 on a CPU")]
    length: Annotated[str, ("options", tuple(LENGTHS))]
    norm_cap: Positive | None
    compile: Annotated[bool | None, ("null", "means on CUDA")]
    iterator: Annotated[Signs | None, ("null", "means the step's own")]


STEP_RULES = {"published": PublishedRule, "certified": CertifiedRule}
"""The settings of the step rules of ManifoldMuon, by name."""

Factors = Annotated[Mapping[str, NotNegative] | None, ("null", "means 1 for all")]


@dataclass(frozen=True)
class Muon:
    """ManifoldMuon, for matrices with a manifold and `euclidean` ones."""

    lr: NotNegative
    momentum: Share
    nesterov: bool
    weight_decay: NotNegative
    lr_scale: Factors
    blocks: Annotated[Mapping[str, Count] | None, ("null", "means 1 for all")]
    block_length: Literal["each", "whole"]
    cautious: bool
    row_beta: Annotated[Share | None, ("null", "leaves rows as they are")]
    radius: Factors
    rule: Annotated[PublishedRule | CertifiedRule, ("by", "kind"), ("types", STEP_RULES)]


@dataclass(frozen=True)
class AdamW:
    """AdamW, for all other parameters."""

    lr: NotNegative
    betas: tuple[Share, Share]
    eps: Positive
    fused: Literal["always", "cuda"]
    weight_decay: NotNegative
    lr_scale: Factors


@dataclass(frozen=True)
class Modular:
    """Steepest descent in the norm of each parameter, for all parameters; optim/modular.py."""

    lr: NotNegative
    momentum: Share
    nesterov: bool
    weight_decay: NotNegative


@dataclass(frozen=True)
class Norms:
    """The norms of the input and the output of each parameter; optim/norms.py."""

    others: tuple[Feature, Feature]
    tables: tuple[str, ...]
    patterns: Annotated[Mapping[str, tuple[Feature, Feature]] | None, ("null", "leaves all to others and tables")]


@dataclass(frozen=True)
class Library:
    """An optimizer of torch or of another library, for `euclidean` matrices; configs/optim/_library.yaml."""

    optimizer: str
    lr: NotNegative
    weight_decay: NotNegative
    lr_scale: Factors
    settings: Annotated[Mapping[str, Any], Keywords()]


@dataclass(frozen=True)
class Matrices:
    """Learning rate and weight decay of the matrices, whichever optimizer updates them."""

    lr: Annotated[NotNegative | None, ("null", "means that of its own section")]
    weight_decay: Annotated[NotNegative | None, ("null", "means that of its own section")]


@dataclass(frozen=True)
class Optim:
    """The optimizers; configs/optim. The matrices are updated by `library`, or if it is None, by ManifoldMuon; `modular` updates everything."""

    muon: Muon
    adamw: AdamW
    always_adamw: tuple[str, ...]
    modular: Annotated[Modular | None, ("null", "leaves the parameters to muon and adamw")]
    norms: Norms
    library: Annotated[Library | None, ("null", "means ManifoldMuon")]
    matrices: Matrices

    def of_matrices(self) -> Muon | Library | Modular:
        """The section of the optimizer of the matrices, with the learning rate and decay of `matrices` where it gives them."""
        return replace(
            self.modular or self.library or self.muon, **{k: v for k, v in vars(self.matrices).items() if v is not None}
        )


@dataclass(frozen=True)
class Schedule:
    """The learning rate over time; configs/schedule."""

    kind: Annotated[str, ("options", tuple(SCHEDULES))]
    warmup_steps: Annotated[float, StepsOrShare()]
    decay_steps: Count
    floor: Annotated[float, ("low", 0), ("high", 1)]
    decay: Annotated[float, ("above", 0), ("high", 1)]


@dataclass(frozen=True)
class NoTransfer:
    """No transfer: settings are used unchanged."""

    rule: Literal["none"]


@dataclass(frozen=True)
class TransferWidth:
    """Powers of the ratio of widths, for the learning rate of each group."""

    embedding: Power
    hidden: Power
    head: Power


@dataclass(frozen=True)
class NuTransfer:
    """νGPT's multipliers; configs/transfer/nu.yaml."""

    rule: Literal["nu"]
    base: Shape
    base_steps: Count
    horizon: Power
    width: TransferWidth
    head_factor: Positive
    alpha_depth: Power
    logit_width: Power
    storage: Positive


TRANSFERS = {"none": NoTransfer, "nu": NuTransfer}


@dataclass(frozen=True)
class NoAverage:
    """No average of the weights."""

    kind: Literal["none"]


@dataclass(frozen=True)
class EmaAverage:
    """An exponential average of the weights; configs/average."""

    kind: Literal["ema"]
    decay: Share


@dataclass(frozen=True)
class WindowAverage:
    """The mean of the weights over the last updates; configs/average."""

    kind: Literal["window"]
    length: Count


AVERAGES = {"none": NoAverage, "ema": EmaAverage, "window": WindowAverage}


# ---- the run ----


@dataclass(frozen=True)
class Batches:
    """How windows of tokens are drawn from the training split, and whether attention stays within a document."""

    order: Annotated[str, ("options", (*ORDERS, "in_order"))]
    documents: bool


@dataclass(frozen=True)
class Logger:
    """Weights & Biases; configs/logger."""

    mode: Literal["online", "offline", "disabled"]
    project: Annotated[str, ("longest", 128)]
    group: Annotated[str | None, ("longest", 128), ("null", "means the name of the folder that holds the run")]


@dataclass(frozen=True)
class Launcher:
    """The ranks of this machine; configs/launcher."""

    nproc: Annotated[int, ("low", 1), ("high", 1024)]
    shard: Literal["ddp", "fsdp"]
    timeout_s: Annotated[float, ("low", 1), ("high", 10**7)]
    checksum_interval: Count | None


@dataclass(frozen=True)
class Log:
    """How often records are written, in updates."""

    interval: Count
    interval_spectra: Count | None
    interval_certificate: Count | None
    interval_updates: Count | None


@dataclass(frozen=True)
class Probe:
    """When the model is probed, in updates, and on how many windows."""

    interval: Count | None
    windows: Count


@dataclass(frozen=True)
class Checkpoint:
    """When the run is saved, in updates, and how many checkpoints are kept."""

    interval: Annotated[Count | None, ("null", "saves the last step alone")]
    keep: Count


@dataclass(frozen=True)
class Sweep:
    """A sweep's directory."""

    name: Annotated[str, ("longest", 200)]
    resume: bool


@dataclass(frozen=True)
class Settings:
    """The whole configuration; configs/config.yaml. `training.config.compose` makes one."""

    model: Shape
    attention: Attention
    residual: Annotated[ResidualRule, ("by", "rule"), ("types", RESIDUAL_RULES)]
    init: Init
    assignment: Assignment
    optim: Optim
    transfer: Annotated[NoTransfer | NuTransfer, ("by", "rule"), ("types", TRANSFERS)]
    schedule: Schedule
    average: Annotated[NoAverage | EmaAverage | WindowAverage, ("by", "kind"), ("types", AVERAGES)]
    data: Annotated[Data, ("by", "source"), ("types", SOURCES)]
    batches: Batches
    logger: Logger
    launcher: Launcher
    log: Log
    probe: Probe
    checkpoint: Checkpoint
    stability: StabilityRules
    sweep: Sweep

    name: Annotated[str | None, ("longest", 200), ("null", "means the assignment's")]
    seed: Annotated[int, ("low", 0)]
    max_steps: Count
    global_batch_tokens: Count
    micro_batch_size: Count
    grad_clip: Positive | None
    eval_interval: Count
    eval_windows: Count
    full_eval: bool
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]
    compile: Literal["auto", True, False]
    attention_backend: Annotated[
        Literal["auto", "flash", "cudnn", "efficient", "math"] | None, ("null", "leaves the choice to torch")
    ]
    capture: bool
    profile: Annotated[Count | None, ("null", "means no trace")]
    output_dir: Annotated[str | None, ("path", True), ("null", "means outputs/<date>/<name>")]
    allow_changes: bool
    resume: Annotated[str, Resume()]
    init_from: Annotated[str | None, ("path", True), ("null", "starts from random weights")]

    def plain(self) -> dict[str, Any]:
        """The same as dicts, lists, numbers and text, as in config.yaml and in checkpoints."""
        return plain(self)

    def intervals(self) -> tuple[int | None, ...]:
        """Updates between two actions of each kind for which training pauses: measurements, a check, checkpoints; None: none."""
        log, rest = self.log, (self.eval_interval, self.launcher.checksum_interval, self.checkpoint.interval)
        return log.interval_spectra, log.interval_certificate, log.interval_updates, self.probe.interval, *rest


def read_sound(cfg: Mapping[str, Any]) -> tuple[Settings, list[Problem]]:
    """The typed settings of a plain configuration, and the problems of single values.

    A section or top-level value with a problem is left out of the settings.
    """
    section = Section(Settings)
    found = section.problems("", cfg)
    unsound = {problem.key.partition(".")[0] for problem in found}
    settings = object.__new__(Settings)
    vars(settings).update({name: kind.read(cfg[name]) for name, kind in section.kinds.items() if name not in unsound})
    return settings, found


def settings_of(saved: Mapping[str, Any]) -> Settings:
    """The typed settings of a configuration that a run saved; see `read_sound`."""
    return read_sound(saved)[0]
