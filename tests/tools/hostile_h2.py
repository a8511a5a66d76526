"""Attacks a real server with HTTP/2 that no library would send, from another address of
this machine, while an honest push and health calls go on.

    python3 tests/tools/hostile_h2.py --binary target/debug/tensorferry [--seconds 3] [ATTACK...]

Needs the packages h2, hyperframe and hpack. For each attack it prints what the server did,
how long the push and the health calls took, and the server's memory. It fails when the
push does not go through, a health call is not answered, memory or descriptors grow, or the
server is gone.
"""

import argparse
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import hpack
from hyperframe import frame as f

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ATTACKER = "127.0.0.2"
HANG = 60.0
MIB = 1 << 20
# The server's budget for chunks is 16 MiB; what waits in windows and what the allocator
# keeps come on top. It must stay below this through all attacks, one after the other.
MAX_ANON_BYTES = 256 * MIB


def connect(address, source=ATTACKER):
    return socket.create_connection(address, timeout=5, source_address=(source, 0))


def greet(address, settings=None):
    """A connection that has said its preface and settings."""
    sock = connect(address)
    first = f.SettingsFrame(0, settings=settings or {})
    sock.sendall(PREFACE + first.serialize())
    return sock


def headers(encoder, path, extra=()):
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "a"),
        (":path", path),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    return encoder.encode(fields + list(extra))


def request(stream, block, flags=("END_HEADERS",)):
    frame = f.HeadersFrame(stream, data=block)
    for flag in flags:
        frame.flags.add(flag)
    return frame.serialize()


def drain(sock):
    """Reads what is there. Returns False once the server has closed."""
    while select.select([sock], [], [], 0)[0]:
        if not sock.recv(1 << 16):
            return False
    return True


def pump(sock, pieces, until, reads=True):
    """Sends pieces until the time is over or the server closes. Returns bytes sent."""
    sent = 0
    sock.settimeout(1)
    for piece in pieces:
        if time.monotonic() > until:
            break
        try:
            sock.sendall(piece)
            sent += len(piece)
            if reads and not drain(sock):
                break
        except (TimeoutError, OSError):
            break
    return sent


def again_and_again(address, until, pieces, settings=None, reads=True):
    """One connection after the other; returns how many the server ended and bytes sent."""
    ended = sent = 0
    while time.monotonic() < until:
        try:
            sock = greet(address, settings)
            sent += pump(sock, pieces(), until, reads)
            sock.close()
        except OSError:
            pass
        ended += time.monotonic() < until
    return f"{ended} connections ended by the server, {sent / MIB:.1f} MiB sent"


def rapid_reset(address, until):
    def pieces():
        encoder = hpack.Encoder()
        for batch in range(1 << 20):
            out = b""
            for i in range(100):
                stream = 2 * (batch * 100 + i) + 1
                out += request(stream, headers(encoder, "/tensorferry.v1.Ferry/Push"))
                out += f.RstStreamFrame(stream, error_code=8).serialize()
            yield out

    return again_and_again(address, until, pieces)


def continuation_flood(address, until):
    def pieces():
        yield request(1, headers(hpack.Encoder(), "/tensorferry.v1.Ferry/Push"), flags=())
        more = hpack.Encoder().encode([(f"x-{i}", "v" * 100) for i in range(100)])
        while True:
            yield f.ContinuationFrame(1, data=more).serialize()

    return again_and_again(address, until, pieces)


def empty_continuation(address, until):
    def pieces():
        yield request(1, headers(hpack.Encoder(), "/tensorferry.v1.Ferry/Push"), flags=())
        while True:
            yield f.ContinuationFrame(1, data=b"").serialize() * 1000

    return again_and_again(address, until, pieces)


def ping_flood(address, until):
    def pieces():
        while True:
            yield f.PingFrame(0, opaque_data=b"12345678").serialize() * 1000

    # The answers are never read.
    return again_and_again(address, until, pieces, reads=False)


def settings_flood(address, until):
    def pieces():
        while True:
            yield f.SettingsFrame(0, settings={4: 65535}).serialize() * 1000

    return again_and_again(address, until, pieces, reads=False)


def window_update_flood(address, until):
    def pieces():
        while True:
            yield f.WindowUpdateFrame(0, window_increment=1).serialize() * 1000

    return again_and_again(address, until, pieces)


def empty_data(address, until):
    def pieces():
        yield request(1, headers(hpack.Encoder(), "/tensorferry.v1.Ferry/Push"))
        while True:
            yield f.DataFrame(1, data=b"").serialize() * 1000

    return again_and_again(address, until, pieces)


