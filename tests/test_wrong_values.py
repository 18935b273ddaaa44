"""Every key of the configuration with values of the wrong type, sign and size: each is refused by name, or is legal for a stated reason."""

import copy
import math
from functools import reduce

import pytest
import torch
from conftest import run_train

from data.tokenizer import TOKENIZERS
from model.layers import MLPS
from training import checks
from training.config import compose, compose_plain
from training.fields import Section
from training.settings import Settings, read_sound
from training.validate import ConfigError

# Together they have every section and every setting.
CONFIGURATIONS = {
    "default": [],
    "paper": ["experiment=paper", "assignment=all_stiefel"],
    "nugpt": ["experiment=nugpt_demo", "data=mix", "data.parts={a: 1}", "probe.interval=null"],
    "text": ["data=text", "residual=p_sphere", "attention=qk_clip", "schedule=wsd", "average=ema"],
    "fineweb": ["data=fineweb", "residual=sandwich_norm", "assignment=adamw", "optim.muon.blocks={}"],
    "modular": ["optim=modular", "assignment=unconstrained"],
    "library": [
        "optim=_library",
        "optim.library.optimizer=torch.optim.Muon",
        "optim.library.lr=0.1",
        "optim.library.weight_decay=0",
    ],
    "geonorm": ["residual=geonorm", "attention=soft_cap", "optim.muon.lr_scale={attn: 0.5}", "average=window"],
}

VALUES = {
    "null": None,
    "true": True,
    "false": False,
    "no": "no",
    "off": "off",
    "yes": "yes",
    "word": "abc",
    "long": "x" * 20_000,
    "blank": "  ",
    "[]": [],
    "{}": {},
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "1.5": 1.5,
    "huge": 10**30,
    "inf": math.inf,
    "-inf": -math.inf,
    "nan": math.nan,
}

# What is legal, and why. Everything else must be refused.
TEXT = {"no", "off", "yes", "word"}  # these words are names like any other
POSITIVE = {"0.5", "1.5"}
NOT_NEGATIVE = {"0", *POSITIVE}
SHARE = {"0", "0.5"}
FLAG = {"true", "false"}
OFF = {"null"}  # switches it off, or leaves the choice to the program
POWER = {"-1", "0", "0.5", "1.5"}
NOTHING: set[str] = set()  # whole numbers above 0, choices and sections

RATES = "optim.modular.lr optim.modular.weight_decay optim.adamw.lr optim.adamw.weight_decay optim.muon.lr optim.muon.weight_decay"
LIBRARY = "optim.library.lr optim.library.weight_decay"
BASE = ("bias", "rope", "tied", "head_bias", "unit_weights", "skips")
GROUPS = [
    (
        FLAG,
        "model.bias model.rope model.tied model.head_bias model.unit_weights model.skips attention.qk_norm residual.learn_p optim.muon.nesterov",
    ),
    (FLAG, "optim.muon.rule.decay_manifolds data.auto_prepare full_eval"),
    ({"false"}, "batches.documents"),  # true is refused beside probes, which the first configuration has
    (FLAG | OFF, "optim.muon.rule.compile"),
    (FLAG, "optim.muon.cautious optim.modular.nesterov"),
    (SHARE | OFF, "optim.muon.row_beta"),
    (FLAG, "sweep.resume allow_changes compile " + " ".join(f"transfer.base.{name}" for name in BASE)),
    (
        SHARE,
        "model.dropout transfer.base.dropout optim.muon.momentum optim.modular.momentum schedule.warmup_steps schedule.floor",
    ),
    ({"false", "true"} if torch.cuda.is_available() else {"false"}, "capture"),
    (SHARE, "stability.warning.entropy average.decay"),
    ({"0.5"}, "schedule.decay data.val_fraction"),
    (POSITIVE, "model.logit_scale residual.alpha residual.p init.weight_scale init.residual_scale"),
    (POSITIVE, "init.attention_residual_scale init.mlp_residual_scale init.attention_scale"),
    (POSITIVE, "optim.muon.rule.alpha transfer.head_factor transfer.storage transfer.base.logit_scale"),
    (POSITIVE, "stability.max_rise data.parts.a optim.adamw.eps"),
    (POSITIVE | OFF, "model.head_cap transfer.base.head_cap attention.scale"),
    (POSITIVE | OFF, "model.storage transfer.base.storage residual.storage attention.qk_clip attention.logit_cap"),
    (POSITIVE | OFF, "optim.muon.rule.norm_cap stability.z_threshold stability.warning.logit grad_clip"),
    (NOT_NEGATIVE, f"{RATES} {LIBRARY} optim.muon.lr_scale.attn"),  # a rate of 0 leaves its matrices as they are
    (NOT_NEGATIVE | OFF, "optim.matrices.lr optim.matrices.weight_decay"),
    (OFF, "optim.library"),
    ({"{}"}, "optim.library.settings"),  # the optimizer's own defaults
    (POWER, "transfer.horizon transfer.alpha_depth transfer.logit_width"),
    (POWER, "transfer.width.embedding transfer.width.hidden transfer.width.head"),
    ({"1.5"}, "launcher.timeout_s"),
    ({"0"}, "data.split_seed seed"),
    ({"0", "null"}, "stability.max_skipped"),  # 0: the first update that is left out ends the run
    (TEXT, "assignment.name data.name data.dir data.column data.split logger.project sweep.name"),
    (TEXT | {"blank"}, "data.repository"),  # training does not need it
    (TEXT | OFF | {"blank"}, "data.separator"),
    (TEXT | OFF, "data.subset logger.group name output_dir init_from"),
    ({"word"}, "resume"),  # the path of a checkpoint; no, off and yes are meant otherwise
    (
        {"null", "{}"},
        "optim.muon.lr_scale optim.muon.blocks optim.muon.radius optim.adamw.lr_scale optim.library.lr_scale optim.norms.patterns",
    ),  # a mapping may be empty
    ({*TEXT, "[]"}, "data.files"),  # data.prepare asks for one if there is none
    ({*TEXT, "[]", "null"}, "data.val_files"),
    ({"[]"}, "data.revisions data.train data.val"),
    ({"{}"}, "data.parts"),  # opening the data asks for one
    (
        OFF,
        "profile launcher.checksum_interval log.interval_spectra log.interval_certificate log.interval_updates probe.interval",
    ),
    (OFF, "optim.modular attention_backend"),
    ({"[]"}, "optim.norms.tables"),
    (
        OFF,
        "optim.muon.rule.iterator optim.muon.rule.products checkpoint.interval stability.warning data.max_tokens data.expected",
    ),
]
LEGAL = {key: labels for labels, names in GROUPS for key in names.split()}


