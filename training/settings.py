"""Every section of the configuration as a dataclass, with the names, types and ranges of its settings.

The settings of models and data are in model/config.py, model/residual.py and data/. The YAML files in configs/ say what each setting does.
training/validate.py checks relations between settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from data.settings import Count, Data
from data.sources import SOURCES
from model.config import Attention, Init, Shape
from model.residual import RESIDUAL_RULES, Positive, ResidualRule
from optim.assignment import ADAMW
from optim.certified import LENGTHS
from optim.linalg import PRECISIONS
from optim.manifolds import MANIFOLDS
from optim.published import RETRACTIONS
from training.fields import MOST, YAML_WORDS, Choice, Kind, PathText, Problem, Section, is_number, plain
from training.schedule import SCHEDULES
from training.stability import StabilityRules

NotNegative = Annotated[float, ("low", 0)]
Share = Annotated[float, ("low", 0), ("below", 1)]
Power = Annotated[float, ("low", -10), ("high", 10)]
Geometry = Annotated[str, Choice(lambda: (*MANIFOLDS, ADAMW))]
Precision = Annotated[str, ("options", tuple(PRECISIONS))]


# ---- optimization ----


@dataclass(frozen=True)
class Assignment:
    """Which parameter gets which geometry; configs/assignment. optim/assignment.py checks the rules against the model."""

    name: Annotated[str, ("longest", 100)]
    rules: Annotated[Mapping[str, Geometry] | None, ("null", "leaves every matrix without a rule")]


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


@dataclass(frozen=True)
class CertifiedRule:
    """The certified step rule."""

    kind: Literal["certified"]
    quality: Literal["default", "high"]
    products: Annotated[Precision | None, ("null", "means float16 on CUDA, float32 on a CPU")]
    length: Annotated[str, ("options", tuple(LENGTHS))]
    norm_cap: Positive | None
    compile: Annotated[bool | None, ("null", "means on CUDA")]


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
    rule: Annotated[PublishedRule | CertifiedRule, ("by", "kind"), ("types", STEP_RULES)]


@dataclass(frozen=True)
class AdamW:
    """AdamW, for all other parameters."""

    lr: NotNegative
    betas: tuple[Share, Share]
    eps: NotNegative
    weight_decay: NotNegative
    lr_scale: Factors


@dataclass(frozen=True)
class Optim:
    """Both optimizers; configs/optim."""

    muon: Muon
    adamw: AdamW
    always_adamw: tuple[str, ...]


@dataclass(frozen=True)
class StepsOrShare(Kind):
    """A number of updates; or, below 1, a share of all updates."""

    remedy = "give a whole number of updates, 0 or more, or a share of them below 1"

    def fits(self, value: Any) -> bool:
        return is_number(value) and 0 <= value <= MOST and (value < 1 or value == int(value))

    def read(self, value: Any) -> float:
        return value if value % 1 else int(value)


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


# ---- the run ----


@dataclass(frozen=True)
class Logger:
    """Weights & Biases; configs/logger."""

    mode: Literal["online", "offline", "disabled"]
    project: Annotated[str, ("longest", 128)]
    group: Annotated[str | None, ("longest", 128), ("null", "means the day, or the sweep's name")]


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
class Resume(PathText):
    """`never`, `auto` or the path of a checkpoint."""

    remedy = "choose never or auto, or give the path of a checkpoint"

    def fits(self, value: Any) -> bool:
        return super().fits(value) and value.lower() not in (*YAML_WORDS, "true", "false", "none")

    def hint(self, value: Any) -> str:
        return ""


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
    data: Annotated[Data, ("by", "source"), ("types", SOURCES)]
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
    output_dir: Annotated[str | None, ("path", True), ("null", "means outputs/<date>/<name>")]
    allow_changes: bool
    resume: Annotated[str, Resume()]

    def plain(self) -> dict[str, Any]:
        """The same as dicts, lists, numbers and text, as in config.yaml and in checkpoints."""
        return plain(self)


def read_sound(cfg: Mapping[str, Any]) -> tuple[Settings, list[Problem]]:
    """The typed settings of a plain configuration, and the problems of single values.

    A section or top-level value with a problem is left out of the settings. So the configuration of a run of an older program can be
    read in part.
    """
    section = Section(Settings)
    found = section.problems("", cfg)
    unsound = {problem.key.partition(".")[0] for problem in found}
    settings = object.__new__(Settings)
    vars(settings).update({name: kind.read(cfg[name]) for name, kind in section.kinds.items() if name not in unsound})
    return settings, found
