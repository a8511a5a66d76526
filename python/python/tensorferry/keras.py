"""Saves a Keras model while it trains.

:class:`FerryCheckpoint` is a callback with the argument names of
``keras.callbacks.ModelCheckpoint``. Instead of one ``.keras`` file it leaves a folder
with a memory-mappable ``.npy`` file for each variable, on a server or on this machine,
and training goes on while the bytes travel::

    from tensorferry.keras import FerryCheckpoint

    model.fit(x, y, callbacks=[FerryCheckpoint("ferry://lab/run7/{epoch:02d}")])

:func:`restore` puts such a folder back into a model, with its optimizer.

Needs Keras 3. Tested with TensorFlow behind it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorferry

from . import _save

__all__ = ["OPTIMIZER_PREFIX", "FerryCheckpoint", "restore", "variables_of"]

OPTIMIZER_PREFIX = "optimizer/"
"""What the names of an optimizer's variables begin with in a checkpoint."""

# What save_async itself takes, of what FerryCheckpoint hands on.
_OF_SAVE_ASYNC = ("trainable", "name", "metadata", "detect_mutation", "key", "progress")


def variables_of(model: keras.Model, *, optimizer: bool = True, trainable_only: bool = False) -> dict[str, Any]:
    """The variables of a model by the names that they have in a checkpoint.

    Args:
        model: a built model.
        optimizer: also those of the optimizer (moments, iteration, learning rate), with
            :data:`OPTIMIZER_PREFIX` in front. A model that was not compiled has none.
        trainable_only: leave out what is not trained: moving statistics, seeds of dropout,
            and the optimizer.

    Returns:
        Keras variables in the order of the model. A name is the variable's ``path``
        (``sequential/dense/kernel``). Where two variables have the same path, the later
        ones get ``~1``, ``~2``, … at the end, in the order of the model.
    """
    named = dict(_distinct((v.path, v) for v in (model.trainable_variables if trainable_only else model.variables)))
    if optimizer and not trainable_only and getattr(model, "optimizer", None) is not None:
        named.update(_distinct((OPTIMIZER_PREFIX + v.path, v) for v in model.optimizer.variables))
    return named


