"""`nwor doctor`: what is installed, what works, and what would be staged or refused and why."""

from __future__ import annotations

from nwor_compile.doctor import checks, vllm
from nwor_compile.doctor.diagnosis import Diagnosis, show
from nwor_compile.doctor.probes import probe_ops
from nwor_compile.doctor.trial import decisions, try_model, try_sample
from nwor_compile.doctor.vllm import EngineQuestion

__all__ = ["Diagnosis", "EngineQuestion", "diagnose", "show"]


def diagnose(
    model: str | None = None, *, compile_sample: bool = True, engine: EngineQuestion | None = None
) -> Diagnosis:
    """Look at this installation.

    Args:
        model: `module:function` of a factory that returns `(model, example_inputs)`; the pass runs
            on the graph that Dynamo makes of it, and the graph is run once on the inputs.
        compile_sample: compile the built-in sample with Inductor, the test of the C++ compiler
            that counts. Takes some seconds.
        engine: a vLLM engine that is to be judged as well. Takes ten seconds or more.
    """
    found = Diagnosis()
    found.checks += [
        checks.check_python(),
        checks.check_torch(),
        checks.check_triton(),
        *vllm.check_vllm(),
        *checks.check_devices(),
        checks.check_compiler(),
        checks.check_headers(),
    ]
    found.ops = probe_ops()
    found.checks += [checks.check_ops(found.ops), checks.check_entry_point()]
    check, found.settings = checks.check_settings()
    found.checks.append(check)
    has_compiler = all(c.status != "fail" for c in found.checks if c.name == "C++ compiler")
    check, reports = try_sample(compiled=compile_sample and has_compiler)
    found.checks.append(check)
    if model is not None:
        check, more = try_model(model)
        found.checks.append(check)
        reports = reports + more
    found.decisions = [decision for report in reports for decision in decisions(report)]
    if engine is not None:
        more_checks, layers = vllm.examine(engine)
        found.checks += more_checks
        found.decisions += layers
    return found
