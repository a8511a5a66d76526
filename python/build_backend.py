"""Builds the wheel with maturin, and puts the command line program into it.

maturin makes wheels of a library or of programs, and this one has both: the program is built
first, by the same cargo package with the same profile, so that all that both need is compiled
once. `TENSORFERRY_PROFILE` names the cargo profile: `release` unless it is set.
"""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import maturin

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "tensorferry.data" / "scripts"


# Without build isolation nothing says where maturin's program is.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def profile() -> str:
    return os.environ.get("TENSORFERRY_PROFILE") or "release"


def build_program() -> None:
    command = ["cargo", "build", "--locked", "--bin", "tensorferry", "--profile", profile()]
    command += ["--manifest-path", str(HERE / "Cargo.toml"), "--message-format", "json-render-diagnostics"]
    built = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    messages = map(json.loads, built.stdout.splitlines())
    programs = [m["executable"] for m in messages if m.get("executable")]
    SCRIPTS.mkdir(parents=True, exist_ok=True)
    shutil.copy2(programs[-1], SCRIPTS / "tensorferry")
    if profile() != "dev":
        # Its symbols are of no use to users.
        subprocess.run(["strip", str(SCRIPTS / "tensorferry")], check=False)


def with_profile(build, *arguments):
    os.environ.setdefault("MATURIN_PEP517_ARGS", f"--profile {profile()}")
    build_program()
    return build(*arguments)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return with_profile(maturin.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return with_profile(maturin.build_editable, wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    raise NotImplementedError("no source distribution: the library lies beside this folder")


def get_requires_for_build_wheel(config_settings=None):
    return []


def get_requires_for_build_editable(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    # maturin wants the folder of data to be there.
    SCRIPTS.mkdir(parents=True, exist_ok=True)
    return maturin.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel
