"""The callback on real Keras models, against a server of its own."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
keras = pytest.importorskip("keras")

import tensorferry  # noqa: E402
from tensorferry.keras import FerryCheckpoint, restore, variables_of  # noqa: E402

INPUT, ROWS = 8, 64


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tensorferry.Server]:
    with tensorferry.Server(tmp_path / "root") as server:
        yield server


def model_of(seed: int = 0) -> keras.Model:
    """A compiled model with everything that is not trained, too: moving statistics and a seed."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Input((INPUT,)),
        keras.layers.Dense(16, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.1),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential(layers)
    # Compiling the steps takes longer than all of them.
    model.compile(optimizer="adam", loss="mse", metrics=["mae"], jit_compile=False)
    return model


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((ROWS, INPUT)).astype("f4")
    return x, x.sum(1, keepdims=True)


def fit(model: keras.Model, callback: FerryCheckpoint, epochs: int = 1, **options) -> None:
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=[callback], **options)


def landed(tmp_path: Path, name: str) -> dict[str, np.ndarray]:
    opened = tensorferry.open(tmp_path / "root" / name)
    return {key: np.asarray(opened[key]) for key in opened}


def values_of(model: keras.Model) -> dict[str, np.ndarray]:
    return {name: v.numpy() for name, v in variables_of(model).items()}


# ---------------------------------------------------------------- what lands


def test_every_epoch_lands_with_the_optimizer(server: tensorferry.Server, tmp_path: Path) -> None:
    model = model_of()
    callback = FerryCheckpoint(server.url("run7/{epoch:02d}"))
    fit(model, callback, epochs=2)
    assert [destination for destination, _ in callback.reports] == [server.url("run7/01"), server.url("run7/02")]
    last = landed(tmp_path, "run7/02")
    expected = values_of(model)
    assert list(last) == list(expected)
    assert any(name.startswith("optimizer/adam/") for name in last)
    for name, values in expected.items():
        assert last[name].dtype == values.dtype
        np.testing.assert_array_equal(last[name], values, err_msg=name)
    first = landed(tmp_path, "run7/01")
    assert not np.array_equal(first["sequential/dense/kernel"], last["sequential/dense/kernel"])
    assert callback.snapshot_s > 0


def test_a_snapshot_is_of_the_moment_of_the_save(server: tensorferry.Server, tmp_path: Path) -> None:
    model = model_of()
    seen: list[dict[str, np.ndarray]] = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            seen.append(values_of(model))

    callback = FerryCheckpoint(server.url("run7/{batch:03d}"), save_freq=3)
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[Watch(), callback])
    # While one travels the next steps change every variable.
    assert [destination.rpartition("/")[2] for destination, _ in callback.reports] == ["003", "006"]
    for batch in (3, 6):
        arrays = landed(tmp_path, f"run7/{batch:03d}")
        for name, values in seen[batch - 1].items():
            np.testing.assert_array_equal(arrays[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"save_weights_only": True}, 9),
        ({"trainable_only": True}, 6),
        ({"snapshot": False}, 23),
        ({}, 23),
    ],
)
def test_options_choose_what_lands(
    server: tensorferry.Server, tmp_path: Path, options: dict[str, bool], count: int
) -> None:
    model = model_of()
    fit(model, FerryCheckpoint(server.url("run7"), **options))
    arrays = landed(tmp_path, "run7")
    assert len(arrays) == count
    np.testing.assert_array_equal(arrays["sequential/dense/kernel"], model.layers[0].kernel.numpy())


def test_a_name_without_placeholders_is_replaced(server: tensorferry.Server, tmp_path: Path) -> None:
    model = model_of()
    callback = FerryCheckpoint(server.url("last"))
    fit(model, callback, epochs=3)
    assert len(callback.reports) == 3
    expected = values_of(model)
    np.testing.assert_array_equal(landed(tmp_path, "last")["sequential/dense/bias"], expected["sequential/dense/bias"])


def test_a_local_folder_will_do(tmp_path: Path) -> None:
    model = model_of()
    fit(model, FerryCheckpoint(tmp_path / "here" / "{epoch}"))
    assert (tmp_path / "here/1/manifest.json").is_file()


def test_variables_of_the_same_path_are_told_apart() -> None:
    class Twins(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.both = [keras.layers.Dense(2, name="twin") for _ in range(2)]

        def call(self, x):
            return self.both[1](self.both[0](x))

    model = Twins()
    model(np.zeros((1, 2), "f4"))
    names = list(variables_of(model))
    assert len(names) == 4
    assert sorted(name.rpartition("~")[2] for name in names if "~" in name) == ["1", "1"]


# ---------------------------------------------------------------- when


def test_save_freq_counts_batches_over_epochs(server: tensorferry.Server) -> None:
    model = model_of()
    callback = FerryCheckpoint(server.url("run7/{epoch}-{batch}"), save_freq=5)
    fit(model, callback, epochs=2)  # 8 batches each
    assert [destination.rpartition("/")[2] for destination, _ in callback.reports] == ["1-5", "2-2", "2-7"]


def test_save_best_only_follows_the_monitor(server: tensorferry.Server) -> None:
    model = model_of()
    callback = FerryCheckpoint(server.url("best/{epoch}"), monitor="val_mae", save_best_only=True)
    callback.set_model(model)
    model.fit(*data(), epochs=1, verbose=0)
    for epoch, value in enumerate([3.0, 4.0, 2.0, 2.0]):
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, {"val_mae": value})
    callback.on_train_end()
    assert [destination.rpartition("/")[2] for destination, _ in callback.reports] == ["1", "3"]
    assert callback.best == 2.0


