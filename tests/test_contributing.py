"""Every recipe of CONTRIBUTING.md works as it stands: all are applied to a copy of the repository, whose tests are run there."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from documents import CONTRIBUTING, blocks

RECIPES = re.split(r"^## ", CONTRIBUTING.read_text(), flags=re.MULTILINE)[1:]
WHERE = re.compile(r"# ((?:\w+/)+\w+\.(?:py|yaml))(, at the end)?\n")
"""The first line of a block that belongs into a file."""
SOURCES = (
    "configs",
    "data",
    "model",
    "optim",
    "scripts",
    "tests",
    "training",
    "CONTRIBUTING.md",
    "pyproject.toml",
    "train.py",
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.partition("\n")[0])
def test_a_recipe_is_short(recipe):
    assert len(recipe.rstrip().splitlines()) < 40


def apply(block, root):
    """Do what a block says: write the file, append to it, or change what a diff shows. Returns its path, None for another block."""
    where = WHERE.match(block.code)
    if where is None:
        return None
    path, code = root / where[1], block.code[where.end() :]
    if block.language == "diff":
        old, new = ("".join(line[1:] for line in code.splitlines(True) if line[0] in f" {sign}") for sign in "-+")
        text = path.read_text()
        assert text.count(old) == 1, f"{where[1]} holds this {text.count(old)} times:\n{old}"
        path.write_text(text.replace(old, new))
    elif where[2]:
        path.write_text(f"{path.read_text()}\n\n{code}")
    else:
        assert not path.exists(), f"{where[1]} exists"
        path.write_text(code)
    return path


@pytest.mark.slow
def test_every_recipe_works_as_it_stands(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in SOURCES:
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "prepared"))
        else:
            shutil.copy(source, target)
    changed = {apply(block, copy) for block in blocks(CONTRIBUTING)} - {None}
    python = sorted(str(path) for path in changed if path.suffix == ".py")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", *python], cwd=copy, check=True)
    tests = ["tests/recipes.py", "tests/test_manifolds.py", "tests/test_residual.py", "tests/test_data_command.py"]
    tests += ["tests/test_library.py", "tests/test_wandb.py"]
    names = "recipes or frobenius or (layer_scale and not formula) or sums or nadam or measures"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", names]
    done = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
