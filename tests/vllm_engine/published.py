"""Source files of published packages, by name and without installing or downloading them whole.

pip says where the wheel of a version is, through whatever index it is set up with; the members
asked for are then read out of that wheel by HTTP range requests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import requests
from remotezip import RemoteZip

# What pip says without an index: it cannot connect, or knows no version at all.
OFFLINE = ("connection broken by", "Max retries exceeded", "from versions: none")


class IndexUnreachableError(RuntimeError):
    """pip could not reach its index; the message is pip's last word."""


def unpacked(package: str, version: str, members: Iterable[str], cache: Path) -> Path:
    """A folder below `cache` that has `members` (paths inside the wheel) of `package`.

    What is there already is not read again. Members that the wheel lacks are left out.

    Raises IndexUnreachableError, or RuntimeError if the index has no wheel of that version for this
    platform.
    """
    folder = cache / f"{package}-{version}"
    wanted = [name for name in dict.fromkeys(members) if not (folder / name).exists()]
    if not wanted:
        return folder
    # One connection for all: most of the time would go into new ones.
    with (
        requests.Session() as session,
        RemoteZip(_wheel(package, version, cache), session=session) as wheel,
    ):
        there = set(wheel.namelist())
        for name in wanted:
            if name in there:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                unfinished = target.with_suffix(".part")
                unfinished.write_bytes(wheel.read(name))
                unfinished.replace(target)
    return folder


def _wheel(package: str, version: str, cache: Path) -> str:
    report = cache / f"{package}-{version}.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed",
            "--only-binary=:all:", "--quiet", "--retries=1", "--timeout=30",
            "--report", str(report), f"{package}=={version}",
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if any(text in said for text in OFFLINE):
        raise IndexUnreachableError(said[-400:])
    if done.returncode != 0:
        raise RuntimeError(f"pip finds no wheel of {package} {version} here: {said[-800:]}")
    try:
        found = json.loads(report.read_text())
    finally:
        report.unlink()  # it names the index
    return str(found["install"][0]["download_info"]["url"])
