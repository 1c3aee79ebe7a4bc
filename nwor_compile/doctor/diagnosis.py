"""What a diagnosis is made of, and how it is printed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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


class OpStatus(BaseModel):
    """One overload: for each way to run it `ok`, the error, or why it was not tried."""

    op: str
    reference: str
    fake: str
    triton: str
    signature: str

    @property
    def failed(self) -> bool:
        """True if some way to run it was tried and failed."""
        return any(text.startswith("failed") for text in (self.reference, self.fake, self.triton))


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
    table = Table(title="what would be staged")
    for header in ("graph", "write", "op", "becomes", "readers redirected, or why it stays direct"):
        table.add_column(header, overflow="fold")  # a name that is cut names nothing
    for d in found.decisions:
        detail = ", ".join(d.readers) if d.staged else d.reason
        table.add_row(d.graph, d.write, d.op, "staged" if d.staged else "direct", escape(detail))
    console.print(table)
    for check in found.checks:
        if check.advice and check.status in ("warn", "fail"):
            console.print(
                f"[{colour[check.status]}]{check.status}[/] {check.name}: {escape(check.advice)}"
            )


def one_line(error: BaseException) -> str:
    """Type and first line of an error, cut to what fits a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}"
    return text if len(text) <= 240 else text[:240] + " ..."
