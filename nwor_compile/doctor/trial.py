"""What would be staged or refused, and why: the pass on the sample and on a model of the user's."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from nwor_compile import backend as nwor_backend
from nwor_compile.config import NworConfig
from nwor_compile.doctor.checks import COMPILER_ADVICE
from nwor_compile.doctor.diagnosis import Check, WriteDecision, one_line
from nwor_compile.doctor.sample import DIRECT, STAGED, sample
from nwor_compile.passes import last_reports
from nwor_compile.passes.nwor_pass import rewrite_module
from nwor_compile.passes.report import Report


def try_sample(*, compiled: bool) -> tuple[Check, list[Report]]:
    """The pass on the built-in model: through Inductor if there is a compiler, else Dynamo only."""
    name = "pass on the sample model"
    start, earlier = time.perf_counter(), last_reports()
    model, inputs = sample()
    wanted = model(*inputs)[0]
    model, inputs = sample()
    try:
        if compiled:
            result = _compile_sample(model, inputs)
            reports = [r for r in last_reports() if not any(r is e for e in earlier)]
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
    if (staged, direct) != (STAGED, DIRECT):
        detail = f"{counts}, expected {STAGED} and {DIRECT}; {route}"
        advice = "this torch makes graphs that the pass does not know; please report it"
        return Check(name=name, status="fail", detail=detail, advice=advice), reports
    if not torch.allclose(result, wanted, rtol=1e-4, atol=1e-4):
        detail = f"{counts}, but the result differs from the plain model's; {route}"
        return Check(name=name, status="fail", detail=detail, advice="please report it"), reports
    seconds = time.perf_counter() - start
    detail = f"{counts}, result as without; {route}, {seconds:.1f} s"
    return Check(name=name, status="ok", detail=detail), reports


def _compile_sample(model: Callable[..., Any], inputs: Sequence[Any]) -> torch.Tensor:
    """Through Inductor, its graph caches off: a cached graph would not run the pass."""
    options = nwor_backend.compile_options(NworConfig(mode="stage"), fx_graph_cache=False)
    logger = logging.getLogger("nwor_compile")
    level = logger.level
    # The pass warns about each refused write; here one must be refused, and the table says so.
    logger.setLevel(logging.ERROR)
    try:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            result: torch.Tensor = torch.compile(model, fullgraph=True, options=options)(*inputs)[0]
    finally:
        logger.setLevel(level)
    return result


def try_model(path: str) -> tuple[Check, list[Report]]:
    """The pass on Dynamo's graph of the model that a factory `module:function` makes."""
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


def decisions(report: Report) -> list[WriteDecision]:
    """The decisions of a report, as a diagnosis carries them."""
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
