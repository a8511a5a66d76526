"""The unary calls, health and reflection."""

from __future__ import annotations

import functools
import json
import queue
import signal
import tempfile
import unittest
from pathlib import Path

import grpc
from blake3 import blake3
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from peer import CELL, HANG_S, SERVICE, Push, Server, ServerTest, chunk, pb, random_tensor

NOT_FOUND = ("NOT_FOUND", "NOT_FOUND")
BAD_NAME = ("INVALID_ARGUMENT", "BAD_NAME")


class Questions(ServerTest):
    def unfinished(self, name: str) -> None:
        """A transfer of two cells, one of them durable, whose session is over."""
        tensors = [random_tensor("w", 2 * CELL, 1)]
        push = self.push().opened(name, tensors)
        push.send(chunk(0, 0, tensors[0].cell(0)))
        push.settled().close()
        self.assertEqual(push.ending(), ("CANCELLED", "INTERRUPTED"))

    def published(self, name: str) -> pb.Done:
        tensors = [random_tensor("w", 3, 2)]
        return self.push().opened(name, tensors).sent_wanted(tensors).finished(tensors)

    def names(self, prefix: str, **more) -> list[str]:
        request = pb.ListRequest(prefix=prefix, **more)
        return [row.name for row in self.ferry.List(request, timeout=HANG_S).checkpoints]

    def test_list_of_nothing_is_empty(self) -> None:
        self.assertEqual(self.names("list-nothing"), [])

    def test_list_names_published_and_unfinished_with_their_bytes(self) -> None:
        self.unfinished("list/a")
        self.published("list/b")
        rows = self.ferry.List(pb.ListRequest(prefix="list/"), timeout=HANG_S).checkpoints
        found = [(r.name, r.published, r.entry_count, r.total_bytes, r.durable_bytes, r.active) for r in rows]
        self.assertEqual(found, [("list/a", False, 1, 2 * CELL, CELL, False), ("list/b", True, 1, 3, 3, False)])

    def test_list_pages_by_its_token(self) -> None:
        for name in ("page/a", "page/b", "page/c"):
            self.published(name)
        seen, token = [], ""
        for _ in range(2):
            request = pb.ListRequest(prefix="page/", page_size=2, page_token=token)
            page = self.ferry.List(request, timeout=HANG_S)
            seen.append([row.name for row in page.checkpoints])
            token = page.next_page_token
        self.assertEqual((seen, token), ([["page/a", "page/b"], ["page/c"]], ""))

    def test_status_and_describe_of_an_unknown_name_are_not_found(self) -> None:
        self.assert_refused(NOT_FOUND, lambda: self.status("nobody"))
        self.assert_refused(NOT_FOUND, lambda: self.ferry.Describe(pb.DescribeRequest(checkpoint="nobody")))

    def test_bad_names_are_said_to_be_bad(self) -> None:
        questions = [
            (self.ferry.Status, pb.StatusRequest),
            (self.ferry.Describe, pb.DescribeRequest),
            (self.ferry.Discard, pb.DiscardRequest),
        ]
        for name in ("", "/", "a//b", "../a", "a\nb", "ä", "a" * 256, "/".join("a" * 17)):
            for ask, request in questions:
                with self.subTest(name=name, request=request.DESCRIPTOR.name):
                    self.assert_refused(BAD_NAME, functools.partial(ask, request(checkpoint=name), timeout=HANG_S))

    def test_status_of_an_unfinished_transfer_counts_what_is_durable(self) -> None:
        self.unfinished("status-part")
        status = self.status("status-part")
        self.assertFalse(status.published)
        self.assertEqual((status.transfer.durable_bytes, status.transfer.total_bytes), (CELL, 2 * CELL))
        self.assertFalse(status.transfer.active)

    def test_status_sees_a_running_session(self) -> None:
        self.push().opened("status-live", [random_tensor("w", 1, 3)])
        self.assertTrue(self.status("status-live").transfer.active)

    def test_describe_of_an_unfinished_transfer_is_not_found(self) -> None:
        self.unfinished("describe-part")
        self.assert_refused(NOT_FOUND, lambda: self.ferry.Describe(pb.DescribeRequest(checkpoint="describe-part")))

    def test_describe_gives_the_manifest_that_done_has_the_digest_of(self) -> None:
        done = self.published("described")
        manifest = self.ferry.Describe(pb.DescribeRequest(checkpoint="described"), timeout=HANG_S).manifest_json
        self.assertEqual(json.loads(manifest), self.server.manifest("described"))
        self.assertEqual(blake3(manifest).digest(), done.manifest_blake3)
        status = self.status("described")
        self.assertTrue(status.published and not status.HasField("transfer"))

    def test_discard_throws_an_unfinished_transfer_away(self) -> None:
        self.unfinished("discarded")
        answer = self.ferry.Discard(pb.DiscardRequest(checkpoint="discarded"), timeout=HANG_S)
        self.assertEqual((answer.existed, answer.discarded_bytes), (True, CELL))
        self.assert_refused(NOT_FOUND, lambda: self.status("discarded"))

    def test_discard_of_nothing_is_no_error_and_spares_what_is_published(self) -> None:
        self.assertFalse(self.ferry.Discard(pb.DiscardRequest(checkpoint="nobody")).existed)
        self.published("kept")
        self.assertFalse(self.ferry.Discard(pb.DiscardRequest(checkpoint="kept")).existed)
        self.assertTrue(self.status("kept").published)

    def test_discard_is_locked_out_by_a_running_session(self) -> None:
        self.push().opened("running", [random_tensor("w", 1, 4)])
        locked = ("FAILED_PRECONDITION", "LOCKED")
        self.assert_refused(locked, lambda: self.ferry.Discard(pb.DiscardRequest(checkpoint="running")))

    def test_a_huge_unary_request_is_refused_and_the_channel_stays_usable(self) -> None:
        huge = pb.StatusRequest(checkpoint="a" * (5 << 20))
        self.assert_refused(("OUT_OF_RANGE", None), lambda: self.ferry.Status(huge, timeout=HANG_S))
        self.assert_refused(NOT_FOUND, lambda: self.status("nobody"))

    def test_a_compressed_unary_request_is_unimplemented(self) -> None:
        def ask() -> None:
            self.ferry.List(pb.ListRequest(prefix="x" * 1000), compression=grpc.Compression.Gzip, timeout=HANG_S)

        self.assert_refused(("UNIMPLEMENTED", None), ask)

    def test_an_unknown_method_is_unimplemented(self) -> None:
        method = self.channel.unary_unary(f"/{SERVICE}/Nothing", lambda m: m, lambda m: m)
        self.assert_refused(("UNIMPLEMENTED", None), lambda: method(b"", timeout=HANG_S))

    def test_a_request_that_is_no_protobuf_is_refused(self) -> None:
        method = self.channel.unary_unary(f"/{SERVICE}/Status", lambda m: m, pb.StatusResponse.FromString)
        self.assert_refused(("INTERNAL", None), lambda: method(b"\x0a\x05ab", timeout=HANG_S))

    def test_headers_over_the_limit_are_refused_and_the_channel_stays_usable(self) -> None:
        metadata = (("note", "x" * (17 << 10)),)
        self.assert_refused(("UNKNOWN", None), lambda: self.ferry.List(pb.ListRequest(), metadata=metadata))
        self.assertEqual(self.names("list-nothing"), [])

    def pull_open(self, name: str, version: int = 1) -> pb.PullOpen:
        return pb.PullOpen(protocol_version=version, checkpoint=name, transfer_id=b"t" * 16, codecs=1, lane_token=b"l" * 16)

    def test_a_pull_opens_with_what_was_asked_for(self) -> None:
        self.published("pulled")
        told: queue.Queue[pb.ReceiverFrame | None] = queue.Queue()
        told.put(pb.ReceiverFrame(open=self.pull_open("pulled")))
        call = self.ferry.Pull(iter(told.get, None), timeout=HANG_S)
        opened = next(call).open
        self.assertEqual((opened.checkpoint, opened.transfer_id), ("pulled", b"t" * 16))
        self.assertTrue(opened.manifest_complete and opened.fingerprint)
        call.cancel()
        told.put(None)

    def test_a_pull_of_what_is_not_there_is_not_found(self) -> None:
        for opened, refusal in (
            (self.pull_open("nobody"), NOT_FOUND),
            (self.pull_open("nobody", version=2), ("FAILED_PRECONDITION", "VERSION")),
        ):
            frames = iter([pb.ReceiverFrame(open=opened)])
            self.assert_refused(refusal, lambda frames=frames: next(self.ferry.Pull(frames, timeout=HANG_S)))

    def test_a_lane_of_no_pull_is_not_found(self) -> None:
        frames = iter([pb.ReceiverFrame(join=pb.Join(session_token=b"x" * 16))])
        self.assert_refused(NOT_FOUND, lambda: next(self.ferry.Pull(frames, timeout=HANG_S)))