def one_byte_data(address, until):
    def pieces():
        yield request(1, headers(hpack.Encoder(), "/tensorferry.v1.Ferry/Push"))
        # A message of 1 MiB that comes byte by byte.
        yield f.DataFrame(1, data=b"\0" + struct.pack(">I", MIB)).serialize()
        while True:
            yield f.DataFrame(1, data=b"\x52").serialize() * 1000

    return again_and_again(address, until, pieces)


def padded_data(address, until):
    def pieces():
        yield request(1, headers(hpack.Encoder(), "/tensorferry.v1.Ferry/Push"))
        frame = f.DataFrame(1, data=b"", pad_length=255)
        frame.flags.add("PADDED")
        while True:
            yield frame.serialize() * 100

    return again_and_again(address, until, pieces)


def huge_hpack(address, until):
    def pieces():
        encoder = hpack.Encoder()
        for stream in range(1, 1 << 20, 2):
            # 4 KB go into the table once and are then named again with a byte each.
            block = headers(encoder, "/tensorferry.v1.Ferry/List", [("x", "v" * 3900)])
            yield request(stream, block + b"\xbe" * 16_000, ("END_HEADERS", "END_STREAM"))

    return again_and_again(address, until, pieces)


def many_streams(address, until):
    def pieces():
        encoder = hpack.Encoder()
        for batch in range(1 << 20):
            streams = range(200 * batch + 1, 200 * batch + 201, 2)
            yield b"".join(
                request(s, headers(encoder, "/tensorferry.v1.Ferry/Push")) for s in streams
            )

    return again_and_again(address, until, pieces)


def zero_window(address, until):
    def pieces():
        encoder = hpack.Encoder()
        body = f.DataFrame(1, data=b"\0\0\0\0\0")
        body.flags.add("END_STREAM")
        for stream in range(1, 1 << 20, 2):
            body.stream_id = stream
            yield request(stream, headers(encoder, "/tensorferry.v1.Ferry/List")) + body.serialize()

    return again_and_again(address, until, pieces, settings={4: 0})


def unread_small_data(address, until):
    """A call that the server cannot answer is not read either; its bytes wait in memory."""

    def pieces():
        path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        yield request(1, headers(hpack.Encoder(), path))
        # list_services, again and again, in DATA frames of one byte.
        message = b"\0\0\0\0\x02\x3a\x00"
        frames = b"".join(f.DataFrame(1, data=message[i : i + 1]).serialize() for i in range(7))
        while True:
            yield frames * 500

    return again_and_again(address, until, pieces, settings={4: 0})


def question_flood(address, until):
    def pieces():
        encoder = hpack.Encoder()
        body = f.DataFrame(1, data=b"\0\0\0\0\0")
        body.flags.add("END_STREAM")
        for stream in range(1, 1 << 30, 2):
            body.stream_id = stream
            yield request(stream, headers(encoder, "/tensorferry.v1.Ferry/List")) + body.serialize()
            if stream % 128 == 127:
                time.sleep(0.01)

    return again_and_again(address, until, pieces)


def silent_connections(address, until):
    socks = []
    while time.monotonic() < until:
        try:
            socks.append(connect(address))
        except OSError:
            time.sleep(0.01)
        if len(socks) > 1500:
            time.sleep(0.1)
    closed = 0
    for sock in socks:
        sock.settimeout(10)
        try:
            closed += sock.recv(1) == b""
        except ConnectionError:
            closed += 1
        except OSError:
            pass
        sock.close()
    assert closed == len(socks), f"{len(socks) - closed} of {len(socks)} stayed open"
    return f"{closed} of {len(socks)} silent connections closed"


def idle_connections(address, until):
    socks = []
    for _ in range(300):
        try:
            socks.append(greet(address))
        except OSError:
            pass
    time.sleep(max(0, until - time.monotonic()))
    open_count = 0
    for sock in socks:
        try:
            open_count += drain(sock)
        except OSError:
            pass
        sock.close()
    assert open_count <= 128, f"{open_count} connections from one address"
    return f"{open_count} of {len(socks)} connections kept"


def garbage(address, until):
    ended = 0
    while time.monotonic() < until:
        try:
            sock = greet(address)
            pump(sock, (os.urandom(4096) for _ in range(64)), until)
            sock.close()
            ended += 1
        except OSError:
            pass
    return f"{ended} connections of random bytes"


ATTACKS = {
    a.__name__: a
    for a in (
        rapid_reset, continuation_flood, empty_continuation, ping_flood, settings_flood,
        window_update_flood, empty_data, one_byte_data, padded_data, huge_hpack, many_streams,
        zero_window, unread_small_data, question_flood, silent_connections, idle_connections, garbage,
    )
}