def test_more_is_better_for_an_accuracy(server: tensorferry.Server) -> None:
    model = model_of()
    model.compile(optimizer="sgd", loss="mse", metrics=[keras.metrics.BinaryAccuracy(name="acc")])
    x, y = data()
    callback = FerryCheckpoint(
        server.url("best/{epoch}"), monitor="acc", save_best_only=True, initial_value_threshold=0.5
    )
    callback.set_model(model)
    model.fit(x, (y > 0).astype("f4"), epochs=1, verbose=0)
    for epoch, value in enumerate([0.4, 0.6, 0.5]):
        callback.on_epoch_end(epoch, {"acc": value})
    callback.on_train_end()
    assert [destination.rpartition("/")[2] for destination, _ in callback.reports] == ["2"]


def test_an_unknown_metric_needs_a_mode(server: tensorferry.Server) -> None:
    callback = FerryCheckpoint(server.url("x"), monitor="luck", save_best_only=True)
    callback.set_model(model_of())
    callback.best = 1.0
    with pytest.raises(ValueError, match="mode"):
        callback.on_epoch_end(0, {"luck": 2.0})


def test_a_monitor_that_is_not_there_saves_and_warns(server: tensorferry.Server) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = FerryCheckpoint(server.url("x"), save_best_only=True)
        fit(model_of(), callback)
    assert any("val_loss" in str(one.message) for one in caught)
    assert len(callback.reports) == 1


