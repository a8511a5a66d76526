"""Errors have a class, a code, a hint and their causes."""

import numpy as np
import pytest

import tensorferry as ferry

ONE = {"w": np.ones(3)}


def test_nobody_listens():
    with pytest.raises(ferry.RetryableError) as caught:
        ferry.save_file(ONE, "ferry://127.0.0.1:1/x", retries=0)
    error = caught.value
    assert (error.code, error.exit_code) == ("network", 5)
    assert "same call" in error.hint and "command" not in error.hint


def test_a_name_is_taken(server):
    ferry.save_file(ONE, server.url("x"))
    with pytest.raises(ferry.ExistsError) as caught:
        ferry.save_file({"w": np.zeros(3)}, server.url("x"))
    assert "overwrite=True" in caught.value.hint and "--" not in caught.value.hint
    assert isinstance(caught.value, ferry.FerryError)
    ferry.save_file({"w": np.zeros(3)}, server.url("x"), overwrite=True)


def test_beyond_this_machine_only_when_that_is_said(tmp_path):
    with pytest.raises(ferry.AuthError) as caught:
        ferry.Server(tmp_path, "0.0.0.0:0")
    assert "insecure=True" in str(caught.value) or "insecure" in str(caught.value)
    with ferry.Server(tmp_path, "0.0.0.0:0", insecure=True) as server:
        assert "0.0.0.0" not in server.url("x")


def test_a_port_is_taken(tmp_path, server):
    with pytest.raises(ferry.FerryError, match="cannot listen on") as caught:
        ferry.Server(tmp_path, server.address)
    assert caught.value.code == "other" and "another port" in caught.value.hint


def test_causes_are_kept(tmp_path):
    with pytest.raises(ferry.FerryError) as caught:
        ferry.push(tmp_path / "nothing", tmp_path / "out")
    error = caught.value
    assert error.code == "source-missing" and error.causes and "nothing" in str(error)
    assert isinstance(error.__cause__, ferry.FerryError)


@pytest.mark.parametrize(
    "options",
    [{"codec": "zip"}, {"durability": "x"}, {"layout": "x"}, {"out_format": "x"}, {"npy_dtype": "x"},
     {"bwlimit": "fast"}, {"lanes": 99}, {"include": "a*"}],
)
def test_values_that_make_no_sense_are_refused(server, options):
    with pytest.raises((ValueError, ferry.FerryError)):
        ferry.save_file(ONE, server.url("x"), **options)


def test_options_that_do_not_exist_are_refused(server):
    with pytest.raises(TypeError, match="speed"):
        ferry.save_file(ONE, server.url("x"), speed=9)


@pytest.mark.parametrize("dest", ["http://lab/x", "ferry://lab", "lab:7744/run", ""])
def test_destinations_that_make_no_sense_are_refused(dest):
    with pytest.raises(ferry.FerryError) as caught:
        ferry.save_file(ONE, dest)
    assert caught.value.code == "usage"


def test_a_pull_comes_from_a_server(tmp_path):
    with pytest.raises(ferry.FerryError, match="ferry://"):
        ferry.pull(str(tmp_path), tmp_path / "here")


def test_words_of_the_native_side_become_fields():
    from tensorferry._errors import from_native

    error = from_native({
        "code": "integrity", "exit_code": 6, "retryable": False, "hint": None, "causes": ["inner"], "tensor": None,
        "message": '5 chunks in a row arrived damaged, the last at byte 262144 of "a\\"b\\u{1f}": expected',
    })
    assert isinstance(error, ferry.IntegrityError)
    assert (error.tensor, error.offset) == ('a"b\x1f', 262144)
    assert str(error.__cause__) == "inner"


@pytest.mark.parametrize("nothing", [None, {}, [], {"a": {"b": None}}])
def test_nothing_is_not_published(server, nothing):
    for call in (ferry.save, ferry.save_async) + ((ferry.save_file,) if nothing == {} else ()):
        with pytest.raises(ValueError, match="nothing to save"):
            call(nothing, server.url("x"))
    assert ferry.Client(server.address).list() == []


def test_no_model_is_not_served():
    with pytest.raises(TypeError, match="None"):
        ferry.serve_model(None)


@pytest.mark.parametrize("server", ["", "ferry://", "ferry://lab/run7", "lab/run7"])
def test_a_client_is_of_a_server_and_not_of_a_checkpoint(server):
    with pytest.raises(ValueError, match="is no server"):
        ferry.Client(server)


@pytest.mark.parametrize("call", [ferry.open, ferry.verify])
def test_what_is_on_a_server_is_pulled_first(server, call):
    for url in (server.url("x"), "lab:run7"):
        with pytest.raises(ferry.FerryError, match="is on a server.*pull it first") as caught:
            call(url)
        assert caught.value.code == "usage"


@pytest.mark.parametrize("call", [ferry.push, ferry.pull, ferry.save, ferry.save_file])
def test_help_shows_what_is_for_callers_only(call):
    import inspect

    assert not [name for name in inspect.signature(call).parameters if name.startswith("_")]
