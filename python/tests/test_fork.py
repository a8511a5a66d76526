"""What a forked process inherits is not its own to remove."""

import sys

import pytest

pytest.importorskip("fsspec")

FORKS = """
    import atexit, gc, os, sys, warnings
    warnings.simplefilter("ignore")
    import tensorferry
    from tensorferry._temporary import TemporaryFolder
    from tensorferry.fsspec import FerryFileSystem

    server = tensorferry.Server(sys.argv[1])
    fs = FerryFileSystem(host=server.address)
    fs.pipe("/a", b"1")
    assert fs.cat("/a") == b"1"
    upload = fs.open("/b", "wb")
    upload.write(b"2")
    # As with every file in Python, what is in its buffer would be written by both.
    upload.flush()
    model_server = tensorferry.serve_model({})
    plain = TemporaryFolder("tensorferry-test-", sys.argv[1])
    folders = [fs._cache, upload._folder.name, model_server.root, plain.name]

    child = os.fork()
    if child == 0:
        # As a worker does that ends well: everything is dropped, then what is left at the end.
        plain.cleanup()
        FerryFileSystem.clear_instance_cache()
        if sys.argv[2] == "dropped":
            del fs, upload, model_server, plain
            gc.collect()
        atexit._run_exitfuncs()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert all(map(os.path.isdir, folders)), folders
    upload.close()
    assert fs.cat("/b") == b"2" and fs.cat("/a") == b"1"

    model_server.stop()
    plain.cleanup()
    plain.cleanup()
    FerryFileSystem.clear_instance_cache()
    del fs, upload
    gc.collect()
    assert not any(map(os.path.exists, folders)), folders
    left = TemporaryFolder("tensorferry-test-", sys.argv[1])
    print(left.name)
    server.stop()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks beside threads")
@pytest.mark.parametrize("how", ["dropped", "kept"])
def test_a_forked_process_removes_nothing(script, tmp_path, how):
    process = script(FORKS, tmp_path / "root", how)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    # What nobody dropped is gone with its process.
    assert out.strip() and not (tmp_path / "root" / out.strip()).exists()
