#!/usr/bin/env python3
"""Trains a small Keras model and moves its trainable variables to a server in another process.

    python keras_to_server.py [--epochs 5] [--seed 0]

What lands is a folder with one .npy file for each variable. A second model is built, gets its
weights out of those files, which are mapped and not read into memory first, and predicts the same.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import serve
import tensorferry


def build() -> keras.Model:
    layers = [keras.layers.Input((16,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(optimizer="adam", loss="mse")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    x = np.random.default_rng(args.seed).standard_normal((512, 16)).astype("f4")
    y = np.square(x).sum(1, keepdims=True)

    model = build()
    model.fit(x, y, epochs=args.epochs, verbose=0)

    with tempfile.TemporaryDirectory() as folder:
        server, address = serve.started(folder)
        try:
            report = tensorferry.save(model.trainable_variables, f"ferry://{address}/run7")
            print(f"{report.tensors} tensors, {report.bytes} bytes, {report.durability}")

            # The server is on this machine, so its folder can be opened here. From elsewhere:
            # tensorferry.pull(f"ferry://{address}/run7", "run7") first.
            landed = tensorferry.open(Path(folder) / "run7")
            other = build()
            for variable, (name, array) in zip(other.trainable_variables, landed.items(), strict=True):
                assert isinstance(array, np.memmap), name
                print(f"  {name}: {array.dtype} {array.shape}")
                variable.assign(array)
        finally:
            server.kill()
            server.wait()

    difference = np.abs(other.predict(x, verbose=0) - model.predict(x, verbose=0)).max()
    assert difference == 0, f"the predictions differ by up to {difference}"
    print("the predictions are equal")


if __name__ == "__main__":
    main()
