"""The support matrix of NWOR in vLLM 0.26 on a GPU: many small engines, stock and staged, compared.

    python tests/vllm_gpu/matrix.py --record OUT.json --table OUT.md [--cases 'tiny.*' ...] \
        [--jobs 8] [--seconds 440] [--resume]

Mode `stage` with `"attention": "stock"` runs vLLM's own kernels, so token ids and acceptance must
be exactly those of the untouched engine of the same configuration, and an audit of every step must
find no rejected row in the target's cache. The package and vLLM must be installed, for the plugin
comes in by its entry point. Rows are written as they finish; `--resume` runs what is left.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matrix_engine
from matrix_cases import CASES, CONTROLS, KINDS, Case
from matrix_report import differs, row, shortened, table, this_machine

START = 80  # seconds that a new engine must at least have left
HOPELESS = 6  # staged engines that fail without one that runs: the rest would too


class Matrix:
    """Runs engines, some at a time, and makes a row of each case when its last engine is done.

    Args:
        cases: in this order. start: `matrix_engine.run` with a limit in seconds, or a stand-in.
        deadline: on `time.monotonic()`; engines that run then are ended.
        finished: called with all rows after each one.
    """

    def __init__(
        self,
        cases: Iterable[Case],
        start: Callable[[Case, str, float], dict[str, Any]],
        *,
        deadline: float,
        limit: float,
        controls: bool,
        finished: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.start, self.deadline, self.limit = start, deadline, limit
        self.controls, self.finished = controls, finished
        self.cases = {case.name: case for case in cases}
        self.engines: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in self.cases}
        self.rows: dict[str, dict[str, Any]] = {}
        self._tasks = deque((case, kind) for case in self.cases.values() for kind in case.kinds)
        self._pending = {name: len(case.kinds) for name, case in self.cases.items()}
        self._staged = {"up": 0, "failed": 0}
        self._lock = threading.Lock()

    def run(self, jobs: int) -> list[dict[str, Any]]:
        """All rows, in the order of the cases. Cases that time did not allow have none."""
        threads = [threading.Thread(target=self._work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.all_rows()

    def all_rows(self) -> list[dict[str, Any]]:
        """Those that are finished, in the order of the cases."""
        return [self.rows[name] for name in self.cases if name in self.rows]

    def _work(self) -> None:
        while (task := self._next()) is not None:
            case, kind = task
            limit = min(self.limit, self.deadline - time.monotonic())
            engine = self.start(case, kind, limit)
            with self._lock:
                self._keep(case, kind, engine)

    def _next(self) -> tuple[Case, str] | None:
        with self._lock:
            if not self._tasks or time.monotonic() + START > self.deadline:
                return None
            return self._tasks.popleft()

    def _keep(self, case: Case, kind: str, engine: dict[str, Any]) -> None:
        self.engines[case.name][kind] = engine
        state = "up" if "results" in engine else "refused" if "refused" in engine else "failed"
        print(f"{time.strftime('%X')} {case.name} {kind}: {state}, {engine['seconds']} s")
        if (KINDS[kind] or {}).get("mode") == "stage" and state in self._staged:
            self._staged[state] += 1
            if self._staged["failed"] >= HOPELESS and not self._staged["up"] and self._tasks:
                print(f"{HOPELESS} staged engines failed and none runs: no more are started")
                self._tasks.clear()
        self._pending[case.name] -= 1
        late = "results" not in engine and time.monotonic() >= self.deadline
        if late:
            self._pending[case.name] = -1  # no row: it was the matrix that ended the engine
        if self._pending[case.name] != 0:
            return
        found = self.engines[case.name]
        unlike = "results" in found.get("stock", {}) and differs(case, found)
        if self.controls and unlike and not set(CONTROLS) & set(found):
            self._pending[case.name] = len(CONTROLS)
            self._tasks.extendleft((case, control) for control in reversed(CONTROLS))
            # A row already, in case that the controls do not get their time.
        self.rows[case.name] = row(case, found)
        print(f"  {case.name}: {self.rows[case.name]['state']}", *self.rows[case.name]["problems"])
        self.finished(self.all_rows())


def selected(patterns: Iterable[str]) -> list[Case]:
    """Cases whose name fits one of the globs. Raises SystemExit for a glob that fits none."""
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        fitting = fnmatch.filter(CASES, pattern)
        if not fitting:
            raise SystemExit(f"no case fits {pattern!r}; the cases are {', '.join(CASES)}")
        chosen |= {name: CASES[name] for name in fitting}
    return list(chosen.values())


def main() -> None:
    """Run, and write record and table as rows finish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=["*"], help="globs of case names")
    parser.add_argument("--without", nargs="*", default=[], help="globs of case names to leave out")
    parser.add_argument("--jobs", type=int, default=8, help="engines at a time")
    parser.add_argument("--seconds", type=float, default=440, help="for everything")
    parser.add_argument("--engine-seconds", type=float, default=240, help="for one engine")
    parser.add_argument("--no-controls", action="store_true", help="do not look for causes")
    parser.add_argument("--record", type=Path, default=Path("matrix.json"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the record's finished rows")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    given = parser.parse_args()
    cases = [
        case
        for case in selected(given.cases)
        if not any(fnmatch.fnmatch(case.name, pattern) for pattern in given.without)
    ]
    if given.list:
        print("\n".join(case.name for case in cases))
        return
    earlier: dict[str, Any] = {"rows": [], "engines": {}}
    if given.resume and given.record.exists():
        earlier = json.loads(given.record.read_text())
        kept = [found for found in earlier["rows"] if found["state"] in ("tested", "refused")]
        earlier["rows"] = kept
        done = {found["case"] for found in kept}
        cases = [case for case in cases if case.name not in done]
    patterns = " ".join(f"'{pattern}'" for pattern in given.cases)
    command = f"python tests/vllm_gpu/matrix.py --record OUT.json --cases {patterns}"
    machine = {**this_machine(), "command": f"{command} --jobs {given.jobs}"}
    with tempfile.TemporaryDirectory() as folder:
        logs = given.logs or Path(folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)

        def finished(rows: list[dict[str, Any]]) -> None:
            names = {found["case"] for found in rows}
            record = {
                **machine,
                "rows": [f for f in earlier["rows"] if f["case"] not in names] + rows,
                "engines": {
                    **earlier["engines"],
                    **{
                        name: {kind: shortened(engine) for kind, engine in found.items()}
                        for name, found in matrix.engines.items()
                    },
                },
            }
            given.record.write_text(json.dumps(record, indent=1) + "\n")
            if given.table:
                given.table.write_text(table(record))

        matrix = Matrix(
            cases,
            lambda case, kind, limit: matrix_engine.run(case, kind, Path(folder), logs, limit),
            deadline=time.monotonic() + given.seconds,
            limit=given.engine_seconds,
            controls=not given.no_controls,
            finished=finished,
        )
        rows = matrix.run(given.jobs)
    print(f"{len(rows)} of {len(cases)} cases:", {
        state: sum(found["state"] == state for found in rows)
        for state in ("tested", "refused", "untested", "failed")
    })  # fmt: skip


if __name__ == "__main__":
    main()