class Health(ServerTest):
    def setUp(self) -> None:
        super().setUp()
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def check(self, service: str) -> int:
        return self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=HANG_S).status

    def test_the_server_and_its_service_are_serving(self) -> None:
        for service in ("", SERVICE):
            self.assertEqual(self.check(service), health_pb2.HealthCheckResponse.SERVING, service)

    def test_an_unknown_service_is_not_found(self) -> None:
        self.assert_refused(("NOT_FOUND", None), lambda: self.check("nothing.v1.Nothing"))


class Stopping(unittest.TestCase):
    """A server of its own, for it is stopped."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.server = Server(Path(folder.name))
        self.addCleanup(self.server.stop)
        self.channel = grpc.insecure_channel(self.server.address)
        self.addCleanup(self.channel.close)

    def test_watchers_learn_that_it_stops_and_a_push_is_told_to_come_again(self) -> None:
        health = health_pb2_grpc.HealthStub(self.channel)
        names = ("", SERVICE)
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=n), timeout=HANG_S) for n in names]
        for watch in watches:
            self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
        tensors = [random_tensor("w", 2 * CELL, 5)]
        push = Push(self.channel).opened("draining", tensors)
        self.addCleanup(push.close)
        push.send(chunk(0, 0, tensors[0].cell(0)))
        push.settled()
        self.server.process.send_signal(signal.SIGTERM)
        for watch in watches:
            self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.NOT_SERVING)
            watch.cancel()
        self.assertEqual(push.ending(), ("UNAVAILABLE", "DRAINING"))
        self.assertEqual(push.durable, {0: {0}}, "what is written is committed, and said so, before the end")
        self.assertEqual(self.server.process.wait(timeout=HANG_S), 0)


class Reflection(ServerTest):
    def test_it_lists_every_service(self) -> None:
        listed = ProtoReflectionDescriptorDatabase(self.channel).get_services()
        versions = [v for v in ("v1", "v1alpha") if f"grpc.reflection.{v}.ServerReflection" in listed]
        self.assertLessEqual({SERVICE, "grpc.health.v1.Health"}, set(listed))
        self.assertTrue(versions, listed)

    def test_v1_and_v1alpha_tell_the_same_schema(self) -> None:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        found = []
        for version in ("v1", "v1alpha"):
            method = self.channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )
            answer = next(method(iter([request]), timeout=HANG_S))
            found.append(list(answer.file_descriptor_response.file_descriptor_proto))
        self.assertTrue(found[0])
        self.assertEqual(found[0], found[1])

    def test_a_message_is_built_from_the_fetched_schema_and_understood(self) -> None:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        service = pool.FindServiceByName(SERVICE)
        self.assertEqual({m.name for m in service.methods}, {"Push", "Pull", "List", "Describe", "Status", "Discard"})
        method = service.FindMethodByName("List")
        request = GetMessageClass(method.input_type)(prefix="reflected", page_size=3)
        answer_class = GetMessageClass(method.output_type)
        call = self.channel.unary_unary(f"/{SERVICE}/List", lambda m: m.SerializeToString(), answer_class.FromString)
        self.assertEqual(len(call(request, timeout=HANG_S).checkpoints), 0)

    def test_the_fetched_schema_is_the_one_in_the_repository(self) -> None:
        def fields(file) -> dict:
            return {
                (message.name, f.name): (f.number, f.type, f.is_repeated, f.message_type and f.message_type.full_name)
                for message in file.message_types_by_name.values()
                for f in message.fields
            }

        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        fetched = fields(pool.FindFileContainingSymbol(SERVICE))
        self.assertIn(("SenderFrame", "payload"), fetched)
        self.assertEqual(fetched, fields(pb.DESCRIPTOR))
