"""TensorFlow and Keras: names, flags, no copies, and the way back."""

import os

import numpy as np
import pytest
from conftest import same_bytes

import tensorferry as ferry

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")


def model():
    return keras.Sequential([
        keras.layers.Input((4,)),
        keras.layers.Dense(3, name="one"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(2, name="two"),
    ], name="net")


def test_a_keras_model_goes_and_comes_back_by_paths(server, tmp_path):
    saved, other = model(), model()
    report = ferry.save(saved, server.url("m"))
    assert report.copied_bytes == 0
    landed = ferry.open(tmp_path / "root/m")
    assert list(landed) == [variable.path for variable in saved.weights]
    assert set(landed.trainable) == {variable.path for variable in saved.trainable_variables}
    for variable in saved.weights:
        assert same_bytes(landed[variable.path], variable.numpy())
    ferry.load_into(other, server.url("m"))
    x = np.ones((2, 4), np.float32)
    assert np.array_equal(saved(x), other(x))
    ferry.save(saved, server.url("t"), trainable=True)
    assert list(ferry.open(tmp_path / "root/t")) == [variable.path for variable in saved.trainable_variables]
    with pytest.raises(ferry.FerryError, match="no tensors"):
        ferry.load_into(keras.Sequential([keras.layers.Dense(3)]), server.url("m"))


def test_variables_modules_and_tensors(server, tmp_path):
    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tf.ones((2, 2), tf.bfloat16), name="w")
            self.layers = [tf.Variable(1.0, name="w"), tf.Variable(2, trainable=False)]

    module = Module()
    ferry.save(module, server.url("module"))
    landed = ferry.open(tmp_path / "root/module")
    assert set(landed) == {"w", "layers/0", "layers/1"}
    assert set(landed.trainable) == {"w", "layers/0"}
    assert landed["w"].dtype.name == "bfloat16" and landed["layers/1"] == 2
    other = Module()
    other.w.assign(tf.zeros((2, 2), tf.bfloat16))
    ferry.load_into(other, tmp_path / "root/module")
    assert np.array_equal(other.w.numpy(), module.w.numpy())
    named = [tf.Variable(1.0, name="a"), tf.Variable(2.0, name="b")]
    ferry.save(named, server.url("list"))
    assert list(ferry.open(tmp_path / "root/list")) == ["a", "b"]
    ferry.save({"x": tf.constant([1, 2]), "y": [named[0]]}, server.url("dict"))
    landed = ferry.open(tmp_path / "root/dict")
    assert list(landed["x"]) == [1, 2] and landed.trainable == ("y/0",)


def test_memory_of_variables_is_lent_and_a_training_that_goes_on_does_not_change_it(server, tmp_path):
    from tensorferry._convert import lent

    variable = tf.Variable(np.ones(8 << 20, np.float32))
    first, second = lent("v", variable), lent("v", variable)
    assert np.shares_memory(first.array, second.array)
    del first, second
    # TensorFlow makes a new buffer for a variable whose old one is lent.
    handle = ferry.save_async({"v": variable}, server.url("v"), snapshot=False, bwlimit="16M", codec="none")
    for _ in range(3):
        variable.assign_add(tf.ones_like(variable))
    handle.result(60)
    landed = ferry.open(tmp_path / "root/v")["v"]
    assert landed.min() == landed.max() == 1
    assert variable.numpy()[0] == 4


def test_a_training_model_serves_its_weights(tmp_path):
    served = model()
    with ferry.serve_model(served) as server:
        ferry.pull(server.url, tmp_path / "1")
        for variable in served.weights:
            variable.assign(variable + 1)
        ferry.pull(server.url, tmp_path / "2", include=["*kernel"])
        ferry.load_into(model(), server.url)
    assert len(ferry.open(tmp_path / "1")) == len(served.weights)
    for name, array in ferry.open(tmp_path / "2").items():
        assert np.array_equal(array, ferry.open(tmp_path / "1")[name] + 1)


def test_two_variables_of_one_name_are_refused(server):
    twice = [tf.Variable(1.0, name="a"), tf.Variable(2.0, name="a")]
    with pytest.raises(ferry.FerryError, match="two tensors are called 'a'"):
        ferry.save(twice, server.url("x"))