class Server:
    def __init__(self, binary, root):
        self.process = subprocess.Popen(
            [binary, "serve", str(root), "--listen", "127.0.0.1:0", "--budget", "16M"],
            stdout=subprocess.PIPE, text=True,
        )
        host, port = self.process.stdout.readline().split()[-1].rsplit(":", 1)
        self.address = (host, int(port))

    def rss_anon_bytes(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("the server has gone")

    def descriptor_count(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def health_call(address):
    """One health call on a connection of its own; returns seconds."""
    begun = time.monotonic()
    sock = socket.create_connection(address, timeout=HANG)
    conn = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    conn.initiate_connection()
    fields = [
        (":method", "POST"), (":scheme", "http"), (":authority", "a"),
        (":path", "/grpc.health.v1.Health/Check"),
        ("te", "trailers"), ("content-type", "application/grpc"),
    ]
    conn.send_headers(1, fields)
    conn.send_data(1, b"\0\0\0\0\0", end_stream=True)
    sock.sendall(conn.data_to_send())
    body, status, ended = b"", None, False
    while not ended:
        data = sock.recv(1 << 16)
        assert data, "the server closed the connection of a health call"
        for event in conn.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                body += event.data
            elif isinstance(event, h2.events.TrailersReceived):
                status = dict(event.headers)["grpc-status"]
            ended |= isinstance(event, h2.events.StreamEnded)
        sock.sendall(conn.data_to_send())
    sock.close()
    assert status == "0" and body[5:] == b"\x08\x01", (status, body)
    return time.monotonic() - begun


def write_npy(path, byte_count):
    descr = "{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % byte_count
    text = descr.encode().ljust(128 - 11) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + os.urandom(byte_count))


def under(name, attack, server, binary, source, root, seconds):
    """Runs one attack with the honest push and health calls beside it."""
    rss_before, descriptors_before = server.rss_anon_bytes(), server.descriptor_count()
    peak, delays, failures, stop = [rss_before], [], [], threading.Event()

    def watch():
        while not stop.wait(0.02):
            peak.append(server.rss_anon_bytes())

    def ask():
        while not stop.wait(0.02):
            try:
                delays.append(health_call(server.address))
            except Exception as error:  # whatever it is, it belongs into the report
                failures.append(repr(error))

    threads = [threading.Thread(target=t, daemon=True) for t in (watch, ask)]
    for thread in threads:
        thread.start()
    outcome = {}
    until = time.monotonic() + seconds
    attackers = [
        threading.Thread(target=lambda: outcome.setdefault("said", run(attack, server.address, until)))
        for _ in range(2)
    ]
    for thread in attackers:
        thread.start()
    time.sleep(0.2)
    begun = time.monotonic()
    push = subprocess.run(
        [binary, "push", str(source), f"ferry://127.0.0.1:{server.address[1]}/{name}", "--retries", "0"],
        capture_output=True, text=True, timeout=HANG,
    )
    push_seconds = time.monotonic() - begun
    for thread in attackers:
        thread.join()
    stop.set()
    for thread in threads:
        thread.join()
    assert server.process.poll() is None, "the server has gone"
    assert push.returncode == 0, f"the push failed: {push.stderr}"
    landed = (root / name / f"{source.stem}.npy").read_bytes()
    assert landed[-MIB:] == source.read_bytes()[-MIB:], "what landed differs"
    assert not failures, f"health: {failures[:3]}"
    assert not isinstance(outcome.get("said"), Exception), outcome["said"]

    deadline = time.monotonic() + 40
    while server.descriptor_count() > descriptors_before and time.monotonic() < deadline:
        time.sleep(0.1)
    after = server.rss_anon_bytes()
    p99 = sorted(delays)[int(len(delays) * 0.99)] if delays else float("nan")
    print(
        f"{name:20} push {push_seconds:5.2f} s  health p99 {p99 * 1000:6.1f} ms ({len(delays)})  "
        f"memory {rss_before / MIB:5.1f}, at most {max(peak) / MIB:5.1f}, then {after / MIB:5.1f} MiB  "
        f"{outcome['said']}",
        flush=True,
    )
    assert server.descriptor_count() <= descriptors_before, "descriptors stay open"
    assert max(peak) <= MAX_ANON_BYTES, f"memory reached {max(peak) / MIB:.0f} MiB"


def run(attack, address, until):
    try:
        return attack(address, until)
    except Exception as error:  # told by the main thread
        return error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("attack", nargs="*", choices=[[], *ATTACKS], default=[])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        root, source = Path(temp, "root"), Path(temp, "weights.npy")
        write_npy(source, 32 * MIB)
        server = Server(args.binary, root)
        try:
            # What is allocated once is allocated before anything is measured.
            under("warm_up", lambda *_: "no attack", server, args.binary, source, root, 0.1)
            for name in args.attack or ATTACKS:
                under(name, ATTACKS[name], server, args.binary, source, root, args.seconds)
        finally:
            server.process.kill()
            server.process.wait()
    print("the server stood", flush=True)


if __name__ == "__main__":
    sys.exit(main())
