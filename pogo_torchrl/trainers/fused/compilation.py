"""Compilation of an update, and its choice of matrix products."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pogo_torchrl.objectives import POGOLoss

COMPILABLE = ("fast", "exact")
"""Backends of the divergence that a compiled or stacked update supports."""


def check_backend(loss: POGOLoss) -> None:
    """Check that the divergence of a loss can be compiled and stacked.

    Args:
        loss: the objective.

    Raises:
        ValueError: if it has several actors and ``w2_backend`` is not one of
            :data:`COMPILABLE`.
    """
    if loss.num_actors > 1 and loss.w2_backend not in COMPILABLE:
        raise ValueError(
            f"w2_backend={loss.w2_backend!r} reads values of the whole batch on the host, which a "
            "compiled or stacked update cannot do: use w2_backend='fast' (the same divergence) or "
            "'exact', or compile=False."
        )


@contextmanager
def matmul_precision(like: Tensor) -> Iterator[None]:
    """Context manager that uses oneDNN for float32 matrix products if it keeps float32 accuracy.

    With the precision set to "bf16", oneDNN replaces torch's BLAS. Processors without bfloat16
    then still compute in float32, on AMD twice as fast as torch's BLAS; other processors do round
    to bfloat16, which :func:`_is_float32_accurate` detects. In that case nothing is changed.

    Args:
        like: tensor on the device of the update.
    """
    chosen = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    wanted = chosen == "none" and like.device.type == "cpu" and _is_float32_accurate()
    with _use_onednn() if wanted else nullcontext():
        yield


@contextmanager
def _use_onednn() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def _is_float32_accurate() -> bool:
    """Whether oneDNN's products have float32 accuracy although the precision is set to "bf16"."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 256 * 256).view(256, 256).cos()
    with _use_onednn():
        product = x @ x
    expected = x.double() @ x.double()
    return bool((product - expected).abs().max() < 1e-5 * expected.abs().max())


_instances = itertools.count()


class CompilationFailed(Exception):
    """Raised if an update cannot be compiled; it has not changed anything."""


def compiled_update(update: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Compile an update into one graph of losses, gradients and optimizers.

    Args:
        update: function that runs one update.
        device: type of the device, ``"cpu"`` or ``"cuda"``.

    Returns:
        The compiled function. It raises :class:`CompilationFailed` if compiling fails, e.g. because
        the compiler is broken or the folder of its results cannot be written.
    """

    # torch.compile keeps one cache per function, not per instance of Update: the number, which has
    # to be used in the function, distinguishes the instances.
    def numbered(number: int, *arguments: Any) -> Any:
        assert number >= 0
        return update(*arguments)

    instance = next(_instances)
    options = {
        # Draw from torch's own generator, so that random numbers equal those of eager mode.
        "fallback_random": True,
        "guard_filter_fn": _keep_argument_guards,
        # The gains below are those of benchmarks/compile_options.py on two Xeon cores.
        # Also compile the code that launches the kernels: 0 to 5 % of an update on one thread,
        # none on two. This is untested on a GPU, where CUDA graphs replace the launches (except
        # for stacks).
        "cpp_wrapper": device == "cpu",
        # Reordering would move the masks of ReLU's gradient up to where ReLU's inputs are
        # available, and keep additional tensors in memory next to the outputs: 5 % of an update
        # in bfloat16, within the noise in float32.
        "reorder_for_locality": False,
    }
    compile = functools.cache(
        partial(torch.compile, numbered, fullgraph=True, dynamic=False, options=options)
    )

    def run(*arguments: Any) -> Any:
        try:
            return compile()(instance, *arguments)
        except (torch.OutOfMemoryError, MemoryError, ArithmeticError):
            raise
        except Exception as error:  # of many kinds; torch compiles before it runs
            reason = str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
            raise CompilationFailed(reason) from error

    return run


def _keep_argument_guards(guards: Sequence[Any]) -> list[bool]:
    """Keep only the guards on the arguments: nothing else that the graph depends on changes.

    Checking all guards at each call took 0.4 of the 11 ms of an update (three actors, two Xeon
    cores).
    """
    return [guard.name == "number" or "arguments" in guard.name for guard in guards]
