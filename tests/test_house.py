"""Structure of the package: imports, module names and use of private interfaces."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

import pogo_torchrl
from pogo_torchrl import torchrl_private

PACKAGE = Path(torchrl_private.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text()) for file in FILES}


def test_the_loss_needs_no_simulator_no_hydra_and_no_files():
    code = (
        "import sys\n"
        "for name in ('mujoco', 'hydra', 'omegaconf', 'matplotlib', 'h5py', 'submitit'):\n"
        "    sys.modules[name] = None\n"
        "from pogo_torchrl import POGOLoss, POGOTrainer, load_actors\n"
        "ours = {name.split('.')[1] for name in sys.modules if name.startswith('pogo_torchrl.')}\n"
        "assert ours.isdisjoint({'envs', 'data', 'experiments', 'report', 'cli'}), ours\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_and_its_help_load_nothing():
    code = (
        "import sys\n"
        "import pogo_torchrl, pogo_torchrl.cli\n"
        "assert 'POGOLoss' in dir(pogo_torchrl)\n"
        "pogo_torchrl.cli.main(['--help'])\n"
        "assert sys.modules.keys().isdisjoint({'torch', 'numpy', 'hydra'})\n"
    )
    # With MUJOCO_GL, which the video of another test sets, MuJoCo is imported first.
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_names_and_modules_of_the_package():
    assert set(pogo_torchrl.__all__) <= set(dir(pogo_torchrl))
    for name in pogo_torchrl.__all__:
        assert getattr(pogo_torchrl, name).__name__ == name
    assert pogo_torchrl.modules.TransportActor is pogo_torchrl.TransportActor
    with pytest.raises(AttributeError, match="no attribute 'POGOLos'"):
        pogo_torchrl.POGOLos  # noqa: B018


def test_module_names_are_unique_and_do_not_shadow_the_standard_library():
    names = [file.stem for file in FILES if not file.stem.startswith("__")]
    names += [file.parent.name for file in FILES if file.stem == "__init__"]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert set(names) & sys.stdlib_module_names == set()


def test_modules_are_short():
    lengths = {name: len((PACKAGE / name).read_text().splitlines()) for name in TREES}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


def defined(tree: ast.AST) -> set[str]:
    """Return the names that a module defines or assigns."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def test_private_interfaces_of_other_packages_are_used_in_one_module():
    """Attributes with an underscore that the package does not define belong to other packages."""
    ours = set().union(*map(defined, TREES.values()))
    allowed = {
        "_replace",
        "_max_episode_steps",
    }  # of named tuples; of the gym version pinned by D4RL
    found = {
        f"{name}: {ast.unparse(node)}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in ours | allowed
        and name != "torchrl_private.py"
    }
    assert found == set()


@pytest.fixture
def reset_warnings():
    """Let warnings that are issued once be issued again."""
    torchrl_private._warn_once.cache_clear()
    yield
    torchrl_private._warn_once.cache_clear()


def test_without_torchrls_stages_hooks_are_called_directly(reset_warnings):
    batch, other = TensorDict(a=torch.zeros(1)), TensorDict(a=torch.ones(1))
    seen = []
    trainer = SimpleNamespace(
        stages={
            "process_optim_batch": [(lambda td: other, {}), (seen.append, {})],
            "setup": [(lambda value: seen.append(value), {"value": 3})],
        }
    )
    with pytest.warns(UserWarning, match=r"no Trainer\._process_optim_batch_hook"):
        assert torchrl_private.run_stage(trainer, "process_optim_batch", batch) is other
    with pytest.warns(UserWarning, match=r"no Trainer\._setup_hook"):
        torchrl_private.run_stage(trainer, "setup")
    assert seen[0] is other
    assert seen[1] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning is issued only once
        torchrl_private.run_stage(trainer, "setup")


def test_without_torchrls_counter_updates_still_run(reset_warnings):
    with pytest.warns(UserWarning, match=r"no Trainer\._optim_count"):
        torchrl_private.count_updates(SimpleNamespace(), 3)
    trainer = SimpleNamespace(_optim_count=2)
    torchrl_private.count_updates(trainer, 3)
    assert trainer._optim_count == 5


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_torchrls_reduction_losses_are_the_same(
    reset_warnings, monkeypatch, make_loss, make_batch, reduction, weighted
):
    loss, batch = make_loss(reduction=reduction), make_batch()
    if weighted:
        batch["priority_weight"] = torch.rand(8)
    values = torch.randn(8)
    expected = loss.reduce(values, batch)
    for owner in type(loss).__mro__:
        if "_reduce_loss" in vars(owner):
            monkeypatch.delattr(owner, "_reduce_loss")
    with pytest.warns(UserWarning, match=r"no LossModule\._reduce_loss"):
        torch.testing.assert_close(loss.reduce(values, batch), expected)
