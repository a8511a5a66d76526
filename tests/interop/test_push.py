"""Pushes that go well, in every form that the wire allows."""

from __future__ import annotations

import asyncio

import grpc
import lz4.block
import numpy as np
from peer import (
    CELL,
    HANG_S,
    ServerTest,
    Tensor,
    announcement,
    chunk,
    finish_frame,
    head,
    open_frame,
    pb,
    promise,
    random_tensor,
    services,
    u64,
)

ZERO, LZ4, FILL = 1, 3, 4
NPY = {  # dtype: what plain numpy sees
    "float32": "<f4",
    "float64": "<f8",
    "int8": "|i1",
    "int64": "<i8",
    "bool": "|b1",
    "complex64": "<c8",
    "bfloat16": "<V2",
}


def every_kind() -> list[Tensor]:
    rng = np.random.default_rng(7)
    grid = rng.standard_normal((300, 301))
    bf16 = (grid.astype("<f4").view("<u4") >> 16).astype("<u2")
    return [
        Tensor.of("layer.0.weight", grid.astype("<f4")),
        Tensor.of("layer.0.double", grid),
        Tensor.of("quantized", rng.integers(-128, 128, 1000, dtype="i1")),
        Tensor.of("ids", rng.integers(0, 1 << 62, (10, 20, 3), dtype="<i8")),
        Tensor.of("mask", rng.integers(0, 2, 77).astype(bool)),
        Tensor.of("half", bf16, dtype="bfloat16"),
        Tensor.of("phase", (grid[:2] + 1j * grid[2:4]).astype("<c8")),
        Tensor.of("step", np.array(12345, "<i8")),
        Tensor.of("none", np.zeros((0, 5), "<f4")),
        Tensor.of("columns", grid.astype("<f4")[:200], fortran=True),
    ]


