"""Every section of the configuration as a typed dataclass: what its settings are called, their types and their ranges.

This is the only place that knows them; what a setting does is said beside its default in configs/. Relations between settings, such as
a batch that must divide among ranks, are the concern of training/validate.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.tokenizer import TOKENIZERS
from model.attention import HEAD_GATES, QK_CLIP_TARGETS
from model.layers import MLPS
from model.residual import ResidualRule, residual_problems, residual_rule
from optim.assignment import ADAMW
from optim.certified import LENGTHS
from optim.linalg import PRECISIONS
from optim.manifolds import MANIFOLDS
from optim.published import RETRACTIONS
from training.fields import (
    MOST,
    YAML_WORDS,
    Choice,
    Kind,
    PathText,
    Problem,
    Section,
    choice,
    either,
    flag,
    is_number,
    number,
    of,
    optional,
    path,
    patterns,
    section,
    several,
    text,
    variant,
    whole,
)
from training.schedule import SCHEDULES
from training.stability import Stability
from training.validate import ConfigError

# ---- the model ----


@dataclass(frozen=True)
class Model:
    """The shape of a GPT and its parts; configs/model."""

    block_size: int = whole(low=1, high=2**24)
    vocab_size: int = whole(low=1, high=2**24)
    n_layer: int = whole(low=1, high=1000)
    n_head: int = whole(low=1, high=2**16)
    n_embd: int = whole(low=1, high=2**20)
    dropout: float = number(low=0, below=1)
    bias: bool = flag()
    rope: bool = flag()
    mlp: str = choice(*MLPS)
    tied: bool = flag()
    unit_weights: bool = flag()
    storage: float | None = optional(number(above=0), null="means 1/√n_embd")
    logit_scale: float = number(above=0)


@dataclass(frozen=True)
class Attention:
    """What attention has beside its matrices; configs/attention."""

    qk_norm: bool = flag()
    qk_clip: float | None = optional(number(above=0))
    qk_clip_on: str = choice(*QK_CLIP_TARGETS)
    logit_cap: float | None = optional(number(above=0))
    head_gate: str = choice(*HEAD_GATES)


@dataclass(frozen=True)
class Init:
    """Factors of GPT-2's initial scales."""

    weight_scale: float = number(above=0)
    residual_scale: float = number(above=0)


class Residual(Kind):
    """A residual rule and its settings; each rule of model/residual.py declares its own; configs/residual."""

    remedy = "give a section with the key rule and what belongs to it"

    def fits(self, value: Any) -> bool:
        return isinstance(value, Mapping) and not residual_problems(value)

    def wrong(self, key: str, value: Any) -> list[Problem]:
        if not isinstance(value, Mapping):
            return super().wrong(key, value)
        return [
            Problem(message.split()[0], message) for message in residual_problems(value)
        ]  # each begins with its key

    def read(self, value: Any) -> ResidualRule:
        return residual_rule(value)


# ---- optimization ----


@dataclass(frozen=True)
class Assignment:
    """Which parameters get which geometry; configs/assignment. optim/assignment.py checks the rules against the model's parameters."""

    name: str = text(longest=100)
    rules: Mapping[str, str] | None = optional(
        patterns(of(Choice(lambda: (*MANIFOLDS, ADAMW)))), null="leaves every matrix without a rule"
    )


@dataclass(frozen=True)
class PublishedRule:
    """The published step rule."""

    kind: str = choice("published")
    dual_steps: int = whole(low=1)
    alpha: float = number(above=0)
    msign_steps: int = whole(low=1)
    msign_dtype: str = choice("float32", "bfloat16")
    retraction: str = choice(*RETRACTIONS)
    decay_manifolds: bool = flag()


@dataclass(frozen=True)
class CertifiedRule:
    """The certified step rule."""

    kind: str = choice("certified")
    quality: str = choice("default", "high")
    products: str | None = optional(choice(*PRECISIONS), null="means float16 on CUDA, float32 on a CPU")
    length: str = choice(*LENGTHS)
    norm_cap: float | None = optional(number(above=0))
    compile: bool | None = optional(flag(), null="means on CUDA")


