"""The words of a command line: the configuration that they compose, the jobs of a sweep, and what was probably meant by a word that Hydra refuses.

Hydra stops at the first word that it does not know, and does not say what else exists. Does not import torch.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.config import CONFIGS
from training.fields import leaves, shown

REFUSALS = (HydraException, OmegaConfBaseException)
"""The errors of Hydra for a word that it refuses."""

_MOST_HINTS = 3

_LIBRARY = "optim.library.settings"
_RULES = "assignment.rules"
_OWN_RULES = (
    f"rules of your own belong to assignment=custom: assignment=custom '{_RULES}={{attn: stiefel, mlp: dgram}}'"
)

_OTHER_NAMES = {  # of other programs: theirs → ours
    "learning_rate": ("optim.muon.lr", "optim.adamw.lr"),
    "min_lr": ("schedule.floor",),
    **dict.fromkeys(("beta", "beta1"), ("optim.muon.momentum", "optim.adamw.betas")),
    "max_iters": ("max_steps",),
    "warmup_iters": ("schedule.warmup_steps",),
    "out_dir": ("output_dir",),
    **dict.fromkeys(
        ("batch_size", "grad_accum", "gradient_accumulation_steps"), ("global_batch_tokens", "micro_batch_size")
    ),
    **dict.fromkeys(("context", "context_length", "seq_len", "max_seq_len"), ("model.block_size",)),
    **dict.fromkeys(("width", "d_model", "dim", "hidden_size"), ("model.n_embd",)),
    **dict.fromkeys(("depth", "n_layers", "num_layers"), ("model.n_layer",)),
    **dict.fromkeys(("n_heads", "num_heads"), ("model.n_head",)),
}


def group_choices(group: str) -> list[str]:
    """The choices of a configuration group, sorted; empty if there is no such group. A name that begins with `_` is shared by others."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml") if not file.stem.startswith("_"))


def top_names() -> set[str]:
    """The settings of config.yaml itself, and the groups."""
    settings = yaml.safe_load((CONFIGS / "config.yaml").read_text())
    return {*settings, *(folder.name for folder in CONFIGS.iterdir() if folder.is_dir())} - {"defaults"}


def parsed(words: Sequence[str]) -> Iterator[Override]:
    """The overrides among the words of a command line; options such as -m, and words that Hydra cannot parse, are left out."""
    for word in words:
        if not word.startswith("-"):
            with suppress(HydraException):
                yield OverridesParser.create().parse_override(word)


def swept_keys(words: Sequence[str]) -> list[str]:
    """The keys to which words of a command line give several values."""
    return [override.key_or_group for override in parsed(words) if override.is_sweep_override()]


def keys_set(words: Sequence[str], config: DictConfig) -> list[str]:
    """The dotted keys of the settings that words of a command line set, but not of those to which another setting refers.

    `config` is the configuration of these words, with its references.
    """
    referred = re.findall(r"\$\{([\w.]+)\}", OmegaConf.to_yaml(config))
    keys = [key for override in parsed(words) for key, _ in leaves({override.key_or_group: override.value()})]
    return [key for key in dict.fromkeys(keys) if key not in referred]


def jobs_of(words: Sequence[str]) -> list[tuple[str, list[str]]] | None:
    """The jobs of a sweep over all combinations, in order: what distinguishes each (`seed=1,optim.muon.lr=0.1`), and all its overrides.

    None if the sweeper chooses the values. Words about Hydra itself are left out.
    """
    plain = [(str(o.input_line), o) for o in parsed(words) if not o.key_or_group.startswith("hydra")]
    swept = {word: _values(override) for word, override in plain if override.is_sweep_override()}
    if any(word.startswith("hydra/sweeper") for word in words) or not all(swept.values()):
        return None
    jobs = []
    for values in itertools.product(*swept.values()):
        own = {word: f"{word.partition('=')[0]}={value}" for word, value in zip(swept, values)}
        jobs.append((",".join(own.values()), [own.get(word, word) for word, _ in plain]))
    return jobs


def composed(words: Sequence[str]) -> DictConfig:
    """Hydra's configuration of these words, with its references.

    Words that choose files are composed once and kept; words that only set a value change a copy of that. Hydra composes all words together
    only if one does something else or is refused: that takes .15 s, and an experiment composes each of its cases.

    Raises:
        HydraException, OmegaConfBaseException: see REFUSALS.
    """
    refuse_values_for_groups(words)
    overrides = {word: list(parsed([word])) for word in words}
    chosen = [word for word, found in overrides.items() if found and _chooses(found[0])]
    values = [found[0] for word, found in overrides.items() if found and word not in chosen]
    if len(chosen) + len(values) == len(words) and all(map(_only_sets, values)):
        with suppress(*REFUSALS):  # Hydra then says it about all words
            files = tuple((str(file), file.stat().st_mtime_ns) for file in sorted(CONFIGS.rglob("*.yaml")))
            config = copy.deepcopy(_composed_of_files(tuple(chosen), files))
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value())
            return config
    return _composed_by_hydra(words)


def _composed_by_hydra(words: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(words))


