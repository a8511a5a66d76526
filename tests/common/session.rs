//! One call as the peer sees it: frames out, and everything heard so far.

use super::{Ending, HANG, Load, code_and_reason, frame_finish};
use std::collections::{BTreeMap, BTreeSet};
use tensorferry::wire::pb::{self, ferry_client::FerryClient, receiver_frame::Control};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

/// Cells by entry.
pub(crate) type Cells = BTreeMap<u32, BTreeSet<u64>>;

/// A push call under way.
pub(crate) struct Session {
    out: mpsc::Sender<pb::SenderFrame>,
    frames: Streaming<pb::ReceiverFrame>,
    pub(crate) accept: Option<pb::Accept>,
    pub(crate) done: Option<pb::Done>,
    pub(crate) acked: u64,
    pub(crate) wanted: Cells,
    pub(crate) held: Cells,
    pub(crate) durable: Cells,
    pub(crate) kept: Cells,
    pub(crate) answered: BTreeSet<u32>,
    pub(crate) rejects: Vec<pb::Reject>,
    /// Chunks sent.
    pub(crate) sent: u64,
}

impl Session {
    pub(crate) async fn new(mut ferry: FerryClient<Channel>) -> Self {
        let (out, frames_out) = mpsc::channel(1024);
        let frames = ferry
            .push(ReceiverStream::new(frames_out))
            .await
            .expect("the call begins")
            .into_inner();
        Session {
            out,
            frames,
            accept: None,
            done: None,
            acked: 0,
            wanted: Cells::new(),
            held: Cells::new(),
            durable: Cells::new(),
            kept: Cells::new(),
            answered: BTreeSet::new(),
            rejects: Vec::new(),
            sent: 0,
        }
    }

    /// Sends a frame. That the call is over already shows when it is read.
    pub(crate) async fn send(&mut self, frame: pb::SenderFrame) {
        self.sent += frame.chunks.len() as u64;
        let _ = self.out.send(frame).await;
    }

    /// Announces and waits for every answer.
    pub(crate) async fn announce(&mut self, load: &Load) {
        self.send(load.announcement()).await;
        self.until(|s| s.answered.len() == load.parts.len()).await;
    }

    /// Sends every cell that is wanted and waits until all are settled.
    pub(crate) async fn send_wanted(&mut self, load: &Load) {
        for (entry, cells) in self.wanted.clone() {
            for cell in cells {
                self.send(load.chunk(entry, cell)).await;
            }
        }
        self.settle().await;
    }

    /// Waits until everything sent is acked.
    pub(crate) async fn settle(&mut self) {
        self.until(|s| s.acked == s.sent).await;
    }

    /// Finish, Done and the end of the call.
    pub(crate) async fn finish(&mut self, load: &Load) -> pb::Done {
        self.send(frame_finish(load.finish())).await;
        assert_eq!(self.end().await, Ok(()));
        self.done.clone().expect("done comes before OK")
    }

    /// Reads until something was heard; the call must not end before.
    pub(crate) async fn until(&mut self, heard: impl Fn(&Session) -> bool) {
        while !heard(self) {
            let frame = timeout(HANG, self.frames.message())
                .await
                .expect("the server answers");
            let frame = frame
                .expect("the call goes on")
                .expect("the call does not end yet");
            self.hear(frame);
        }
    }

    /// Reads to the end of the call, its own side still open.
    pub(crate) async fn end(&mut self) -> Ending {
        loop {
            match timeout(HANG, self.frames.message())
                .await
                .expect("the call ends")
            {
                Ok(Some(frame)) => self.hear(frame),
                Ok(None) => return Ok(()),
                Err(status) => return Err(code_and_reason(&status)),
            }
        }
    }

    /// Sends a frame that must end the call.
    pub(crate) async fn refused(&mut self, frame: pb::SenderFrame) -> Ending {
        self.send(frame).await;
        self.end().await
    }

    /// Half-closes and reads to the end.
    pub(crate) async fn close(mut self) -> Ending {
        drop(std::mem::replace(&mut self.out, mpsc::channel(1).0));
        self.end().await
    }

    fn hear(&mut self, frame: pb::ReceiverFrame) {
        match frame.control {
            Some(Control::Accept(accept)) => self.accept = Some(accept),
            Some(Control::Done(done)) => self.done = Some(done),
            other => assert!(other.is_none(), "{other:?}"),
        }
        for wanted in frame.wanted {
            add(&mut self.wanted, wanted.entry, &wanted.wanted);
            add(&mut self.held, wanted.entry, &wanted.held);
            if wanted.last {
                self.answered.insert(wanted.entry);
            }
        }
        self.rejects.extend(frame.rejects);
        if let Some(ack) = frame.ack {
            assert!(ack.settled_count >= self.acked && ack.settled_count <= self.sent);
            self.acked = ack.settled_count;
        }
        for durable in frame.durable {
            add(&mut self.durable, durable.entry, &durable.ranges);
        }
        for keep in frame.keeps {
            add(&mut self.kept, keep.entry, &keep.ranges);
        }
    }
}

fn add(cells: &mut Cells, entry: u32, ranges: &[pb::CellRange]) {
    let set = cells.entry(entry).or_default();
    for range in ranges {
        set.extend(range.first..range.first + range.count);
    }
}