@dataclass(frozen=True)
class Muon:
    """ManifoldMuon, of the matrices that have a manifold or are unconstrained."""

    lr: float = number(low=0)
    momentum: float = number(low=0, below=1)
    nesterov: bool = flag()
    weight_decay: float = number(low=0)
    lr_scale: Mapping[str, float] | None = optional(patterns(number(low=0)), null="means 1 for all")
    blocks: Mapping[str, int] | None = optional(patterns(whole(low=1)), null="means 1 for all")
    rule: PublishedRule | CertifiedRule = variant("kind", {"published": PublishedRule, "certified": CertifiedRule})


@dataclass(frozen=True)
class AdamW:
    """AdamW, of everything else."""

    lr: float = number(low=0)
    betas: tuple[float, float] = several(number(low=0, below=1), count=2)
    eps: float = number(low=0)
    weight_decay: float = number(low=0)
    lr_scale: Mapping[str, float] | None = optional(patterns(number(low=0)), null="means 1 for all")


@dataclass(frozen=True)
class Optim:
    """Both optimizers; configs/optim."""

    muon: Muon = section(Muon)
    adamw: AdamW = section(AdamW)
    always_adamw: tuple[str, ...] = several(text())


@dataclass(frozen=True)
class StepsOrShare(Kind):
    """A number of updates; or, below 1, a share of all of them."""

    remedy = "give a whole number of updates, 0 or more, or a share of them below 1"

    def fits(self, value: Any) -> bool:
        return is_number(value) and 0 <= value <= MOST and (isinstance(value, int) or value < 1)

    def plain(self, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Schedule:
    """The learning rate over time; configs/schedule."""

    kind: str = choice(*SCHEDULES)
    warmup_steps: float = of(StepsOrShare())
    decay_steps: int = whole(low=1)
    floor: float = number(low=0, high=1)
    decay: float = number(above=0, high=1)


@dataclass(frozen=True)
class NoTransfer:
    """Settings are used as they stand."""

    rule: str = choice("none")


@dataclass(frozen=True)
class TransferWidth:
    """Powers of the ratio of widths, for each group of learning rates."""

    embedding: float = number(low=-10, high=10)
    hidden: float = number(low=-10, high=10)
    head: float = number(low=-10, high=10)


@dataclass(frozen=True)
class NuTransfer:
    """νGPT's multipliers; configs/transfer/nu.yaml."""

    rule: str = choice("nu")
    base: Model = section(Model)
    base_steps: int = whole(low=1)
    horizon: float = number(low=-10, high=10)
    width: TransferWidth = section(TransferWidth)
    head_factor: float = number(above=0)
    alpha_depth: float = number(low=-10, high=10)
    logit_width: float = number(low=-10, high=10)
    storage: float = number(above=0)


# ---- data ----


@dataclass(frozen=True)
class Data:
    """What every source of text has; configs/data."""

    name: str = text(longest=100)
    source: str = text()
    dir: str = path()
    auto_prepare: bool = flag()
    tokenizer: str = choice(*TOKENIZERS)
    shard_tokens: int = whole(low=1)
    val_fraction: float = number(above=0, below=1)
    max_tokens: int | None = optional(whole(low=1), null="takes all there are")


@dataclass(frozen=True)
class Stdlib(Data):
    """The standard library of the running Python."""


@dataclass(frozen=True)
class TextFiles(Data):
    """Local files."""

    files: Any = either(several(text()), text())
    val_files: Any = optional(either(several(text()), text()), null="takes val_fraction of the documents")
    split_seed: int = whole(low=0)
    separator: str | None = optional(text(shortest=0), null="makes every file one document")
    column: str = text()


@dataclass(frozen=True)
class FineWeb(Data):
    """FineWeb-Edu from the Hugging Face Hub."""

    repository: str = text()
    subset: str = text()
    column: str = text()
    split_seed: int = whole(low=0)


@dataclass(frozen=True)
class Expected:
    """Published counts of a dataset."""

    tokenizer: str = choice(*TOKENIZERS)
    documents: int = whole(low=1)
    train_tokens: int = whole(low=1)
    val_tokens: int = whole(low=1)


@dataclass(frozen=True)
class OpenWebText(Data):
    """OpenWebText from the Hugging Face Hub."""

    repository: str = text()
    revisions: tuple[str | None, ...] = several(optional(text(), null="is the current one"))
    column: str = text()
    split_seed: int = whole(low=0, high=2**32 - 1)
    expected: Expected | None = optional(section(Expected), null="compares nothing")


DATA = {"stdlib": Stdlib, "text": TextFiles, "openwebtext": OpenWebText, "fineweb": FineWeb}
"""The settings of every source of data/sources.py."""


# ---- the run ----


@dataclass(frozen=True)
class Logger:
    """Weights & Biases; configs/logger."""

    mode: str = choice("online", "offline", "disabled")
    project: str = text(longest=128)
    group: str | None = optional(text(longest=128), null="means the day, or the sweep's name")


@dataclass(frozen=True)
class Launcher:
    """The ranks of this machine; configs/launcher."""

    nproc: int = whole(low=1, high=1024)
    timeout_s: float = number(low=1, high=10**7)
    checksum_interval: int | None = optional(whole(low=1))


@dataclass(frozen=True)
class Log:
    """How often records are written, in updates."""

    interval: int = whole(low=1)
    interval_spectra: int | None = optional(whole(low=1))
    interval_certificate: int | None = optional(whole(low=1))


@dataclass(frozen=True)
class Probe:
    """Looks inside the model."""

    interval: int | None = optional(whole(low=1))
    windows: int = whole(low=1)


@dataclass(frozen=True)
class Checkpoint:
    """When the run is saved, in updates, and how many checkpoints are kept."""

    interval: int | None = optional(whole(low=1), null="saves the last step alone")
    keep: int = whole(low=1)


@dataclass(frozen=True)
class Sweep:
    """A sweep's directory."""

    name: str = text(longest=200)
    resume: bool = flag()


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
    """The whole configuration; configs/config.yaml."""

    model: Model = section(Model)
    attention: Attention = section(Attention)
    residual: ResidualRule = of(Residual())
    init: Init = section(Init)
    assignment: Assignment = section(Assignment)
    optim: Optim = section(Optim)
    transfer: NoTransfer | NuTransfer = variant("rule", {"none": NoTransfer, "nu": NuTransfer})
    schedule: Schedule = section(Schedule)
    data: Data = variant("source", DATA)
    logger: Logger = section(Logger)
    launcher: Launcher = section(Launcher)
    log: Log = section(Log)
    probe: Probe = section(Probe)
    checkpoint: Checkpoint = section(Checkpoint)
    stability: Stability = section(Stability)
    sweep: Sweep = section(Sweep)

    name: str | None = optional(text(longest=200), null="means the assignment's")
    seed: int = whole(low=0)
    max_steps: int = whole(low=1)
    global_batch_tokens: int = whole(low=1)
    micro_batch_size: int = whole(low=1)
    grad_clip: float | None = optional(number(above=0))
    eval_interval: int = whole(low=1)
    eval_windows: int = whole(low=1)
    full_eval: bool = flag()
    device: str = choice("auto", "cpu", "cuda")
    dtype: str = choice("auto", "float32", "bfloat16")
    compile: str | bool = choice("auto", True, False)
    output_dir: str | None = optional(path(), null="means outputs/<date>/<name>")
    allow_changes: bool = flag()
    resume: str = of(Resume())

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> Settings:
        """A plain configuration, typed.

        Raises:
            ConfigError: listing everything that `problems` finds.
        """
        if found := problems(cfg):
            raise ConfigError(map(str, found))
        return Section(cls).read(cfg)


def problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """Everything that is wrong with single values: a key that is missing or unknown, a value of the wrong type or out of range."""
    return Section(Settings).problems("", cfg)


def data_settings(cfg: Any) -> dict[str, Any]:
    """The plain section `data` alone, as `data.prepare` receives it, with its whole numbers as such.

    Raises:
        ConfigError: listing everything that is wrong with its values.
    """
    kind = Section(Settings).kinds["data"]
    cfg = kind.plain(cfg)
    if found := kind.problems("data", cfg):
        raise ConfigError(map(str, found))
    return cfg


def with_whole_numbers(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A plain configuration in which a whole number written as 1e9, a float to YAML, is one where its setting asks for it."""
    return Section(Settings).plain(cfg)
