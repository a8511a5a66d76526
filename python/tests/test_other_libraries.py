"""PyTorch by stand-ins for its classes, JAX where it is installed."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest
from conftest import same_bytes

import tensorferry as ferry


@pytest.fixture
def torch(monkeypatch):
    """As much of PyTorch as is used: the classes say that they are of that module."""
    if "torch" in sys.modules:
        pytest.skip("the real one is there")

    class Tensor:
        __module__ = "torch"
        requires_grad = False

        def __init__(self, array, kind):
            self.array, self.kind = array, kind
            self.dtype = f"torch.{kind}"
            self.device = types.SimpleNamespace(type="cpu")
            self.shape = array.shape

        detach = cpu = lambda self: self
        is_conj = is_neg = lambda self: False

        def view(self, kind):
            return Tensor(self.array.view(kind), np.dtype(kind).name)

        def numpy(self):
            if self.kind == "bfloat16":
                raise TypeError("Got unsupported ScalarType BFloat16")
            return self.array

        def __array__(self, *_):
            return self.numpy()

        def copy_(self, other):
            self.array[...] = other.array.reshape(self.array.shape).view(self.array.dtype)

    class Parameter(Tensor):
        requires_grad = True

    class Module:
        __module__ = "torch.nn"

        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return dict(self.state)

        def named_parameters(self):
            return [(name, value) for name, value in self.state.items() if value.requires_grad]

    class NoGrad:
        __enter__ = __exit__ = lambda *_: None

    module = types.ModuleType("torch")
    module.Tensor, module.Parameter, module.Module = Tensor, Parameter, Module
    module.int16, module.uint8, module.bfloat16 = np.int16, np.uint8, ml_dtypes.bfloat16
    module.from_numpy = lambda array: Tensor(array, array.dtype.name)
    module.no_grad = NoGrad
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_a_state_dict_goes_and_comes_back(server, tmp_path, noise, torch):
    half = noise((2, 3), np.int16)
    model = torch.Module({
        "layer.weight": torch.Parameter(noise((3, 3)), "float32"),
        "layer.half": torch.Parameter(half, "bfloat16"),
        "steps": torch.Tensor(np.array(7), "int64"),
    })
    report = ferry.save(model, server.url("m"))
    assert report.copied_bytes == 0
    landed = ferry.open(tmp_path / "root/m")
    assert list(landed) == ["layer.weight", "layer.half", "steps"]
    assert landed.trainable == ("layer.weight", "layer.half")
    assert same_bytes(landed["layer.half"], half.view(ml_dtypes.bfloat16))
    ferry.save(model.state_dict(), server.url("dict"))
    assert list(ferry.open(tmp_path / "root/dict")) == list(landed)
    other = torch.Module({
        "layer.weight": torch.Parameter(np.zeros((3, 3), np.float32), "float32"),
        "layer.half": torch.Parameter(np.zeros((2, 3), np.int16), "bfloat16"),
        "steps": torch.Tensor(np.array(0), "int64"),
    })
    ferry.load_into(other, tmp_path / "root/m")
    assert same_bytes(other.state["layer.half"].array, half)
    assert other.state["steps"].array == 7


def test_pytrees_of_jax(server, tmp_path):
    jax = pytest.importorskip("jax")
    tree = {"params": {"w": jax.numpy.ones((1024, 1024)), "h": jax.numpy.ones(3, jax.numpy.bfloat16)}, "step": 3}
    assert ferry.save(tree, server.url("j")).copied_bytes == 0
    landed = ferry.open(tmp_path / "root/j")
    assert list(landed) == ["params/w", "params/h", "step"]
    assert landed["params/h"].dtype.name == "bfloat16"
