"""Where the ops are declared and how an implementation is chosen.

Each op has a handwritten schema, a fake function, a reference in plain torch (the specification,
any device) and a Triton launcher. CUDA tensors go to Triton, everything else to the reference;
`set_implementation` forces one, which is how tests run the kernels in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch

Implementation = Literal["auto", "reference", "triton"]

NAMESPACE = "nwor"
OP_NAMES: list[str] = []

_library = torch.library.Library(NAMESPACE, "DEF")
_forced: Implementation = "auto"


def set_implementation(name: Implementation) -> Implementation:
    """Force the implementation of every op in this process; return the previous setting.

    `auto` takes Triton for CUDA tensors and the reference otherwise.
    Raises ValueError for another name.
    """
    global _forced
    if name not in ("auto", "reference", "triton"):
        raise ValueError(f"implementation: expected auto, reference or triton, got {name!r}")
    previous, _forced = _forced, name
    return previous


@contextlib.contextmanager
def implementation(name: Implementation) -> Iterator[None]:
    """`set_implementation` for the length of a with block."""
    previous = set_implementation(name)
    try:
        yield
    finally:
        set_implementation(previous)


def uses_triton(device: torch.device) -> bool:
    """True if ops on `device` run their Triton kernel under the current setting.

    Raises RuntimeError if Triton is called for and missing: a silent detour through the reference
    would be orders of magnitude slower.
    """
    if _forced == "reference" or (_forced == "auto" and device.type != "cuda"):
        return False
    if not _triton_installed():
        raise RuntimeError(
            "nwor ops on CUDA tensors need triton, which is not installed: pip install triton, or "
            "call nwor_compile.ops.set_implementation('reference')"
        )
    return True


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


class Launcher(NamedTuple):
    """A reference and the Triton launcher of the same arguments, as `module:function`."""

    reference: Callable[..., Any]
    kernel: str


def pick(launcher: Launcher, device: torch.device) -> Callable[..., Any]:
    """What runs on `device` under the current setting; see `set_implementation`."""
    return _load(launcher.kernel) if uses_triton(device) else launcher.reference


def define(
    signature: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None],
    kernel: str,
) -> torch._ops.OpOverload:
    """Declare `nwor::<signature>` and register every path; return the overload.

    Args:
        signature: schema without the namespace, mutated arguments marked.
        reference: the specification; same arguments.
        fake: returns outputs of the right shape and dtype, touches no data.
        check: raises ValueError or TypeError for bad arguments. Runs before any device work, and
            before the fake function, so a bad call fails while it is traced.
        kernel: `module:function` of the launcher, imported at the first call that needs it.
    """
    name = signature.split("(", 1)[0]

    launcher = Launcher(reference, kernel)

    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return pick(launcher, _first_tensor(args, kwargs).device)(*args, **kwargs)

    return define_composite(signature, run=run, fake=_checked(fake, check), name=name)


def define_composite(
    signature: str, *, run: Callable[..., Any], fake: Callable[..., Any], name: str
) -> torch._ops.OpOverload:
    """Declare `nwor::<signature>` with one implementation for every device."""
    _library.define(signature)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    OP_NAMES.append(name)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.nwor, packet), overload or "default")


def _checked(fake: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    return run


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
            return value[0]
    raise ValueError("nwor op called without a tensor argument")


@functools.cache
def _load(kernel: str) -> Callable[..., Any]:
    module, function = kernel.split(":")
    return getattr(importlib.import_module(f"nwor_compile.ops.kernels.{module}"), function)
