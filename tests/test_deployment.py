"""Deployment without this package (torch.export and ONNX), and without the training stack."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ConvNet

import pogo_torchrl
from pogo_torchrl import TransportActor, load_actors, make_actor, make_qvalue
from pogo_torchrl.export import on_raw_observations, save_actors
from pogo_torchrl.modules import make_transport_net

BATCH = torch.export.Dim("batch", min=1, max=1024)


@pytest.fixture
def actor(wide_spec):
    """An actor with the normalisation of its observations, as ``load_actors`` returns it."""
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 1.0])
    raw = on_raw_observations(make_actor(3, wide_spec, (8, 8)), mean, std)
    return raw.requires_grad_(False).eval()


def inputs(*sizes, rows):
    return tuple(torch.randn(rows, n) for n in sizes)


def dynamic(args):
    return tuple({0: BATCH} for _ in args)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("sizes", [(3,), (3, 2)], ids=["deterministic", "with z"])
def test_an_exported_actor_acts_equally_on_batches_of_any_size(actor, sizes, strict):
    args = inputs(*sizes, rows=4)
    program = torch.export.export(actor, args, dynamic_shapes=dynamic(args), strict=strict)
    for rows in (1, 9):
        new = inputs(*sizes, rows=rows)
        torch.testing.assert_close(program.module()(*new), actor(*new))


def test_export_by_name(actor):
    s, z = inputs(3, 2, rows=4)
    program = torch.export.export(actor, (), kwargs={"observation": s, "noise": z})
    torch.testing.assert_close(program.module()(observation=s, noise=z), actor(s, z))


def test_a_critic_is_exported(actor):
    qvalue, args = make_qvalue(3, 2, (8,)), inputs(3, 2, rows=4)
    program = torch.export.export(qvalue, args, dynamic_shapes=dynamic(args))
    new = inputs(3, 2, rows=9)
    torch.testing.assert_close(program.module()(*new), qvalue(*new))


def test_a_saved_program_needs_torch_only(actor, tmp_path):
    (s,) = args = inputs(3, rows=4)
    program = torch.export.export(actor, args, dynamic_shapes=dynamic(args))
    torch.export.save(program, tmp_path / "policy.pt2")
    torch.save({"s": s, "a": actor(s)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "for name in ('pogo_torchrl', 'torchrl', 'tensordict'):\n"
        "    sys.modules[name] = None\n"
        "policy = torch.export.load('policy.pt2').module()\n"
        "expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(policy(expected['s']), expected['a'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class Policy(nn.Module):
    """The pattern of docs/howto/deployment.md for actors with further inputs."""

    def __init__(self, actor):
        super().__init__()
        self.actor = actor

    def forward(self, pixels, noise):
        inputs = TensorDict({"pixels": pixels, "noise": noise}, pixels.shape[:1])
        return self.actor(inputs)["action"]


@pytest.fixture
def pixel_policy(wide_spec):
    net = ConvNet(in_features=1, num_cells=[2], kernel_sizes=4, strides=4)
    head = TransportActor(make_transport_net(8, 2, (8,)), wide_spec, in_keys=["code"])
    return Policy(TensorDictSequential(TensorDictModule(net, ["pixels"], ["code"]), head))


def test_an_actor_behind_an_encoder_is_exported(pixel_policy):
    args = torch.rand(4, 1, 8, 8), torch.randn(4, 2)
    program = torch.export.export(pixel_policy, args, dynamic_shapes=dynamic(args))
    new = torch.rand(9, 1, 8, 8), torch.randn(9, 2)
    torch.testing.assert_close(program.module()(*new), pixel_policy(*new))


@pytest.mark.parametrize("sizes", [(3,), (3, 2)], ids=["deterministic", "with z"])
def test_onnx_agrees(actor, sizes, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path, names = tmp_path / "policy.onnx", ["observation", "noise"][: len(sizes)]
    args = inputs(*sizes, rows=4)
    torch.onnx.export(
        actor,
        args,
        path,
        dynamo=True,
        input_names=names,
        output_names=["action"],
        dynamic_shapes=dynamic(args),
    )
    session = runtime.InferenceSession(path)
    for rows in (1, 9):
        new = inputs(*sizes, rows=rows)
        (action,) = session.run(["action"], {k: v.numpy() for k, v in zip(names, new)})
        torch.testing.assert_close(torch.as_tensor(action), actor(*new), rtol=0, atol=1e-5)


def test_other_arguments_are_still_rejected(actor):
    s, a = torch.zeros(4, 3), torch.zeros(4, 2)
    for module, second in ((actor, "noise"), (make_qvalue(3, 2, (8,)), "action")):
        with pytest.raises(TypeError, match=rf"the inputs are \['observation', '{second}'\]"):
            module(s, a, a)
        with pytest.raises(TypeError, match=r"unexpected argument\(s\) \['typo'\]"):
            module(s, a, typo=a)


TRAINING_STACK = (
    "torchrl", "gymnasium", "geomloss", "mujoco", "hydra", "omegaconf", "matplotlib", "h5py",
    "filelock", "tqdm",
)  # fmt: skip

ACT = """
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, set_interaction_type
from pogo_torchrl import TransportActor, load_actors

expected = torch.load("expected.pt")
actor = load_actors("policy.safetensors")[-1]
assert isinstance(actor, TransportActor)
assert torch.equal(actor(observation=expected["s"]), expected["a"])
assert torch.equal(actor(TensorDict(observation=expected["s"]))["action"], expected["a"])
torch.manual_seed(0)
with set_interaction_type(InteractionType.RANDOM):
    assert torch.equal(actor(expected["s"]), expected["random"])
assert torch.equal(actor.action_spec.space.low, expected["low"])
assert actor.noise_dim == 2
"""


@pytest.fixture
def saved(actor, tmp_path):
    """Folder with a policy file, and what its actor does."""
    save_actors(tmp_path / "policy.safetensors", [actor], hidden_sizes=(8, 8))
    loaded = load_actors(tmp_path / "policy.safetensors")[-1]
    (s,) = inputs(3, rows=4)
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.RANDOM):
        drawn = loaded(s)
    found = {"s": s, "a": loaded(s), "random": drawn, "low": actor.action_spec.space.low}
    torch.save(found, tmp_path / "expected.pt")
    return tmp_path


def test_loaded_actors_act_equally_without_the_training_stack(saved):
    code = f"import sys\nfor name in {TRAINING_STACK}:\n    sys.modules[name] = None\n{ACT}"
    done = subprocess.run([sys.executable, "-c", code], cwd=saved, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def distributions(*names):
    """Installed distributions and all that they require."""
    found, todo = {}, list(names)
    while todo:
        name = re.split(r"[^\w.-]", todo.pop(), maxsplit=1)[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system or Python
            continue
        todo += [line for line in found[name].requires or () if "extra ==" not in line]
    return found


@pytest.mark.slow
def test_loaded_actors_act_equally_in_an_environment_with_torch_and_tensordict_only(saved):
    venv.create(saved / "venv", symlinks=True)
    (site,) = (saved / "venv").glob("lib/python*/site-packages")
    found = distributions("torch", "tensordict", "safetensors", "numpy")
    assert found.keys().isdisjoint({"torchrl", "gymnasium", "geomloss", "mujoco", "hydra-core"})
    for distribution in found.values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    (site / "pogo_torchrl").symlink_to(Path(pogo_torchrl.__file__).parent)
    done = subprocess.run(
        [saved / "venv" / "bin" / "python", "-I", "-c", ACT + "import torchrl"],
        cwd=saved,
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'torchrl'"
