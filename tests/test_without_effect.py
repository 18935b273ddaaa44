"""A setting that does nothing beside the others is named when the run starts; one that the user did not give is not."""

import pytest

from training.checks import check, read
from training.config import resolved
from training.effects import EFFECTS, FIXED_SIZE, ONE_RANK, ONLY_SWEEP, without_effect
from training.overrides import composed, keys_set

NO_SIZE, NO_MATRIX = "no matrix has a size that is free to decay", "ManifoldMuon has no matrix"
NO_CONDITION = "no matrix is on a manifold whose steps fulfil a condition"
AT_ZERO = "the residual rule lets these matrices start at zero"
CASES = [
    (
        "schedule=constant assignment=all_stiefel logger.mode=disabled probe.interval=null",
        {
            "schedule.decay_steps=50": "schedule=constant stays at the peak",
            "optim.muon.rule.iterator=you_jiacheng": "no matrix is unconstrained or in the spectral ball",
            "init.weight_scale=3": FIXED_SIZE,
            "init.residual_scale=2": FIXED_SIZE,
            "init.attention_residual_scale=2": FIXED_SIZE,
            "allow_changes=true": "resume is never",
            "launcher.shard=fsdp": ONE_RANK,
            "launcher.checksum_interval=10": ONE_RANK,
            "launcher.timeout_s=60": ONE_RANK,
            "sweep.name=mine": ONLY_SWEEP,
            "schedule.floor=0.1": "schedule=constant stays at the peak",
            "schedule.decay=0.5": "it is for schedule=wsd",
            "attention.qk_clip_on=weights": "attention.qk_clip is null",
            "model.storage=0.5": "model.unit_weights is false",
            "optim.muon.rule.norm_cap=4": "no matrix is on a manifold with free column norms, such as dgram",
            "optim.muon.weight_decay=9": NO_SIZE,
            "optim.muon.block_length=whole": "optim.muon.blocks cuts no matrix",
            "optim.norms.tables=[wte]": "it is for optim=modular and log.interval_updates",
            "probe.windows=1": "probe.interval and log.interval_updates are null",
            "stability.z_steps=3": "stability.z_threshold is null",
            "stability.warning.entropy=0.2": "probe.interval is null",
            "logger.group=mine": "logger.mode is disabled",
        },
    ),
    ("assignment=all_oblique optim.muon.blocks={c_attn:3}", {"init.attention_scale=4": FIXED_SIZE}),
    ("init_from=x", {"init.residual_scale=2": "the weights come from init_from"}),
    ("max_steps=4", {"profile=3": "a trace begins after 4 updates, which is the end"}),
    (
        "optim=modular assignment=unconstrained optim.matrices.lr=0.1",
        {
            "optim.adamw={lr: 5}": "AdamW has no parameter, since optim.modular has all",
            "optim.modular.lr=1": "optim.matrices.lr replaces it",
            "optim.muon.momentum=0.5": NO_MATRIX,
            "log.interval_certificate=25": NO_MATRIX,
        },
    ),
    (
        "optim=paper assignment=unconstrained residual=pre_rms_norm resume=a/checkpoints/step_00000001",
        {
            "optim.muon.rule.dual_steps=2": NO_CONDITION,
            "optim.muon.rule.alpha=0.5": NO_CONDITION,
            "optim.muon.rule.decay_manifolds=true": "no matrix is on a manifold with a retraction",
            "init.mlp_residual_scale=5": AT_ZERO,
            "init_from=x": "resume names a checkpoint",
        },
    ),
    (
        "residual=geonorm_with_norms model.mlp=none assignment=custom assignment.rules={attn:stiefel}",
        {
            "residual.radius=unit": "residual.embedding is none, so every token keeps its length",
            "init.weight_scale=2": "model.mlp is none",
        },
    ),
    (
        "experiment=nugpt_demo",
        {"residual.storage=1": "the transfer replaces it", "optim.muon.weight_decay=1": NO_MATRIX},
    ),
    (
        "optim=paper assignment=all_dgram optim.muon.rule.iterator=polar_express stability.warning.logit=null",
        {
            "optim.muon.weight_decay=1": NO_SIZE,
            "optim.muon.rule.msign_steps=3": "optim.muon.rule.iterator replaces it",
            "stability.warning.horizon=3": "there is no forecast without stability.warning.logit",
        },
    ),
    (
        "optim=sgd optim.matrices.weight_decay=0",
        {"optim.library.weight_decay=1": "optim.matrices.weight_decay replaces it"},
    ),
]


