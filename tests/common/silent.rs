//! A server that accepts a push, wants everything, and then says nothing more.

use std::pin::Pin;
use tensorferry::wire::pb::{
    self,
    ferry_server::{Ferry, FerryServer},
    receiver_frame, sender_frame,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Silent {
    /// Becomes true when the sender's side of a call has ended.
    ended: watch::Sender<bool>,
    /// Says after a while why it gives up, and reads nothing from then on.
    gives_up: bool,
}

/// Its address, and what becomes true when the sender of a call has gone.
pub(crate) async fn start() -> (std::net::SocketAddr, watch::Receiver<bool>) {
    start_as(false).await
}

/// As `start`; one that gives up reads nothing from the first wanted entry on, says so
/// a second later, and leaves the call open.
pub(crate) async fn start_as(gives_up: bool) -> (std::net::SocketAddr, watch::Receiver<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (ended, gone) = watch::channel(false);
    let service = FerryServer::new(Silent { ended, gives_up });
    let serving = Server::builder().add_service(service);
    tokio::spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
    (address, gone)
}

fn answer(frame: pb::SenderFrame, gives_up: bool) -> pb::ReceiverFrame {
    let mut answer = pb::ReceiverFrame::default();
    if let Some(sender_frame::Control::Open(_)) = frame.control {
        answer.control = Some(receiver_frame::Control::Accept(pb::Accept {
            protocol_version: 1,
            chunk_len: super::CHUNK as u32,
            codecs: 1,
            durability: pb::Durability::Process.into(),
            window_bytes: if gives_up { 64 << 20 } else { 1 << 20 },
            session_token: vec![1; 16].into(),
            epoch: 1,
            max_lanes: 1,
            durable_bytes: 0,
        }));
    }
    let wanted = frame.entries.iter().map(|entry| pb::Wanted {
        entry: entry.index,
        wanted: vec![pb::CellRange {
            first: 0,
            count: entry.byte_len.div_ceil(super::CHUNK as u64),
        }],
        held: Vec::new(),
        last: true,
    });
    answer.wanted = wanted.collect();
    answer
}

#[tonic::async_trait]
impl Ferry for Silent {
    type PushStream = Answers<pb::ReceiverFrame>;
    type PullStream = Answers<pb::SenderFrame>;

    async fn push(
        &self,
        request: Request<Streaming<pb::SenderFrame>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        let (answers, stream) = mpsc::channel(64);
        let (mut frames, ended) = (request.into_inner(), self.ended.clone());
        let gives_up = self.gives_up;
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames.message().await {
                let frame = answer(frame, gives_up);
                let is_wanted = !frame.wanted.is_empty();
                if frame != pb::ReceiverFrame::default() {
                    let _ = answers.send(Ok(frame)).await;
                }
                if gives_up && is_wanted {
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                    let abort = receiver_frame::Control::Abort(pb::Abort {
                        reason: "STORAGE_IO_ERROR".to_owned(),
                        message: "the disk is gone".to_owned(),
                    });
                    let frame = pb::ReceiverFrame {
                        control: Some(abort),
                        ..Default::default()
                    };
                    let _ = answers.send(Ok(frame)).await;
                    answers.closed().await;
                }
            }
            let _ = ended.send(true);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn pull(
        &self,
        _: Request<Streaming<pb::ReceiverFrame>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list(
        &self,
        _: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn describe(
        &self,
        _: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn discard(
        &self,
        _: Request<pb::DiscardRequest>,
    ) -> Result<Response<pb::DiscardResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}
