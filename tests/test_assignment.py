"""Assignments: which pattern matches what, what is refused, what is printed, and what the optimizers receive."""

import pickle

import pytest
import torch

from model.gpt import GPT, GPTConfig
from optim.assignment import AssignmentError, assign, matches, parameter_table
from training.build import build_optimizers
from training.checks import check
from training.config import compose
from training.validate import ConfigError

TABLES = ["wte|wpe|lm_head"]
SHAPES = {
    "transformer.wte.weight": (64, 16),
    **{
        f"transformer.h.{layer}.{name}.weight": shape
        for layer in range(4)
        for name, shape in {
            "ln_1": (16,),
            "attn.c_attn": (48, 16),
            "attn.c_proj": (16, 16),
            "mlp.c_fc": (64, 16),
            "mlp.c_proj": (16, 64),
        }.items()
    },
}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("attn", "transformer.h.0.attn.c_attn.weight", True),
        ("*.attn.*", "transformer.h.0.attn.c_attn.weight", True),
        ("attn", "transformer.h.0.mlp.c_fc.weight", False),
        ("att", "transformer.h.0.attn.c_attn.weight", False),
        ("attn.c_attn", "transformer.h.0.attn.c_attn.weight", True),
        ("attn.c_attn", "transformer.h.0.attn.c_proj.weight", False),
        ("attn|mlp", "transformer.h.0.mlp.c_proj.weight", True),
        ("c_*", "transformer.h.0.mlp.c_proj.weight", True),
        ("h.0-3.mlp", "transformer.h.3.mlp.c_fc.weight", True),
        ("h.0-3.mlp", "transformer.h.4.mlp.c_fc.weight", False),
        ("h.2-11.mlp", "transformer.h.10.mlp.c_fc.weight", True),
        ("h.1.attn", "transformer.h.11.attn.c_attn.weight", False),
        ("h.0-1|3.mlp", "transformer.h.1.mlp.c_fc.weight", True),
        ("h.0-1|3.mlp", "transformer.h.2.mlp.c_fc.weight", False),
        ("h.0-1|3.mlp", "transformer.h.3.mlp.c_fc.weight", True),
        ("h.5|0-1|ln_*", "transformer.h.1.ln_1.weight", True),
    ],
)
def test_patterns_match_whole_components(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_hetero_gives_every_parameter_to_one_optimizer():
    rows = {row.name: row for row in assign(SHAPES, {"attn": "stiefel", "mlp": "dgram"}, TABLES)}
    assert rows.keys() == SHAPES.keys()
    for name, row in rows.items():
        expected = "stiefel" if ".attn." in name else "dgram" if ".mlp." in name else None
        assert (row.manifold, row.optimizer) == (expected, "ManifoldMuon" if expected else "AdamW")
        assert row.ruled is (expected is not None)


@pytest.mark.parametrize(
    ("rules", "complaints"),
    [
        (
            {"attn": "stiefel"},
            ["no rule matches 'transformer.h.0-3.mlp.c_fc.weight', ", "add one, such as c_fc: adamw"],
        ),
        (
            {"attn": "stiefel", "mlp": "dgram", "c_attn": "dgram"},
            ["several rules ('attn', 'c_attn') match 'transformer.h.0-3.attn.c_attn.weight'; keep one"],
        ),
        (
            {"attn": "stiefel", "mlp.c_fc": "dgram"},
            [
                "no rule matches 'transformer.h.0-3.mlp.c_proj.weight'",
                "such as transformer.h.0.mlp.c_proj.weight: adamw",
            ],
        ),
        ({"attn": "steifel", "mlp": "dgram"}, ["asks for 'steifel'", "stiefel"]),
        (
            {"attn": "stiefel", "mlp": "dgram", "atn": "dgram"},
            ["'atn' matches no matrix; remove it: assignment=custom"],
        ),
        (
            {"atn": "stiefel", "mlp": "dgram", "h.9.mlp": "dgram"},
            ["'atn' matches no matrix; did you mean 'attn'?", "'h.9.mlp' matches no matrix; remove it"],
        ),
        (
            {"h.0.attn|h.2.attn": "stiefel"},
            ["matches no matrix; alternatives stand between two dots, such as h.0|2.attn"],
        ),
        ({"h.0|h.2": "stiefel"}, ["matches no matrix; alternatives stand between two dots"]),
        ({"h.0|2.atn": "stiefel"}, ["'h.0|2.atn' matches no matrix; did you mean 'attn'?"]),
        (
            {"attn": "stiefel", "mlp": "dgram", "wte": "stiefel"},
            ["claims 'transformer.wte.weight', which is always AdamW's"],
        ),
        ({"attn|mlp": "dgram", "ln_1": "stiefel"}, ["'ln_1' matches no 2-D parameter, and all others are AdamW's"]),
    ],
)
def test_mistakes_name_the_parameter_and_the_remedy(rules, complaints):
    with pytest.raises(AssignmentError) as caught:
        assign(SHAPES, rules, TABLES)
    for complaint in complaints:
        assert complaint in str(caught.value)


def test_all_mistakes_come_at_once():
    with pytest.raises(AssignmentError) as caught:
        assign(SHAPES, {"attn": "steifel", "nothing": "dgram"}, TABLES)
    assert len(caught.value.problems) == 2 + 1  # a manifold, a rule, and the MLP matrices without one


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["assignment=custom"], ["no rule matches 'transformer.h.0-3.attn.c_attn.weight'", "and 1 more; add one"]),
        (["optim.muon.blocks={c_attn: 5}"], ["blocks of 'transformer.h.0-3.attn.c_attn.weight' is 5; give a whole"]),
        (["optim.muon.radius={mlp: 2}"], ["c_proj.weight' on 'dgram' is 2; give a number above 0"]),
        (["optim.adamw.lr_scale={lm_head: 0.5}"], ["tied to another one has the name of the first"]),
        (["assignment=adamw", "optim.muon.radius={mlp: 2}"], ["'mlp' belongs to AdamW here; remove the pattern"]),
        (["assignment=unconstrained", "optim.adamw.lr_scale={mlp: 2}"], ["'mlp' belongs to ManifoldMuon here"]),
        (
            ["model.mlp=none"],
            ["'mlp' matches no matrix; remove it: assignment=custom 'assignment.rules={attn: stiefel}'"],
        ),
        (
            ["optim.always_adamw=[wte, wpe, lm_haed]"],
            ["optim.always_adamw: the pattern 'lm_haed' matches no parameter"],
        ),
        (["optim.norms.tables=[wte, wpf]"], ["optim.norms.tables: the pattern 'wpf' matches no parameter"]),
        (["optim.always_adamw=[attn, wte, wpe]"], ["rule 'attn' claims 'transformer.h.0-3.attn", "optim.always_adamw"]),
    ],
)
def test_a_mistake_is_one_line_for_all_layers(overrides, said):
    with pytest.raises(ConfigError) as caught:
        check(compose(overrides))
    assert len(caught.value.problems) == 1 and all(part in str(caught.value) for part in said), caught.value


