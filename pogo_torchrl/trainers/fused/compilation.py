"""How an update is compiled, and which matrix products it calls."""

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
"""Backends of the divergence that a compiled or stacked update can use."""


def check_backend(loss: POGOLoss) -> None:
    """Refuse a divergence that cannot be compiled or stacked.

    Raises:
        ValueError: naming those that can.
    """
    if loss.num_actors > 1 and loss.w2_backend not in COMPILABLE:
        raise ValueError(
            f"w2_backend={loss.w2_backend!r} reads numbers of the whole batch on the host, which a "
            "compiled or stacked update cannot: use w2_backend='fast' (the same divergence), "
            "'exact', or compile=False."
        )


@contextmanager
def matmul_precision(like: Tensor) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices where it does so in float32: nothing else is changed.

    Asked for "bf16" it takes over from torch's BLAS. Processors without bfloat16 then compute in
    float32, AMD's twice as fast as before; the others really round, which :func:`_is_exact` sees.
    """
    chosen = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    wanted = chosen == "none" and like.device.type == "cpu" and _is_exact()
    with _onednn() if wanted else nullcontext():
        yield


@contextmanager
def _onednn() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def _is_exact() -> bool:
    """Whether oneDNN's product, asked for bfloat16, has the accuracy of float32 all the same."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 256 * 256).view(256, 256).cos()
    with _onednn():
        product = x @ x
    expected = x.double() @ x.double()
    return bool((product - expected).abs().max() < 1e-5 * expected.abs().max())


_instances = itertools.count()


def compiled_update(update: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The update as one graph: losses, gradients and optimizers together."""

    # torch.compile keeps one cache for all instances: a number tells them apart, once it is used.
    def numbered(number: int, *arguments: Any) -> Any:
        assert number >= 0
        return update(*arguments)

    compiled = torch.compile(
        numbered,
        fullgraph=True,
        dynamic=False,
        options={
            # With torch's own generator, so that draws are those of the update as it is written.
            "fallback_random": True,
            "guard_filter_fn": _on_arguments,
            # What launches the kernels is compiled too; on a GPU, where CUDA graphs do away with it
            # but for stacks, that is untried.
            "cpp_wrapper": device == "cpu",
            # It would move the masks of ReLU's gradient up to where its inputs are still at hand,
            # which then are kept for them beside the outputs.
            "reorder_for_locality": False,
            # The guards look at the arguments, and parameters keep their shapes.
            "size_asserts": False,
        },
    )
    return partial(compiled, next(_instances))


def _on_arguments(guards: Sequence[Any]) -> list[bool]:
    """Guards on the arguments: of what else the graph was made from, nothing changes.

    Looking at all of it at each call would take a tenth of the time.
    """
    return [guard.name == "number" or "arguments" in guard.name for guard in guards]