def keys(cfg, prefix=""):
    """Every dotted key, sections included."""
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


def changed(cfg, key, value):
    """A copy of the configuration with another value at a dotted key."""
    cfg = copy.deepcopy(cfg)
    *path, last = key.split(".")
    place = cfg
    for name in path:
        place = place[name]
    place[last] = value
    return cfg


@pytest.fixture(scope="module")
def configurations():
    return {name: compose_plain(overrides) for name, overrides in CONFIGURATIONS.items()}


@pytest.fixture(scope="module")
def verdicts(configurations):
    """(configuration, key, value's name) → the message of refusal, or None."""
    found, known, build = {}, {}, checks.problems_of_model

    def build_once(cfg):
        """A model that has been tried is not built again: most changes do not concern it."""
        names = ("model", "attention", "init", "residual", "transfer", "assignment", "optim", "max_steps")
        part = repr([getattr(cfg, name) for name in names])
        if part not in known:
            known[part] = build(cfg)
        return known[part]

    patch = pytest.MonkeyPatch()
    patch.setattr(checks, "problems_of_model", build_once)
    for name, cfg in configurations.items():
        tried = {key for _, key, _ in found if not key.startswith("model.")}
        for key in (key for key in keys(cfg) if key not in tried):
            for label, value in VALUES.items():
                try:
                    checks.check(checks.read(changed(cfg, key, value)))
                    found[name, key, label] = None
                except ConfigError as error:
                    found[name, key, label] = str(error)
    patch.undo()
    return found


def test_what_is_not_legal_is_refused_and_named(verdicts):
    accepted = [case for case, message in verdicts.items() if message is None and case[2] not in legal(case[1])]
    assert accepted == []

    def named(key, message):
        # Rules of an assignment and patterns of AdamW may be refused for what they do to a parameter.
        return key in message or (key in ("assignment.rules", "optim.always_adamw") and "assignment: " in message)

    unnamed = [case for case, message in verdicts.items() if message is not None and not named(case[1], message)]
    # A value that is legal by itself may be refused beside others, such as unit weights beside another manifold.
    assert [case for case in unnamed if case[2] not in legal(case[1])] == []


def legal(key):
    return LEGAL.get(key, NOTHING)


def test_what_is_legal_is_accepted_somewhere(verdicts):
    there = {key for _, key, _ in verdicts}
    assert there.issuperset(LEGAL)
    accepted = {(key, label) for (_, key, label), message in verdicts.items() if message is None}
    assert {(key, label) for key, labels in LEGAL.items() for label in labels} == accepted