class Pushes(ServerTest):
    def landed_array(self, checkpoint: str, name: str) -> np.ndarray:
        return self.server.landed(checkpoint)[name][0]

    def test_every_dtype_lands_as_it_is(self) -> None:
        tensors = every_kind()
        push = self.push().opened("dtypes", tensors).sent_wanted(tensors)
        done = push.finished(tensors)
        self.assertEqual((done.unchanged, done.entry_count), (False, len(tensors)))
        self.assertEqual(done.total_bytes, sum(len(t.raw) for t in tensors))
        self.assertEqual(done.durability, push.accept.durability)
        self.assert_landed("dtypes", tensors)
        for name, (array, row) in self.server.landed("dtypes").items():
            self.assertEqual(array.dtype, np.dtype(NPY[row["dtype"]]), name)
            self.assertEqual(row["npy_descr"], NPY[row["dtype"]], name)
        np.testing.assert_array_equal(self.landed_array("dtypes", "step"), 12345)
        self.assertTrue(self.landed_array("dtypes", "columns").flags.f_contiguous)

    def test_further_lanes_bring_chunks_and_take_their_own_acks(self) -> None:
        tensors = [random_tensor("w", 4 * CELL + 9, 5)]
        control = self.push().opened("lanes", tensors)
        self.assertGreater(control.accept.max_lanes, 2)
        for lane in (1, 2):
            # A connection of its own, as a client in a hurry would have.
            joined = self.push(self.connect())
            joined.send(pb.SenderFrame(join=pb.Join(session_token=control.accept.session_token, lane=lane)))
            self.assertEqual(joined.until(lambda s: s.accept).accept, control.accept)
            joined.send(chunk(0, lane, tensors[0].cell(lane)))
            joined.settled()
            joined.close()
        for cell in (0, 3, 4):
            control.send(chunk(0, cell, tensors[0].cell(cell)))
        control.settled().finished(tensors)
        self.assert_landed("lanes", tensors)

    def test_every_sent_cell_is_acked_and_becomes_durable(self) -> None:
        tensors = every_kind()
        push = self.push().opened("acks", tensors)
        wanted = {i: {c for c in range(-(-len(t.raw) // CELL))} for i, t in enumerate(tensors)}
        self.assertEqual({i: w for i, w in push.wanted.items()}, wanted, "every cell, and nothing of empty ones")
        push.sent_wanted(tensors).finished(tensors)
        self.assertEqual(push.acked, sum(len(w) for w in wanted.values()))
        self.assertEqual(push.durable, {i: w for i, w in wanted.items() if w})

    def test_durable_comes_by_itself_while_the_session_goes_on(self) -> None:
        tensors = [random_tensor("w", 2 * CELL, 1)]
        push = self.push().opened("group", tensors)
        push.send(chunk(0, 1, tensors[0].cell(1)))
        push.until(lambda s: s.durable[0])
        self.assertEqual((push.durable[0], push.acked), ({1}, 1))
        self.assertEqual(self.status("group").transfer.durable_bytes, CELL)

    def test_many_small_chunks_share_a_message(self) -> None:
        tensors = [random_tensor(f"t{i}", 1 + 3 * i, i) for i in range(400)]
        push = self.push().opened("small", tensors)
        heads = [head(i, 0, t.raw) for i, t in enumerate(tensors)]
        frames = [pb.SenderFrame(chunks=heads[a : a + 200]) for a in (0, 200)]
        for frame, part in zip(frames, (tensors[:200], tensors[200:]), strict=True):
            frame.payload = b"".join(t.raw for t in part)
            push.send(frame)
        push.settled().finished(tensors)
        self.assert_landed("small", tensors)

    def test_a_message_may_be_cut_anywhere_by_cells_of_several_entries(self) -> None:
        tensors = [random_tensor("big", CELL + 5, 1), random_tensor("tiny", 3, 2)]
        push = self.push().opened("shared", tensors)
        parts = [(1, 0), (0, 1)]
        raw = [tensors[e].cell(c) for e, c in parts]
        heads = [head(e, c, r) for (e, c), r in zip(parts, raw, strict=True)]
        push.send(pb.SenderFrame(chunks=heads, payload=b"".join(raw)))
        push.send(chunk(0, 0, tensors[0].cell(0)))
        push.settled().finished(tensors)
        self.assert_landed("shared", tensors)

    def test_accept_holds_the_codecs_of_both(self) -> None:
        offered = {1: 1, 0b11: 0b11, 0b11011: 0b11011, 0xFFFFFFFF: 0b11011}
        for number, (ours, both) in enumerate(offered.items()):
            push = self.push()
            push.send(open_frame(f"codecs{number}", codecs=ours))
            self.assertEqual(push.until(lambda s: s.accept).accept.codecs, both)

    def test_zero_fill_and_lz4_chunks_land_decoded(self) -> None:
        zero = Tensor.of("zero", np.zeros(CELL // 4 + 10, "<f4"))
        fill = Tensor.of("fill", np.full(CELL // 8, np.pi))
        text = Tensor.of("text", np.arange(CELL // 2, dtype="<i8") // 100)
        parts = [bytes(CELL), b"\x09" * CELL, text.cell(0), b"raw"]
        mixed = Tensor.of("mixed", np.frombuffer(b"".join(parts), "u1"))
        tensors = [zero, fill, text, mixed]
        push = self.push().opened("encoded", tensors, codecs=1 | 1 << ZERO | 1 << LZ4 | 1 << FILL)

        def packed(entry: int, cell: int) -> pb.SenderFrame:
            raw = tensors[entry].cell(cell)
            encoded = lz4.block.compress(raw, store_size=False)
            self.assertLess(len(encoded), len(raw))
            return chunk(entry, cell, raw, encoded, LZ4)

        push.send(pb.SenderFrame(chunks=[head(0, c, zero.cell(c), 0, ZERO) for c in (0, 1)]))
        push.send(chunk(1, 0, fill.cell(0), fill.raw[:8], FILL))
        for cell in sorted(push.wanted[2]):
            push.send(packed(2, cell))
        both = pb.SenderFrame(chunks=[head(3, 0, mixed.cell(0), 0, ZERO), head(3, 1, mixed.cell(1), 1, FILL)])
        both.payload = b"\x09"
        push.send(both)
        push.send(packed(3, 2))
        push.send(chunk(3, 3, mixed.cell(3)))
        push.settled().finished(tensors)
        self.assertEqual(push.rejects, [])
        self.assert_landed("encoded", tensors)

    def test_entries_may_be_announced_while_chunks_flow(self) -> None:
        tensors = [random_tensor(f"t{i}", CELL + i, i) for i in range(5)]
        push = self.push()
        push.send(open_frame("open-manifest"))
        for i, tensor in enumerate(tensors):
            push.announced([tensor], start=i)
            push.send(chunk(i, 0, tensor.cell(0)))
        frame = chunk(4, 1, tensors[4].cell(1))
        tensors.append(random_tensor("late", 10, 9))
        frame.entries.append(tensors[5].entry(5))
        push.send(frame)
        push.until(lambda s: 5 in s.answered)
        for i in (1, 2, 3):  # entry 0 has one cell only
            push.send(chunk(i, 1, tensors[i].cell(1)))
        push.send(chunk(5, 0, tensors[5].raw))
        push.settled().finished(tensors)
        self.assert_landed("open-manifest", tensors)

    def test_nothing_waits_for_accept_but_chunks(self) -> None:
        tensors = [random_tensor("w", 10, 1)]
        push = self.push()
        push.send(open_frame("eager", tensors=tensors))
        push.send(announcement(tensors))
        push.until(lambda s: s.answered)
        push.send(chunk(0, 0, tensors[0].raw))
        push.settled()
        push.send(finish_frame(tensors))
        push.close()  # after Finish the client may close its side
        self.assertEqual(push.ending(), ("OK", None))
        self.assert_landed("eager", tensors)

    def test_a_checkpoint_without_entries_is_published(self) -> None:
        push = self.push()
        push.send(open_frame("empty", tensors=[]))
        done = push.until(lambda s: s.accept).finished([])
        self.assertEqual((done.entry_count, done.total_bytes), (0, 0))
        self.assertEqual(self.server.manifest("empty")["tensors"], [])

    def test_a_blob_is_kept_byte_for_byte(self) -> None:
        text = b'{"hidden_size": 64}'
        push = self.push()
        push.send(open_frame("blob"))
        entry = pb.Entry(index=0, name="config.json", kind=pb.ENTRY_KIND_BLOB, byte_len=len(text))
        push.send(pb.SenderFrame(entries=[entry]))
        push.until(lambda s: s.answered)
        push.send(chunk(0, 0, text))
        push.settled()
        blob = Blob("config.json", text)
        push.finished([blob])
        row = self.server.manifest("blob")["files"][0]
        self.assertEqual((self.server.root / "blob" / row["file"]).read_bytes(), text)

    def test_a_damaged_chunk_is_rejected_and_may_be_sent_again(self) -> None:
        tensors = [random_tensor("w", 100, 1)]
        push = self.push().opened("damaged", tensors)
        frame = chunk(0, 0, tensors[0].raw)
        good = frame.chunks[0].crc32c
        frame.payload = bytes(100)
        push.send(frame)
        push.settled()
        self.assertEqual([(r.entry, r.offset, r.expected_crc32c) for r in push.rejects], [(0, 0, good)])
        push.send(chunk(0, 0, tensors[0].raw))
        push.settled().finished(tensors)
        self.assert_landed("damaged", tensors)

    def test_the_same_push_again_is_answered_with_unchanged(self) -> None:
        tensors = [random_tensor("w", 100, 1)]
        mark = {"fingerprint": bytes(range(16))}
        first = self.push().opened("again", tensors, **mark).sent_wanted(tensors)
        first.send(pb.SenderFrame(finish=pb.Finish(**mark, **promise(tensors))))
        self.assertEqual(first.ending(), ("OK", None))
        again = self.push()
        again.send(open_frame("again", tensors=tensors, **mark))
        self.assertEqual(again.ending(), ("OK", None))
        self.assertTrue(again.done.unchanged)
        self.assertEqual(again.done.manifest_blake3, first.done.manifest_blake3)

    def test_several_pushes_share_a_connection(self) -> None:
        pushes = []
        for number in range(4):
            tensors = [random_tensor("w", 2 * CELL, number)]
            pushes.append((self.push().opened(f"shared-{number}", tensors, transfer=number), tensors))
        for push, tensors in pushes:
            push.send(chunk(0, 0, tensors[0].cell(0)))
        for push, tensors in pushes:
            push.send(chunk(0, 1, tensors[0].cell(1)))
        for number, (push, tensors) in enumerate(pushes):
            push.settled().finished(tensors)
            self.assert_landed(f"shared-{number}", tensors)

    def test_the_last_cell_ends_with_its_entry(self) -> None:
        lengths = (0, 1, CELL - 1, CELL, CELL + 1, 3 * CELL)
        tensors = [random_tensor(f"n{n}", n, n) for n in lengths]
        push = self.push().opened("lengths", tensors).sent_wanted(tensors)
        push.finished(tensors)
        self.assert_landed("lengths", tensors)


class AnotherLibrary(ServerTest):
    def test_an_asyncio_client_pushes_too(self) -> None:
        tensors = [random_tensor("w", CELL + 1, 1)]

        async def push() -> list[pb.ReceiverFrame]:
            async with grpc.aio.insecure_channel(self.server.address) as channel:
                call = services.FerryStub(channel).Push(timeout=HANG_S)
                await call.write(open_frame("asyncio", tensors=tensors))
                await call.write(announcement(tensors))
                frames = [await call.read()]
                while not any(w.last for w in frames[-1].wanted):
                    frames.append(await call.read())
                for cell in (0, 1):
                    await call.write(chunk(0, cell, tensors[0].cell(cell)))
                while frames[-1].ack.settled_count < 2:
                    frames.append(await call.read())
                await call.write(finish_frame(tensors))
                await call.done_writing()
                while not frames[-1].HasField("done"):
                    frames.append(await call.read())
                self.assertEqual(await call.code(), grpc.StatusCode.OK)
                return frames

        self.assertEqual(asyncio.run(push())[-1].done.entry_count, 1)
        self.assert_landed("asyncio", tensors)


class Blob(Tensor):
    """A side file in the digest: kind 2, no dtype, no shape."""

    def canonical(self) -> bytes:
        name = self.name.encode()
        return u64(len(name)) + name + u64(0) + bytes([2, 1, 0]) + u64(0, len(self.raw))
