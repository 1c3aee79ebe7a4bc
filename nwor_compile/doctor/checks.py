"""What is installed and what works, one function a line of the diagnosis."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from nwor_compile import backend as nwor_backend
from nwor_compile.config import ENVIRONMENT, NworConfig
from nwor_compile.doctor.diagnosis import Check, OpStatus, Setting
from nwor_compile.errors import ConfigError

MIN_TORCH = (2, 11)
COMPILER_ADVICE = (
    "torch.compile needs a C++ compiler on the CPU, and Triton a C compiler: "
    "`apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora), "
    "`conda install gxx_linux-64`, or `xcode-select --install` (macOS); CXX names another one"
)
HEADERS_ADVICE = "install Python's headers, e.g. `apt install python3-dev`"


def check_python() -> Check:
    """The interpreter's version."""
    version = platform.python_version()
    ok = sys.version_info >= (3, 11)
    return Check(
        name="Python",
        status="ok" if ok else "fail",
        detail=f"{version} on {platform.system()} {platform.machine()}",
        advice="" if ok else "nwor_compile needs Python 3.11 or later",
    )


def check_torch() -> Check:
    """torch's version and what it was built for."""
    version = torch.__version__
    ok = tuple(int(part) for part in version.split(".")[:2]) >= MIN_TORCH
    return Check(
        name="torch",
        status="ok" if ok else "fail",
        detail=f"{version}, built for {_built_for()}",
        advice="" if ok else "pip install 'torch>={}.{}'".format(*MIN_TORCH),
    )


def _built_for() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def check_triton() -> Check:
    """Triton, which is needed with a GPU only."""
    version = _version("triton")
    if version is not None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        suffix = " (TRITON_INTERPRET=1: kernels are interpreted, which is slow)"
        return Check(name="Triton", status="ok", detail=version + (suffix if interpreted else ""))
    needed = torch.cuda.is_available()
    return Check(
        name="Triton",
        status="fail" if needed else "info",
        detail="not installed" + ("" if needed else "; without a GPU the reference ops run"),
        advice="pip install 'nwor-compile[triton]'" if needed else "",
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_devices() -> list[Check]:
    """The CPU, the GPUs, and a GPU that torch cannot use."""
    cpu = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    checks = [Check(name="CPU", status="ok", detail=cpu)]
    driver = _nvidia_smi()
    if torch.cuda.is_available():
        names = [
            f"{i}: {torch.cuda.get_device_name(i)}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        ]
        return [*checks, Check(name="GPU", status="ok", detail="; ".join([*names, driver or ""]))]
    if driver is None:
        return [*checks, Check(name="GPU", status="info", detail="none found")]
    return [
        *checks,
        Check(
            name="GPU",
            status="warn",
            detail=f"{driver}, but torch cannot use it",
            advice="install a torch wheel built for CUDA, for a CUDA release that the driver knows",
        ),
    ]


def _nvidia_smi() -> str | None:
    """Name and driver version of the NVIDIA GPUs; None without the tool or a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [row.split(",") for row in done.stdout.strip().splitlines()]
    return "; ".join(f"{row[0].strip()}, driver {row[-1].strip()}" for row in rows) or None


def cpu_name() -> str:
    """The CPU's model name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_compiler() -> Check:
    """The C++ compiler that Inductor would take, and that it starts."""
    # Imported here: Inductor is slow to load, and this is its own search.
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=20, check=True
        )
    except (exc.InvalidCxxCompiler, OSError, subprocess.SubprocessError) as error:
        return Check(
            name="C++ compiler",
            status="fail",
            detail=f"none that works: {error}",
            advice=COMPILER_ADVICE,
        )
    version = done.stdout.splitlines()[0] if done.stdout else ""
    return Check(name="C++ compiler", status="ok", detail=f"{compiler}: {version}")


def check_headers() -> Check:
    """Python's headers."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        return Check(name="Python headers", status="ok", detail=str(header.parent))
    return Check(
        name="Python headers",
        status="warn",
        detail="Python.h not found; Inductor's C++ wrapper and Triton's launcher need it",
        advice=HEADERS_ADVICE,
    )


def check_ops(ops: Sequence[OpStatus]) -> Check:
    """One line for the table of ops."""
    failed = [op.op for op in ops if op.failed]
    if failed or not ops:
        return Check(
            name="ops",
            status="fail",
            detail=f"failed: {', '.join(failed) or 'none is registered'}",
            advice="see the table of ops; report a failure with the output of nwor doctor --json",
        )
    return Check(name="ops", status="ok", detail=f"{len(ops)} overloads registered, all ran")


def check_entry_point() -> Check:
    """`torch.compile(backend="nwor")` finds this package."""
    name, group = "torch.compile backend 'nwor'", "torch_dynamo_backends"
    advice = "install the package (`pip install nwor-compile`, or `pip install -e .` in a checkout)"
    points = importlib.metadata.entry_points(group=group, name="nwor")
    if not points:
        detail = f"no entry point in {group}"
        return Check(name=name, status="fail", detail=detail, advice=advice)
    point = next(iter(points))
    try:
        same = point.load() is nwor_backend.nwor
    except (ImportError, AttributeError) as error:
        return Check(name=name, status="fail", detail=str(error), advice=advice)
    if not same:
        detail = f"{point.value} is not this package's; another installation shadows it"
        return Check(name=name, status="fail", detail=detail, advice=advice)
    return Check(name=name, status="ok", detail=f"entry point {point.value}")


def check_settings() -> tuple[Check, list[Setting]]:
    """The settings in force, and where each comes from."""
    try:
        config = NworConfig.load()
    except ConfigError as error:
        allowed = ", ".join(ENVIRONMENT.values())
        advice = f"correct or unset the environment variable ({allowed})"
        return Check(name="settings", status="fail", detail=str(error), advice=advice), []
    settings = []
    for name, value in config.model_dump().items():
        variable = ENVIRONMENT.get(name)
        given = variable is not None and os.environ.get(variable, "") != ""
        source = f"environment variable {variable}" if given else "default"
        settings.append(Setting(name=name, value=str(value), source=source))
    if config.mode == "off":
        detail = "NWOR is off: compile_options() adds no pass, drafts are written directly"
        return Check(name="settings", status="warn", detail=detail), settings
    return Check(name="settings", status="ok", detail=f"mode {config.mode}"), settings