def test_every_setting_is_in_one_of_the_configurations(configurations):
    """A setting that no configuration has would not be tried."""

    def names(type, prefix=""):
        for name, kind in Section(type).kinds.items():
            yield prefix + name
            parts = [getattr(kind, "type", None), getattr(getattr(kind, "kind", None), "type", None)]
            of_variants = {} if name == "residual" else getattr(kind, "types", {})
            for part in filter(None, [*parts, *of_variants.values()]):
                yield from names(part, f"{prefix}{name}.")

    tried = {key for cfg in configurations.values() for key in keys(cfg)}
    assert set(names(Settings)) - tried == set()


def test_the_choices_are_what_there_is():
    kinds = Section(Settings).kinds
    assert set(kinds["model"].kinds["mlp"].choices) == set(MLPS)
    for source in kinds["data"].types.values():
        assert set(Section(source).kinds["tokenizer"].choices) == set(TOKENIZERS)


def test_a_missing_and_an_unknown_key_are_named(configurations):
    for cfg in configurations.values():
        for key in keys(cfg):
            without = copy.deepcopy(cfg)
            *path, last = key.split(".")
            place = without
            for name in path:
                place = place[name]
            del place[last]
            in_mapping = any(part in key for part in ("rules.", "lr_scale.", "parts."))
            found = [problem.key for problem in read_sound(without)[1]]
            assert in_mapping or key in found
    [problem] = read_sound({**configurations["default"], "grad_clipp": 1.0})[1]
    assert str(problem) == "grad_clipp is no setting; did you mean grad_clip?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grad_clip=0", "grad_clip is 0; give a number above 0 (null switches it off)"),
        ("probe.interval=0", "probe.interval is 0; give a whole number of at least 1 (null switches it off)"),
        ("model.bias=no", "model.bias is 'no'; choose true or false (no is text here; write false)"),
        ("allow_changes=off", "allow_changes is 'off'; choose true or false (off is text here; write false)"),
        ("compile=yes", "compile is 'yes'; choose one of auto, true, false (yes is text here; write true)"),
        ("schedule.kind=cosin", "schedule.kind is 'cosin'; choose one of cosine, linear, constant, wsd"),
        ("max_steps=0", "the configuration has 1 problem"),
        ("resume=Auto", "give the path of a checkpoint (write auto in small letters)"),
        ("device=gpu", "device is 'gpu'; choose one of auto, cpu, cuda"),
        ("optim.adamw.eps=0", "optim.adamw.eps is 0; give a number above 0"),
        ("data=bin", "data.dir is missing; give data.dir=<path>"),
        ("data=mix", "data.parts is missing; give data.parts={...}"),
        (
            "optim.muon.rule.kind=published",
            "optim.muon.rule has the settings of another kind; choose all of them with optim=, of which",
        ),
        (
            "residual.rule=geonorm",
            "1 problem; nothing was written:\n  - residual.rule is 'geonorm', but residual has the settings of",
        ),
        ("residual.rule=geonorm", "another rule; choose all of them with residual=geonorm"),
        ("average.kind=window", "but average has the settings of another kind; choose all of them with average=window"),
        ("transfer.rule=nu", "choose all of them with transfer=nu"),
        (
            "data.source=text",
            "1 problem; nothing was written:\n  - data.source is 'text', but data has the settings of another source",
        ),
        ("model=gpt2", "model has no choice gpt2; did you mean gpt2_124m, "),
        ("optim.muon.rate=1", "optim.muon.rate is no setting; python train.py --help lists the settings"),
        ("optim.adamw.betas=[0.9]", "give a list of 2, and for each item a number of at least 0 and below 1"),
        ("launcher.nproc=0", "launcher.nproc is 0; give a whole number from 1 to 1,024"),
        (
            "schedule.warmup_steps=2.5",
            "give a whole number of updates, 0 or more, or a share of schedule.decay_steps below 1",
        ),
        ("max_steps=1e16", "give a whole number of at least 1, and at most 1e+15"),
        ("name=5", """give text of 1 to 200 bytes (null means the assignment's); as text it is written '"5"'"""),
        ("name='  '", "give text of 1 to 200 bytes (null means the assignment's); it is blank"),
        ("eval_interval=0", "1 problem; nothing was written:\n  - eval_interval is 0; give a whole number"),
        ("max_steps=nan", "1 problem; nothing was written:\n  - max_steps is nan; give a whole number"),
        ("log.interval_spectra=-1", "1 problem; nothing was written:\n  - log.interval_spectra is -1; give a whole"),
        (
            "log=null",
            "log is null; give a section with the keys interval, interval_spectra, interval_certificate, interval_updates",
        ),
        ("optim.muon.blocks={attn: 0}", "optim.muon.blocks.attn is 0; give a whole number of at least 1"),
        (f"name={'x' * 300}", "... (302 characters); give text of 1 to 200 bytes"),
        ("schedule.decay_steps=${nope}", "'nope' not found"),
    ],
)
def test_the_message_says_what_to_give(override, message):
    with pytest.raises(ConfigError) as caught:
        checks.check(compose([override]))
    said = str(caught.value)
    assert message in said and not ("did you mean" in said and "did you mean" not in message)


@pytest.mark.parametrize(("key", "source"), checks.FOLLOWS.items())
def test_a_setting_follows_another_one(key, source):
    cfg = compose_plain([f"{source}=7"])
    assert reduce(lambda section, name: section[name], key.split("."), cfg) == 7


def test_whole_numbers_may_have_an_exponent_and_other_numbers_may_be_whole():
    cfg = compose(["eval_windows=1e9", "data.max_tokens=2e6", "optim.adamw.lr=1"])
    assert (cfg.eval_windows, cfg.data.max_tokens) == (10**9, 2 * 10**6)
    assert type(cfg.eval_windows) is int and type(cfg.optim.adamw.lr) is float
    checks.check(cfg)


def test_a_rate_of_matrices_that_adamw_has_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.matrices has no effect here: AdamW has every matrix"):
        checks.check(compose(["assignment=adamw", "optim.matrices.lr=0.1"]))


def test_a_path_may_begin_at_home(monkeypatch):
    """The commands that prepare data and that train find the same folder, whatever the shell leaves to them."""
    monkeypatch.setenv("HOME", "/home/me")
    cfg = compose(["data.dir='~/data'", "output_dir='~/run'"])
    assert (cfg.data.dir, cfg.output_dir) == ("/home/me/data", "/home/me/run")


def test_settings_are_typed(configurations):
    for cfg in configurations.values():
        settings = checks.read(cfg)
        assert settings.plain() == cfg
        assert settings.model.n_embd == cfg["model"]["n_embd"] and settings.data.dir == cfg["data"]["dir"]
        assert settings.optim.adamw.betas == (0.9, 0.95) and settings.optim.muon.rule.kind in ("published", "certified")
        assert settings.stability.warning.horizon == cfg["stability"]["warning"]["horizon"]
    with pytest.raises(ConfigError, match="seed is -1"):
        checks.read({**cfg, "seed": -1})


# ---- the command line ----

LINES = [
    (["max_stepz=3"], "max_stepz is no setting; did you mean max_steps?"),
    (["assignment=heterro"], "assignment has no choice heterro; did you mean hetero?"),
    (["+assignment.rule=1"], "assignment.rule is no setting; did you mean rules?"),
    (["seed=["], "seed=[ cannot be read"),
    (["schedule.decay_steps=${nope}"], "'nope' not found"),
    (["allow_changes=no"], "write false"),
    (["optim.muon.nesterov=off", "attention.qk_norm=off", "data.auto_prepare=no"], "3 problems"),
    (["optim.muon.rule.length=foo"], "spectral"),
    (["launcher.checksum_interval=0"], "null switches it off"),
    (["launcher.nproc=2", "optim.adamw.betas=[0.9]"], "a list of 2"),
    (["max_steps=null", "seed=1.5", "model.dropout=abc"], "problems"),
    (["optim.muon.lr=inf", "schedule.floor=2"], "2 problems"),
    (["data.max_tokens=-5", "data.dir=null"], "2 problems"),
    (["launcher.nproc=0"], "from 1 to 1,024"),
    (["output_dir=file/run"], "file is a file"),
    (["output_dir=file"], "file is a file"),
    ([f"output_dir={'x' * 300}"], "each name of it up to 255"),
    (["~log"], "log is missing"),
    (["global_batch_tokens=2000", "launcher.nproc=3"], "use global_batch_tokens=1920 or 2304"),
    (["max_stepz=3", "--cfg", "job"], "has 1 problem;"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line[0][:30] for line, _ in LINES])
def test_a_wrong_command_line_ends_with_code_2(line, message, tmp_path, train_here):
    (tmp_path / "file").write_text("")
    done = train_here(*line)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


REAL = [pytest.param(*case, marks=[] if i < 1 else pytest.mark.campaign) for i, case in enumerate(LINES)]


@pytest.mark.parametrize(("line", "message"), REAL)
def test_a_wrong_command_line_as_its_own_process(line, message, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_train(*line, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_sweep_says_what_is_wrong_with_each_job(tmp_path, train_here):
    done = train_here("-m", "model.bias=no", "seed=1,-2")
    said = done.stderr.splitlines()
    assert done.returncode == 2 and said[0] == "the configuration has 2 problems; nothing was written:"
    assert said[1].startswith("  - model.bias is 'no'; ") and " (in " not in said[1]
    assert said[2].startswith("  - seed is -2; ") and said[2].endswith("(in seed=-2)") and len(said) == 3
    assert not list(tmp_path.iterdir())