@pytest.mark.parametrize(
    "wrong", [{"save_freq": 0}, {"save_freq": "batch"}, {"save_freq": True}, {"mode": "up"}, {"wait_timeout_s": 0}]
)
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FerryCheckpoint("ferry://lab/x", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("filepath", ["", "ferry://127.0.0.1:9", "ferry://127.0.0.1:9/", "lab:"])
def test_a_destination_without_a_name_is_refused(filepath: str) -> None:
    with pytest.raises(ValueError, match="names no checkpoint"):
        FerryCheckpoint(filepath)


def test_an_option_that_does_not_exist_is_refused_before_training() -> None:
    with pytest.raises(TypeError, match="max_to_keep"):
        FerryCheckpoint("ferry://lab/x", max_to_keep=3)
    FerryCheckpoint("ferry://lab/x", metadata={"a": "b"}, durability="end", key="k", detect_mutation=False)


def test_a_placeholder_that_is_not_there_says_what_is(server: tensorferry.Server) -> None:
    with pytest.raises(KeyError, match="epoch"):
        fit(model_of(), FerryCheckpoint(server.url("{val_loss:.2f}")))


# ---------------------------------------------------------------- waiting and failing


class FakeHandle:
    """A save that ends when it is told to."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self._until = time.monotonic() + seconds
        self._error = error
        self.is_cancelled = False

    def done(self) -> bool:
        return time.monotonic() >= self._until

    def result(self, timeout: float | None = None) -> str:
        left = self._until - time.monotonic()
        if timeout is not None and left > timeout:
            time.sleep(timeout)
            raise TimeoutError
        time.sleep(max(left, 0))
        if self._error is not None:
            raise self._error
        return "report"

    def cancel(self) -> None:
        self.is_cancelled = True


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeHandle]]:
    """Handles that the next saves give, in this order; afterwards all were used."""
    handles: list[FakeHandle] = []
    given: list[FakeHandle] = []

    def save_async(*_: object, **__: object) -> FakeHandle:
        assert all(handle.done() for handle in given), "a save began while another was under way"
        given.append(handles.pop(0))
        return given[-1]

    monkeypatch.setattr(tensorferry, "save_async", save_async)
    yield handles
    assert handles == []


def test_one_save_waits_for_the_one_before(handles: list[FakeHandle]) -> None:
    callback = FerryCheckpoint("ferry://lab/{epoch}")
    callback.set_model(model_of())
    handles += [FakeHandle(seconds=0.5), FakeHandle()]
    for epoch in range(2):
        callback.on_epoch_end(epoch)
    callback.on_train_end()
    assert [destination for destination, _ in callback.reports] == ["ferry://lab/1", "ferry://lab/2"]
    assert 0.3 < callback.wait_s < 5


def test_the_wait_is_bounded(handles: list[FakeHandle]) -> None:
    slow = FakeHandle(seconds=3600)
    handles.append(slow)
    callback = FerryCheckpoint("ferry://lab/x", wait_timeout_s=0.1)
    with pytest.raises(TimeoutError, match=r"ferry://lab/x took longer than 0\.1 s"):
        fit(model_of(), callback)
    assert slow.is_cancelled


def test_a_failure_is_raised_at_the_next_save(handles: list[FakeHandle]) -> None:
    handles.append(FakeHandle(error=tensorferry.FerryError("the disk is full")))
    callback = FerryCheckpoint("ferry://lab/{epoch}")
    model = model_of()
    with pytest.raises(tensorferry.FerryError, match="the disk is full"):
        fit(model, callback, epochs=5)
    assert int(model.optimizer.iterations) == 16  # the second epoch's end


def test_a_failure_of_the_last_save_is_raised_by_fit(handles: list[FakeHandle]) -> None:
    handles.append(FakeHandle(seconds=0.2, error=tensorferry.FerryError("the disk is full")))
    with pytest.raises(tensorferry.FerryError, match="the disk is full"):
        fit(model_of(), FerryCheckpoint("ferry://lab/{epoch}"))


def test_a_server_that_is_not_there_fails_the_training(tmp_path: Path) -> None:
    with tensorferry.Server(tmp_path / "root") as server:
        url = server.url("x")
    with pytest.raises(tensorferry.FerryError):
        fit(model_of(), FerryCheckpoint(url, retries=0))


# ---------------------------------------------------------------- back


@pytest.mark.parametrize("is_pulled", [True, False])
def test_training_goes_on_from_what_landed(server: tensorferry.Server, tmp_path: Path, is_pulled: bool) -> None:
    model = model_of()
    fit(model, FerryCheckpoint(server.url("run7")), epochs=2)
    other = model_of(seed=1)
    other.layers[0].kernel.assign(np.zeros((INPUT, 16), "f4"))
    source = server.url("run7") if is_pulled else tmp_path / "root/run7"
    assert restore(other, source) == ()
    expected, found = values_of(model), values_of(other)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    # The optimizer, too: the next step is the same one.
    x, y = data()
    keras.utils.set_random_seed(2)
    model.train_on_batch(x, y)
    keras.utils.set_random_seed(2)
    other.train_on_batch(x, y)
    np.testing.assert_allclose(other.layers[0].kernel.numpy(), model.layers[0].kernel.numpy(), rtol=1e-6)


def test_weights_alone_are_restored_and_the_rest_is_named(server: tensorferry.Server, tmp_path: Path) -> None:
    model = model_of()
    fit(model, FerryCheckpoint(server.url("run7")))
    other = model_of(seed=1)
    left = restore(other, tmp_path / "root/run7", optimizer=False)
    assert left and all(name.startswith("optimizer/") for name in left)
    x, _ = data()
    np.testing.assert_array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_model_that_does_not_fit_is_left_alone(server: tensorferry.Server, tmp_path: Path) -> None:
    fit(model_of(), FerryCheckpoint(server.url("run7"), save_weights_only=True))
    keras.backend.clear_session()
    other = keras.Sequential([keras.layers.Input((INPUT,)), keras.layers.Dense(3), keras.layers.Dense(7, name="new")])
    before = [v.numpy() for v in other.variables]
    with pytest.raises(tensorferry.FerryError, match="new/kernel"):
        restore(other, tmp_path / "root/run7")
    keras.backend.clear_session()
    narrow = keras.Sequential([keras.layers.Input((INPUT,)), keras.layers.Dense(3)])
    with pytest.raises(tensorferry.FerryError, match=r"dense/kernel.*\[8, 16\].*\[8, 3\]"):
        restore(narrow, tmp_path / "root/run7")
    for values, variable in zip(before, other.variables):
        np.testing.assert_array_equal(variable.numpy(), values)


def named_model() -> keras.Model:
    """Named, but for its optimizer, whose name gets a number from Keras."""
    layers = [keras.layers.Input((INPUT,)), keras.layers.Dense(1, name="out")]
    model = keras.Sequential(layers, name="net")
    model.compile(optimizer="adam", loss="mse", jit_compile=False)
    return model


def test_a_second_model_of_one_process_is_restored_with_its_optimizer(tmp_path: Path) -> None:
    keras.backend.clear_session()
    model, other = named_model(), named_model()
    fit(model, FerryCheckpoint(tmp_path / "here"))
    assert restore(other, tmp_path / "here") == ()
    assert model.optimizer.variables[0].path != other.optimizer.variables[0].path
    for there, here in zip(model.optimizer.variables, other.optimizer.variables, strict=True):
        np.testing.assert_array_equal(here.numpy(), there.numpy(), err_msg=here.path)


def test_another_optimizer_is_not_restored_and_the_hint_can_be_followed(tmp_path: Path) -> None:
    keras.backend.clear_session()
    model, other = named_model(), named_model()
    fit(model, FerryCheckpoint(tmp_path / "here"))
    other.compile(optimizer="sgd", loss="mse")
    with pytest.raises(tensorferry.FerryError, match="optimizer=False") as caught:
        restore(other, tmp_path / "here")
    assert "strict" not in str(caught.value)
    assert restore(other, tmp_path / "here", optimizer=False)