def test_table_folds_equal_layers():
    rules = {"attn": "stiefel", "h.0-1.mlp": "dgram", "h.2-3.mlp": "oblique"}
    table = parameter_table(assign(SHAPES, rules, TABLES), {"transformer.wte.weight": "lm_head"})
    assert "transformer.h.0-3.attn.c_attn.weight" in table
    assert any("h.0-1.mlp.c_fc" in line and "dgram" in line for line in table.splitlines())
    assert any("h.2-3.mlp.c_fc" in line and "oblique" in line for line in table.splitlines())
    assert "transformer.wte.weight (= lm_head)" in table
    assert len(table.splitlines()) == 1 + 1 + 1 + 2 + 2 + 2


def test_table_folds_the_first_number_of_a_name_only():
    shapes = {f"model.h.{layer}.experts.{expert}.weight": (8, 4) for layer in range(3) for expert in range(2)}
    _, *lines = parameter_table(assign(shapes, {"experts": "stiefel"}, [])).splitlines()
    assert [line.split()[0] for line in lines] == [f"model.h.0-2.experts.{expert}.weight" for expert in range(2)]


def tiny(assignment, *overrides):
    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16, bias=True))
    return model, build_optimizers(model, compose([f"assignment={assignment}", *overrides]))


def test_optimizers_cover_the_model_once_and_decay_matrices_only():
    model, optimizers = tiny("hetero")
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()} and len(owned) == len(list(model.parameters()))
    adamw = list(optimizers)[-1]
    for group in adamw.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_adamw_assignment_has_no_muon():
    _, optimizers = tiny("adamw")
    assert optimizers.muon is None and len(list(optimizers)) == 1


def test_finer_rules_compose_from_the_command_line():
    _, optimizers = tiny(
        "custom", "assignment.rules={attn.c_attn: stiefel, attn.c_proj: dgram, h.0.mlp: oblique, h.1.mlp: euclidean}"
    )
    chosen = {row.name: row.manifold for row in optimizers.rows}
    assert chosen["transformer.h.1.attn.c_proj.weight"] == "dgram"
    assert (
        chosen["transformer.h.0.mlp.c_fc.weight"] == "oblique"
        and chosen["transformer.h.1.mlp.c_fc.weight"] == "euclidean"
    )


def test_one_schedule_scales_every_peak_rate():
    _, optimizers = tiny("hetero", "optim.muon.lr=0.02", "optim.adamw.lr=6e-4")
    optimizers.set_lr(0.5)
    optimizers.set_lr(0.25)  # relative to the peak, not to the last value
    muon, adamw = optimizers
    assert all(isinstance(g["lr"], torch.Tensor) and g["lr"].item() == pytest.approx(0.005) for g in muon.param_groups)
    assert all(g["lr"] == pytest.approx(1.5e-4) for g in adamw.param_groups)


def test_an_error_keeps_its_problems_in_a_pickle():
    error = pickle.loads(pickle.dumps(AssignmentError(["one", "two"])))
    assert error.problems == ["one", "two"] and str(error) == "one\ntwo"
