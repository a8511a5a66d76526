#!/usr/bin/env python3
"""What `FerryCheckpoint` costs a training: the same steps with and without it.

    python keras_callback.py [--bytes 64M] [--steps 100] [--every 10] [--rounds 5]

Both runs train the same Keras model from the same weights in this process, interleaved. With the callback
the whole model with its optimizer (Adam: three times the weights) is saved every so many steps, as a
snapshot. --bytes is the size of the weights alone.

Figures, medians over rounds: `steps_ratio` is the time from the first step's begin to the last step's end with
the callback, without the time of the copies, over the time without the callback; `steps_ratio_with_copies`
includes them. `wait_s` is what steps waited for a save that was not done; `final_wait_s` what `fit`
waited at its end, outside of the steps.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import harness
import keras
import numpy as np
from tensorferry.keras import FerryCheckpoint, variables_of


class Clock(keras.callbacks.Callback):
    """Time of the steps, without what ``fit`` does before and after them."""

    begun = ended = 0.0

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        if batch == 0:
            self.begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


def model_of(nbytes: int) -> keras.Model:
    """A model of about so many bytes of weights: four square layers."""
    width = max(8, int((nbytes / 4 / 4) ** 0.5))
    layers = [keras.layers.Input((width,))]
    layers += [keras.layers.Dense(width, activation="tanh", name=f"square{number}") for number in range(4)]
    model = keras.Sequential(layers)
    model.compile(optimizer="adam", loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def main() -> None:
    parser = harness.arguments(__doc__, size="64M", rounds=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps from one save to the next")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    args = harness.checked(parser.parse_args())
    keras.utils.set_random_seed(args.seed)
    model = model_of(args.bytes)
    width = model.input_shape[-1]
    rng = np.random.default_rng(args.seed)
    x = rng.standard_normal((args.batch * args.steps, width), np.float32)
    y = np.roll(x, 1, axis=1)
    state = {name: np.array(keras.ops.convert_to_numpy(v.value)) for name, v in variables_of(model).items()}
    with harness.work_folder(args) as folder, harness.Server(folder / "root", args.binary) as server:
        runs = iter(range(1 << 30))

        def train(*callbacks: keras.callbacks.Callback) -> float:
            for name, variable in variables_of(model).items():
                variable.assign(state[name])
            clock = Clock()
            # The clock comes last: its end of a step then is after the callback's.
            ours = [*callbacks, clock]
            model.fit(x, y, batch_size=args.batch, epochs=1, shuffle=False, verbose=0, callbacks=ours)
            return clock.seconds

        def without() -> dict[str, float]:
            return {"steps": train()}

        def with_callback() -> dict[str, float]:
            name = f"run{next(runs)}"
            options = harness.options_of(args)
            callback = FerryCheckpoint(server.url(name + "/{batch:05d}"), save_freq=args.every, **options)
            waits = WaitAtEnd(callback)
            seconds = train(callback, waits)
            if len(callback.reports) != args.steps // args.every:
                raise RuntimeError(f"{len(callback.reports)} saves instead of {args.steps // args.every}")
            check(model, server, callback)
            server.remove(name)
            final = callback.wait_s - waits.before_end
            return {
                "steps": seconds,
                "snapshot": callback.snapshot_s,
                "wait": waits.before_end,
                "final_wait": final,
                "bytes": float(sum(report.bytes for _, report in callback.reports)),
            }

        found = harness.interleaved({"without": without, "with": with_callback}, args.rounds, args.seed)
    plain = [run["steps"] for run in found["without"]]
    column = {key: [run[key] for run in found["with"]] for key in found["with"][0]}
    all_of_it = harness.ratios(column["steps"], plain)
    net = harness.ratios([s - c for s, c in zip(column["steps"], column["snapshot"], strict=True)], plain)
    harness.figure(
        "a training with FerryCheckpoint",
        args,
        steps=args.steps,
        every=args.every,
        saved_bytes_each_run=column["bytes"][0],
        steps_ratio=harness.median(net),
        steps_ratio_with_copies=harness.median(all_of_it),
        ratios=net,
        seconds_without=plain,
        seconds_with=column["steps"],
        snapshot_s=harness.median(column["snapshot"]),
        wait_s=harness.median(column["wait"]),
        final_wait_s=harness.median(column["final_wait"]),
    )


class WaitAtEnd(keras.callbacks.Callback):
    """Notes how long the steps had waited when they were over; ends after the callback that it looks at."""

    def __init__(self, watched: FerryCheckpoint) -> None:
        super().__init__()
        self._watched = watched
        self.before_end = 0.0

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.before_end = self._watched.wait_s


def check(model: keras.Model, server: harness.Server, callback: FerryCheckpoint) -> None:
    """The last save, if it was after the last step, is the model as it is now."""
    import tensorferry

    destination, _ = callback.reports[-1]
    landed = tensorferry.open(server.root / destination.partition(server.address + "/")[2])
    variables = variables_of(model)
    if list(landed) != list(variables):
        raise RuntimeError(f"{destination} has other variables than the model")
    if int(landed["optimizer/adam/iteration"]) != int(model.optimizer.iterations):
        return
    for name, variable in variables.items():
        if not np.array_equal(landed[name], keras.ops.convert_to_numpy(variable.value)):
            raise RuntimeError(f"{name} landed with other values")


if __name__ == "__main__":
    main()
