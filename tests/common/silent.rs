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
}

/// Its address, and what becomes true when the sender of a call has gone.
pub(crate) async fn start() -> (std::net::SocketAddr, watch::Receiver<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (ended, gone) = watch::channel(false);
    let service = FerryServer::new(Silent { ended });
    let serving = Server::builder().add_service(service);
    tokio::spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
    (address, gone)
}

fn answer(frame: pb::SenderFrame) -> pb::ReceiverFrame {
    let mut answer = pb::ReceiverFrame::default();
    if let Some(sender_frame::Control::Open(_)) = frame.control {
        answer.control = Some(receiver_frame::Control::Accept(pb::Accept {
            protocol_version: 1,
            chunk_len: super::CHUNK as u32,
            codecs: 1,
            durability: pb::Durability::Process.into(),
            window_bytes: 1 << 20,
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
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames.message().await {
                let frame = answer(frame);
                if frame != pb::ReceiverFrame::default() {
                    let _ = answers.send(Ok(frame)).await;
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
