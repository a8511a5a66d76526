"""Where each peer's program is; gets it where that is asked for.

System packages come from apt-get, Python packages into an environment of their own, the stock
server from the crate beside this file. Both kinds of builds are kept in
${TENSORFERRY_CACHE:-~/.cache/tensorferry}.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLIGHT_PACKAGES = ("pyarrow==26.*", "numpy==2.4.*")
SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")


class Absent(Exception):
    """A peer cannot be had here; the message says why."""


def cache() -> Path:
    """Where environments and builds are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tensorferry"
    return Path(os.environ.get("TENSORFERRY_CACHE", default))


def program(name: str) -> Path | None:
    """A program of the system. Daemons lie where a user's PATH does not lead."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS])
    found = shutil.which(name, path=folders)
    return Path(found) if found else None


def system(name: str, package: str, *, install: bool) -> Path:
    """A program of the system, installed where that is wanted and possible."""
    if found := program(name):
        return found
    if install and os.geteuid() == 0 and shutil.which("apt-get"):
        # The package may bring a service; none is to be started for a measurement.
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
        if subprocess.run(command, env=env, capture_output=True).returncode:
            subprocess.run(["apt-get", "update", "-qq"], env=env, capture_output=True)
            subprocess.run(command, env=env, capture_output=True)
        if found := program(name):
            return found
        raise Absent(f"apt-get could not install {package}")
    raise Absent(f"no {name} (package {package}; --install gets it where apt-get can)")


def flight_python(*, install: bool) -> Path:
    """A Python that knows Arrow Flight."""
    venv = cache() / "peers-venv"
    python = venv / "bin" / "python"

    def ready() -> bool:
        test = [python, "-c", "import numpy, pyarrow.flight"]
        return python.is_file() and subprocess.run(test, capture_output=True).returncode == 0

    if ready():
        return python
    if not install:
        raise Absent("no pyarrow (--install gets it)")
    subprocess.run(["python3", "-m", "venv", venv], capture_output=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *FLIGHT_PACKAGES]
    if not python.is_file() or subprocess.run(pip, capture_output=True).returncode or not ready():
        raise Absent("pip could not install pyarrow")
    return python


def stock() -> Path:
    """The stock server, built in release mode. Dependencies are built once for all checkouts."""
    if shutil.which("cargo") is None:
        raise Absent("no cargo")
    target = cache() / "peers-stock"
    command = ["cargo", "build", "--quiet", "--release", "--locked", "--target-dir", target]
    built = subprocess.run(command, cwd=HERE / "stock", capture_output=True, text=True)
    if built.returncode:
        raise Absent(f"the crate does not build: {built.stderr[-500:].strip()}")
    return target / "release" / "stock"


def stock_version() -> str:
    """Which tonic the stock server is built with."""
    lock = (HERE / "stock" / "Cargo.lock").read_text()
    found = re.search(r'name = "tonic"\nversion = "([^"]+)"', lock)
    return f"tonic {found[1]}" if found else "?"


def first_line(*command: str | Path) -> str:
    """What a program says of its version."""
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = (said.stdout + said.stderr).strip().splitlines()
    return " ".join(lines[0].split()) if lines else "?"