@lru_cache(maxsize=128)
def _composed_of_files(words: Sequence[str], files: tuple[tuple[str, int], ...]) -> DictConfig:
    """The same, kept while the files are what they were: files has the name of each, and when it was changed."""
    return _composed_by_hydra(words)


def _chooses(override: Override) -> bool:
    """Whether a word chooses a file of a configuration group, such as optim=paper."""
    return override.package is None and (CONFIGS / override.key_or_group).is_dir() and not _is_marked(override)


def _only_sets(override: Override) -> bool:
    """Whether a word only gives a value to a setting, such as seed=2."""
    about_files = override.package is not None or "/" in override.key_or_group
    return not (about_files or override.key_or_group.startswith("hydra") or _is_marked(override))


def _is_marked(override: Override) -> bool:
    """Whether a word adds, takes away or gives several values."""
    return override.is_add() or override.is_force_add() or override.is_delete() or override.is_sweep_override()


def refuse_values_for_groups(words: Sequence[str]) -> None:
    """Refuse what is no name of a choice, such as null in average=null. Hydra has errors for programmers there.

    Raises:
        ConfigCompositionException: there is such a word.
    """
    for override in parsed(words):
        group = override.key_or_group
        if override.is_delete() or override.is_sweep_override() or not ("/" in group or (CONFIGS / group).is_dir()):
            continue
        value = override.value()
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, str):
                raise ConfigCompositionException(f"{group} has no choice {shown(item)}; give a name")


def problems_of_words(words: Sequence[str], sweep: bool = False, sweeps: bool = True) -> tuple[list[str], list[str]]:
    """Check each word of a command line against the files of the configuration.

    Args:
        words: the command line without options.
        sweep: whether a word may give several values, as in seed=1,2. sweeps: whether it may with the option -m.

    Returns:
        A line for each word that is refused; and the other words, each with the first of its values.
    """
    found, groups, keys = [], [], []
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            found.append(_not_parsed(word))
            continue
        name, values = override.key_or_group, _values(override)
        found += [f"{name} has {key} twice; keep one" for key in _twice(word)]
        single = f"{word.partition('=')[0]}={values[0]}" if override.is_sweep_override() and values else word
        if name.startswith("hydra") or not (CONFIGS / name).is_dir() or override.is_delete():
            keys.append((name, single))
        elif wrong := [value for value in values if not (CONFIGS / name / f"{value}.yaml").exists()]:
            choices = group_choices(name)
            found += [
                f"{name} has no choice {v}{hint('' if v == 'null' else v, choices)}" for v in wrong
            ]  # null: no slip
            continue
        else:
            groups.append(single)
        if override.is_sweep_override() and not sweep:
            found.append(_several(word, (CONFIGS / name).is_dir(), sweeps))
    config, _ = _tried(groups)
    if config is None:
        return found, groups
    rest = []
    for name, word in keys:
        if _has(config, name) or word.startswith("+") or name.startswith("hydra"):
            rest.append(word)
        elif name.startswith(f"{_RULES}.") and len(config["assignment"].get("rules") or ()):
            found.append(f"{name} is no rule of this assignment; {_OWN_RULES}")
        elif name.startswith(f"{_LIBRARY}.") and not word.startswith("~"):
            beside = "" if _has(config, _LIBRARY) else ", beside an optimizer of a library, such as optim=sgd"
            found.append(f"{name} is not in the chosen file of configs/optim; write +{word}{beside}")
        elif mapping := _empty_mapping(name, config):
            key, value = name.removeprefix(f"{mapping}."), word.partition("=")[2]
            write_it = f"{name} is no setting; write '{mapping}={{{key}: {value}}}'"
            found.append(_belongs_elsewhere(name, groups) or write_it)
        else:
            found.append(_no_setting(name, config, groups))
    errors = _errors_of_each(rest, groups)
    errors |= {word: f"{word}: {_OWN_RULES}" for word in errors if word.lstrip("+").startswith(f"{_RULES}=")}
    return [*found, *errors.values()], [*groups, *(word for word in rest if word not in errors)]


def hint(word: str, names: Collection[str]) -> str:
    """What was meant by a wrong word, or else all that there is, as the end of a sentence."""
    begun = [name for name in names if name.startswith(f"{word}_")]
    near = begun[:_MOST_HINTS] or get_close_matches(str(word)[:100], list(names), 1)
    return f"; did you mean {_either(near)}?" if near else f"; choose one of {', '.join(names)}"


# ---- one word ----


def _twice(word: str) -> list[str]:
    """The keys that a mapping in a word has twice: Hydra would keep the last. None are found in what YAML cannot read."""
    with suppress(yaml.YAMLError):
        return list(_repeated(yaml.compose(word.partition("=")[2])))
    return []


def _repeated(node: yaml.Node | None) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        yield from (key for key in dict.fromkeys(keys) if keys.count(key) > 1)
        for _, value in node.value:
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated(item)


