"""An engine's process, seen from the parent: commands out, answers in, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = (sys.executable, "-u", "-m", "nwor_compile.bench.engine_worker")
STOP_SECONDS = 20.0


class EngineError(Exception):
    """An engine could not start, failed in a batch, died, or did not answer in time.

    alive: whether it can still be asked for another batch.
    """

    def __init__(self, message: str, *, kind: str = "", alive: bool = False) -> None:
        super().__init__(message)
        self.kind, self.alive = kind, alive


class EngineProcess:
    """Starts the worker; its stderr, which is the engine's log, goes to `log`."""

    def __init__(
        self,
        log: Path,
        environment: Mapping[str, str],
        timeout: float,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.log, self.timeout = log, timeout
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env=dict(environment), start_new_session=True,
            )  # fmt: skip
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None  # noqa: S101  a pipe was asked for
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises EngineError."""
        assert self.process.stdin is not None  # noqa: S101  a pipe was asked for
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, which says why
            self.process.stdin.write(json.dumps({"op": operation, **arguments}) + "\n")
            self.process.stdin.flush()
        try:
            line = self.answers.get(timeout=self.timeout)
        except queue.Empty:
            self.kill()
            raise EngineError(
                f"no answer to {operation!r} within {self.timeout:g} s (--timeout); the engine "
                f"was ended. {self._log_tail()}"
            ) from None
        if line is None:
            code = self.process.wait()
            raise EngineError(f"the engine's process ended with {code}. {self._log_tail()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            kind = answer["kind"]
            raise EngineError(f"{kind}: {answer['error']}", kind=kind, alive=operation == "batch")
        return answer

    def _log_tail(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"Its log ends: {lines[-1][-300:]}" if lines else "Its log is empty"

    def close(self) -> None:
        """Ask it to stop; end it if it does not."""
        if self.process.poll() is None:
            self.timeout = min(self.timeout, STOP_SECONDS)
            with contextlib.suppress(EngineError):
                self.ask("stop")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the process and those that it started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