def _distinct(pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    taken: set[str] = set()
    for path, variable in pairs:
        candidates = itertools.chain([path], (f"{path}~{number}" for number in itertools.count(1)))
        name = next(candidate for candidate in candidates if candidate not in taken)
        taken.add(name)
        yield name, variable


def restore(model: keras.Model, source: str | os.PathLike[str], *, optimizer: bool = True) -> tuple[str, ...]:
    """Puts what :class:`FerryCheckpoint` saved back into a model, in place.

    :func:`tensorferry.load_into` does the same for a model without its optimizer.

    Args:
        model: a model of the same architecture, built, and compiled if its optimizer is to
            be restored. Names of layers must be the same: give layers names, or call
            ``keras.backend.clear_session()`` before the model is made a second time in one
            process, for Keras numbers the names that it invents. The number of an optimizer
            (``adam_1``) does not matter.
        source: a folder, ``ferry://HOST[:PORT]/NAME`` or ``HOST:NAME``; from a server it is
            fetched into a temporary folder first.
        optimizer: also restore the optimizer's variables. A checkpoint that has none of them
            (``save_weights_only``) is taken without. One that has the trained variables only is for
            :func:`tensorferry.load_into` with ``strict=False``.

    Returns:
        Names that the checkpoint has and the model has not; they were left alone.

    Raises:
        tensorferry.FerryError: the checkpoint lacks a variable of the model, or a shape or type
            differs. Nothing was changed.
    """
    with contextlib.ExitStack() as stack:
        if not os.path.isdir(source):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorferry-restore-"))
            pulled = os.path.join(folder, "pulled")
            tensorferry.pull(os.fspath(source), pulled)
            source = pulled
        has_optimizer = any(name.startswith(OPTIMIZER_PREFIX) for name in tensorferry.open(source))
        wants_optimizer = optimizer and has_optimizer and getattr(model, "optimizer", None) is not None
        if wants_optimizer and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables = variables_of(model, optimizer=wants_optimizer)
        try:
            return tensorferry.load_into(_as_saved(variables, tensorferry.open(source)), source).unused
        except tensorferry.FerryError as error:
            if error.code == "source-missing":
                error.hint = _hint(error)
            raise


def _as_saved(variables: Mapping[str, Any], checkpoint: Iterable[str]) -> dict[str, Any]:
    """The variables by the names of the checkpoint. Keras numbers the optimizers of a process,
    ``adam``, ``adam_1``, …: where only that number differs, and one alone fits, it is that one."""
    saved = _by_plain_name(checkpoint)
    wanted = _by_plain_name(variables)
    renamed = {}
    for name, variable in variables.items():
        plain = _plain(name)
        here, there = wanted.get(plain, ()), saved.get(plain, ())
        renamed[there[0] if len(here) == len(there) == 1 else name] = variable
    return renamed


def _by_plain_name(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(OPTIMIZER_PREFIX):
            found.setdefault(_plain(name), []).append(name)
    return found


def _plain(name: str) -> str:
    return re.sub(rf"^({OPTIMIZER_PREFIX}[^/]*?)_\d+/", r"\1/", name)


def _hint(error: tensorferry.FerryError) -> str:
    """What can be done about a variable that is missing. ``load_into`` speaks of its own arguments."""
    has = (error.hint or "").partition(";")[0]
    if (error.tensor or "").startswith(OPTIMIZER_PREFIX):
        return f"{has}; optimizer=False restores the weights alone"
    return (
        f"{has}; names must be the same: name the model and its layers, or call keras.backend.clear_session() "
        "before a model is made a second time; tensorferry.load_into(model, source, strict=False) leaves missing "
        "ones as they are"
    )


class FerryCheckpoint(keras.callbacks.Callback):
    """Saves the model to a server or a folder while training goes on.

    When it is time to save, the variables are copied (``snapshot``); that copy is all that
    training waits for. It then travels in the background. At most one save is under way: the
    next one first waits for it, at most ``wait_timeout_s``. A save that failed raises at the
    next one, or at the end of training, whichever comes first. ``fit`` returns only when the
    last save is published and as durable as the receiver says (:attr:`reports`).

    The memory needed is that of the variables once more, for as long as a save is under way.

    Args:
        filepath: where to save: ``ferry://HOST[:PORT]/NAME``, ``HOST:NAME``, or a local folder.
            May contain ``{epoch}`` (from 1), with ``save_freq`` as a number ``{batch}`` (from 1),
            and the names in ``logs``: ``"ferry://lab/run7/{epoch:02d}-{val_loss:.2f}"``.
            What already is published under the name is replaced, in one step, when the new one
            is complete. No checkpoint may lie inside another, so ``run7`` and ``run7/01`` cannot both be.
            No ending such as ``.keras`` is needed.
        monitor: the quantity that ``save_best_only`` looks at.
        verbose: 1 prints a line for each save, 0 nothing.
        save_best_only: save only when ``monitor`` is better than at all saves before.
        save_weights_only: leave the optimizer's variables out. The architecture is never saved:
            it is the program's.
        mode: ``"min"`` or ``"max"``: what better means. ``"auto"``: as the monitored metric says.
        save_freq: ``"epoch"``, or after so many batches.
        initial_value_threshold: only what is better than this is the first best.
        snapshot: copy the variables first, so that training can go on. ``False`` needs no memory
            for a copy: then training stands still until the save is published.
        trainable_only: save only what is trained, for inference: neither moving statistics nor
            the optimizer.
        wait_timeout_s: the longest that a save waits for the one before it, and the end of
            training for the last one, in seconds. ``TimeoutError`` after that; the bytes that are
            durable by then stay with the receiver, and saving again resumes.

    Other keyword arguments go to :func:`tensorferry.save_async` (``durability``, ``codec``, …).

    There is no ``max_to_keep``: a server has no call that deletes what is published.

    With several processes of one training, give the callback to one of them.

    Attributes:
        reports: list of ``(destination, report)`` of what is published, oldest first.
        snapshot_s: seconds that training stood still for copies, in all.
        wait_s: seconds that training stood still for saves that were not done yet, in all.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        snapshot: bool = True,
        trainable_only: bool = False,
        wait_timeout_s: float = 600.0,
        **save_options: Any,
    ) -> None:
        super().__init__()
        # Now, and not at the end of the first epoch.
        _save.options_of_save({k: v for k, v in save_options.items() if k not in _OF_SAVE_ASYNC})
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode is 'auto', 'min' or 'max', not {mode!r}")
        is_count = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0
        if save_freq != "epoch" and not is_count:
            raise ValueError(f"save_freq is 'epoch' or a number of batches, not {save_freq!r}")
        if wait_timeout_s <= 0:
            raise ValueError(f"wait_timeout_s is a positive number of seconds, not {wait_timeout_s!r}")
        self.filepath = os.fspath(filepath)
        if not self.filepath or re.fullmatch(r"ferry://[^/]*/*|[^/:]+:", self.filepath):
            raise ValueError(f"filepath {self.filepath!r} names no checkpoint: it is ferry://HOST[:PORT]/NAME")
        self.monitor = monitor
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.save_freq = save_freq
        self.snapshot = snapshot
        self.trainable_only = trainable_only
        self.wait_timeout_s = wait_timeout_s
        self.best = initial_value_threshold
        self.reports: list[tuple[str, Any]] = []
        self.snapshot_s = 0.0
        self.wait_s = 0.0
        # What stands under the name is an older state of this training: Keras replaces it, too.
        self._save_options = {"overwrite": True, **save_options}
        self._under_way: tuple[str, Any] | None = None
        self._direction: str | None = None if mode == "auto" else mode
        self._epoch = 0
        self._batches_since = 0
        self._last_batch = -1

    # ---------------------------------------------------------------- when

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if not isinstance(self.save_freq, int):
            return
        # With steps_per_execution > 1 only every so many batches are seen, and a new epoch begins at 0.
        self._batches_since += batch - self._last_batch if batch > self._last_batch else batch + 1
        self._last_batch = batch
        if self._batches_since >= self.save_freq:
            self._batches_since = 0
            self._consider(self._epoch, batch, logs)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self.save_freq == "epoch":
            self._consider(epoch, None, logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self.wait()

    def _consider(self, epoch: int, batch: int | None, logs: Mapping[str, Any] | None) -> None:
        # Here and not in on_train_batch_end only: a failure must not wait for the next best model.
        if self._under_way is not None and self._under_way[1].done():
            self.wait()
        logs = logs or {}
        if self.save_best_only and not self._is_best(epoch, logs):
            return
        self._save(self.destination(epoch, batch, logs), epoch, batch)

    def _is_best(self, epoch: int, logs: Mapping[str, Any]) -> bool:
        current = logs.get(self.monitor)
        if current is None or np.ndim(current) > 0:
            what = "is not there" if current is None else "is no single number"
            warnings.warn(
                f"saved although {self.monitor!r} {what}: it cannot be told whether it is better", stacklevel=4
            )
            return True
        current = float(current)
        is_better = self.best is None or (current < self.best if self._better() == "min" else current > self.best)
        if is_better:
            self._say(f"epoch {epoch + 1}: {self.monitor} is {current:.5g}, was {self.best}")
            self.best = current
        return is_better

    def _better(self) -> str:
        """``min`` or ``max``. Asked late: Keras builds the metrics at the first batch."""
        if self._direction is None:
            self._direction = _direction_of(self.model, self.monitor)
        return self._direction

    # ---------------------------------------------------------------- where and what

    def destination(self, epoch: int, batch: int | None, logs: Mapping[str, Any] | None = None) -> str:
        """``filepath`` with its placeholders filled; ``epoch`` and ``batch`` count from 0.

        Raises:
            KeyError: a placeholder that is neither ``epoch`` nor ``batch`` nor in ``logs``.
        """
        known = {"epoch": epoch + 1, **(logs or {})}
        if batch is not None:
            known.setdefault("batch", batch + 1)
        try:
            return self.filepath.format(**known)
        except KeyError as error:
            raise KeyError(f"filepath {self.filepath!r} needs {error}; there are {', '.join(sorted(known))}") from None

    def _save(self, destination: str, epoch: int, batch: int | None) -> None:
        self.wait()
        variables = variables_of(self.model, optimizer=not self.save_weights_only, trainable_only=self.trainable_only)
        begun = time.perf_counter()
        handle = tensorferry.save_async(variables, destination, snapshot=self.snapshot, **self._save_options)
        self.snapshot_s += time.perf_counter() - begun
        self._under_way = (destination, handle)
        self._say(f"epoch {epoch + 1}{'' if batch is None else f', batch {batch + 1}'}: saving to {destination}")
        if not self.snapshot:
            # What travels is the variables themselves: the next step would change them on their way.
            self.wait()

    def wait(self) -> None:
        """Waits until the save under way, if any, is published and durable.

        Raises:
            TimeoutError: it was not after ``wait_timeout_s``; it was told to stop.
            tensorferry.FerryError: it failed.
        """
        if self._under_way is None:
            return
        destination, handle = self._under_way
        self._under_way = None
        begun = time.perf_counter()
        try:
            report = handle.result(timeout=self.wait_timeout_s)
        except TimeoutError:
            handle.cancel()
            raise TimeoutError(f"saving to {destination} took longer than {self.wait_timeout_s:g} s") from None
        finally:
            self.wait_s += time.perf_counter() - begun
        self.reports.append((destination, report))
        self._say(f"saved {destination}")

    def _say(self, text: str) -> None:
        if self.verbose > 0:
            print(text, flush=True)


def _direction_of(model: keras.Model, monitor: str) -> str:
    """What better means for a metric, from the metric itself.

    Raises:
        ValueError: neither a loss nor a metric that says so.
    """
    name = monitor.removeprefix("val_")
    if name == "loss" or name.endswith("_loss"):
        return "min"
    for metric in _metrics(model.metrics):
        if metric.name == name:
            # Keras' own callbacks look at the same attribute; metrics that a user wrote may lack it.
            direction = getattr(metric, "_direction", None)
            if direction in ("up", "down"):
                return "max" if direction == "up" else "min"
    raise ValueError(f"it cannot be told whether more or less of {monitor!r} is better: give mode='min' or mode='max'")


def _metrics(metrics: Iterable[Any]) -> Iterator[Any]:
    for metric in metrics:
        yield metric
        yield from _metrics(getattr(metric, "metrics", None) or ())