def _not_parsed(word: str) -> str:
    if word.startswith("-"):
        meant = f"write it without dashes: {word.lstrip('-')}" if "=" in word else "leave it out, or see --help"
        return f"{word} is no option here; {meant}"
    if "=" not in word:
        return f"{word} has no value; write {word}=<value>"
    return f"{word} cannot be read; put a value with spaces or special characters in two kinds of quotes: \"key='a value'\""


def _several(word: str, group: bool, sweeps: bool) -> str:
    """The sentence about a word with several values where it may have one; group: whether they are choices of a group."""
    key, _, value = word.partition("=")
    as_one = ["put a list in brackets", f"put text that has a comma in two kinds of quotes: \"{key}='{value}'\""]
    remedies = [*(["add -m for a sweep"] if sweeps else []), *(["give one of them"] if group else as_one)]
    return f"{word} gives several values; {', or '.join(remedies)}"


def _values(override: Override) -> list[str]:
    """The values of an override as text; none if they cannot be listed, as those of an interval."""
    if not override.is_sweep_override():
        value = override.value()
        items = value if isinstance(value, list) else [value]
        return [item if isinstance(item, str) else shown(item) for item in items]
    with suppress(AttributeError, NotImplementedError, HydraException):
        return [str(value) for value in override.sweep_string_iterator()]
    return []


def _errors_of_each(words: Sequence[str], groups: Sequence[str]) -> dict[str, str]:
    """Hydra's message for each word that it refuses beside the groups."""
    if _tried([*groups, *words])[1] is None:  # one composition takes long enough
        return {}
    errors = {word: _tried([*groups, word])[1] for word in words}
    return {word: " ".join(str(error).split()) for word, error in errors.items() if error is not None}


def _no_setting(name: str, config: DictConfig, groups: Sequence[str]) -> str:
    """The sentence about a name that is no setting: almost the same names, other choices of its group that have it, or similar last parts."""
    names = list(_dotted(config))
    last = name.rpartition(".")[2]
    if last in _OTHER_NAMES:
        return f"{name} is no setting; did you mean {_either(_OTHER_NAMES[last])}?"
    parts = {known: known.rpartition(".")[2] for known in names}
    alike = [known for known, part in parts.items() if get_close_matches(last, [part], 1)]
    near = get_close_matches(name, alike, 1, 0.85)
    if not near and (elsewhere := _belongs_elsewhere(name, groups)):
        return elsewhere
    near = near or [known for known, part in parts.items() if part == last]
    near = near or [known for known, part in parts.items() if part.startswith(f"{last}_")]
    near = near or get_close_matches(name, alike, 1, 0.7)
    near = near or [known for known, part in parts.items() if part in get_close_matches(last, parts.values(), 1, 0.8)]
    meant = f"did you mean {_either(near[:_MOST_HINTS])}?" if near else "python train.py --help lists the settings"
    return f"{name} is no setting; {meant}"


def _empty_mapping(name: str, config: DictConfig) -> str | None:
    """The setting whose value is null or an empty mapping, and of which a dotted name would be a key."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if _has(config, mapping := ".".join(parts[:i])):
            value = OmegaConf.select(config, mapping, throw_on_missing=False)
            return mapping if value is None or (isinstance(value, DictConfig) and not value) else None
    return None


def _belongs_elsewhere(name: str, groups: Sequence[str]) -> str | None:
    """The sentence about a dotted name that is a setting with other choices of its group, such as optim=paper; None if there is none."""
    group, dot, _ = name.partition(".")
    others = [word for word in groups if not word.startswith(f"{group}=")]
    words = [f"{group}={choice}" for choice in group_choices(group)] if dot else []
    tried = {word: _tried([*others, word])[0] for word in words}
    choices = [word for word, config in tried.items() if config is not None and _is_used(config, name)]
    return f"{name} is no setting here; it belongs to {' and '.join(choices[:_MOST_HINTS])}" if choices else None


def _is_used(config: DictConfig, name: str) -> bool:
    """Whether a configuration has a dotted name, and not only beside an optimizer that takes the place of its section."""
    replaced = name.startswith("optim.muon.") and (config.optim.library or config.optim.modular)
    return _has(config, name) and not replaced


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """The names of all settings and sections, such as optim.muon.lr."""
    for key in map(str, node) if isinstance(node, DictConfig) else ():
        yield prefix + key
        yield from _dotted(node._get_node(key), f"{prefix}{key}.")


def _has(config: DictConfig, name: str) -> bool:
    """Whether a dotted name is in the configuration, also if its value is null or missing."""
    node: Any = config
    for part in name.split("."):
        if not isinstance(node, DictConfig) or part not in list(node):  # `in node` leaves out missing values
            return False
        node = node._get_node(part)
    return True


# ---- Hydra ----


def _tried(words: Sequence[str]) -> tuple[DictConfig | None, Exception | None]:
    """The configuration of these words, or the error of Hydra. What Hydra is doing meanwhile is not disturbed."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        return composed(words), None
    except REFUSALS as error:
        return None, error
    finally:
        GlobalHydra.instance().hydra = before


def _either(names: Sequence[str]) -> str:
    """ "a", "a or b", or "a, b or c"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
