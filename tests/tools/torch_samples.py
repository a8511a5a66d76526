#!/usr/bin/env python3
"""Fetches files that torch.save wrote and prints their paths.

    torch_samples.py DIR

They are the test files of the crate `pytorch-reader`, which cargo fetches. Left out are those that are
refused on purpose: legacy formats, whole models, a damaged file, and what holds no tensor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CRATE = "0.22.1"
# Python's zipfile refuses what has no checksum.
LEFT_OUT = (
    "simple_legacy",
    "legacy",
    "broken",
    "full_model.pt",
    "full_model_checkpoint",
    "empty.pt",
    "no_crc32",
)
MANIFEST = f"""[package]
name = "samples"
version = "0.0.0"
edition = "2024"
[lib]
path = "empty.rs"
[dependencies]
pytorch-reader = "={CRATE}"
"""


def main() -> int:
    """Exit status 1 where they cannot be had."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Cargo.toml").write_text(MANIFEST)
    (folder / "empty.rs").write_text("")
    manifest = ["--manifest-path", folder / "Cargo.toml"]
    done = subprocess.run(["cargo", "metadata", "--format-version", "1", "-q", *manifest], capture_output=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr.decode())
        return 1
    packages = json.loads(done.stdout)["packages"]
    crate = next(p for p in packages if p["name"] == "pytorch-reader")
    files = sorted((Path(crate["manifest_path"]).parent / "src/tests/test_data").glob("*.pt"))
    print(*(file for file in files if not file.name.startswith(LEFT_OUT)))
    return 0 if files else 1


if __name__ == "__main__":
    sys.exit(main())