def remarks(words):
    config = composed(words)
    cfg = read(resolved(config))
    check(cfg)
    return without_effect(cfg, keys_set(words, config), sweep=False)


@pytest.mark.parametrize(("beside", "idle"), CASES)
def test_each_setting_without_effect_is_named_with_the_reason(beside, idle):
    keys = [word.replace("={lr: ", ".lr=").partition("=")[0] for word in idle]
    expected = [f"{key} has no effect: {why}" for key, why in zip(keys, idle.values())]
    assert remarks([*beside.split(), *idle]) == expected


def test_the_cases_have_every_reason():
    assert {ONLY_SWEEP, *(why for _, _, why in EFFECTS)} == {why for _, idle in CASES for why in idle.values()}


@pytest.mark.parametrize(
    "words",
    [
        "optim=torch_muon optim.muon.lr=0.1",  # its rate refers to this one
        "schedule=wsd schedule.decay=0.5 attention=qk_clip attention.qk_clip_on=gain optim.adamw.lr=1 probe.windows=1 "
        "assignment=all_dgram optim.muon.weight_decay=1 optim.muon.rule.norm_cap=4 stability.warning.horizon=9 seed=3",
        "experiment=paper schedule=constant assignment=all_stiefel optim=no_decay",  # the files set the rest
        "schedule=constant schedule.decay_steps=50 schedule.warmup_steps=0.1",
        "assignment=all_stiefel init.attention_scale=2 launcher.nproc=2 launcher.shard=fsdp launcher.checksum_interval=9 launcher.timeout_s=60",
        "assignment=all_stiefel optim.muon.blocks={c_attn:2} init.attention_scale=2",
        "assignment=all_dgram optim.muon.blocks={c_attn:3} init.attention_scale=2",
        "assignment=all_dgram init.weight_scale=3 init.residual_scale=2 optim.muon.rule.quality=high resume=auto allow_changes=true",
        "assignment=all_spectral_ball init.residual_scale=2 optim.muon.rule.iterator=polar_express",
        "init_from=x optim.muon.rule.quality=high",
        "assignment=all_spectral_sphere optim.muon.rule.quality=high log.interval_certificate=9 residual=geonorm residual.radius=unit",
        "optim=paper assignment=hetero init.residual_scale=2 init.weight_scale=2 optim.muon.rule.iterator=polar_express",
        "assignment=adamw log.interval_certificate=null init.residual_scale=2",
        "optim.always_adamw=[wte,wpe,lm_head,mlp.c_fc] assignment=custom assignment.rules={attn:stiefel,mlp.c_proj:stiefel} "
        "init.weight_scale=2",
        "optim=paper assignment=all_dgram optim.muon.rule.decay_manifolds=true optim.muon.weight_decay=1",
        "optim=paper assignment=all_stiefel optim.muon.rule.decay_manifolds=true optim.muon.weight_decay=1",
        "schedule=constant schedule.warmup_steps=30 max_steps=20 schedule.decay_steps=50",
    ],
)
def test_what_has_an_effect_or_was_not_given_is_not_named(words):
    assert remarks(words.split()) == []


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_the_run_says_so_at_its_start(sweep, tiny, tmp_path, train_here):
    words = [word for word in tiny if not word.startswith(("max_steps=", "output_dir=" if sweep else "none"))]
    done = train_here(*sweep, *words, "max_steps=1", "assignment=adamw", "optim.muon.lr=0.3")
    assert done.returncode == 0 and done.stdout.count("optim.muon.lr has no effect: ManifoldMuon has no matrix\n") == 1
    assert done.stdout.count("has no effect") == 1
