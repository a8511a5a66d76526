//! Chunks that lie outside their cell: refused by name, and nothing is written.

use crate::{
    frames::{CHUNK, Load, frame_chunk, frame_open, head, tensor},
    oracle::{End, end_of},
    scenario::{Report, Setting},
    server::Serve,
};
use std::time::Duration;
use tensorferry::wire::pb::{self, ferry_client::FerryClient};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;

/// Every wrong place that a head can name.
pub(crate) fn ranges(setting: &Setting) -> Report {
    let mut report = Report::new("chunks out of range");
    let folder = setting.folder("ranges");
    let server = match Serve::new(&setting.binary).start(&folder.join("root")) {
        Ok(server) => server,
        Err(why) => {
            report.check("ranges", Err(why));
            return report;
        }
    };
    let load = Load::of(vec![tensor("t", 3 * CHUNK + 100)]);
    let chunk = CHUNK as u64;
    let bytes = vec![7; 2 * CHUNK];
    // Offset and length of each, and what is wrong with it.
    let cases = [
        ("beyond the end", 4 * chunk, CHUNK),
        ("far beyond the end", u64::MAX / chunk * chunk, CHUNK),
        ("off the grid", 1, CHUNK),
        ("off the grid in the last cell", 3 * chunk + 1, 99),
        ("longer than its cell", 0, CHUNK + 1),
        ("shorter than its cell", chunk, CHUNK - 1),
        ("the last cell as a whole one", 3 * chunk, CHUNK),
    ];
    for (what, offset, len) in cases {
        let mut wrong = head(0, 0, &bytes[..len]);
        wrong.offset = offset;
        let frame = frame_chunk(wrong, &bytes[..len]);
        let end = setting
            .runtime
            .block_on(one(&server.address.to_string(), &load, frame));
        report.tally.points += 1;
        let wanted = End::Refused(tonic::Code::OutOfRange, "BAD_RANGE".to_owned());
        if end != wanted {
            report.check("ranges", Err(format!("a chunk {what}: {end:?}")));
        }
    }
    let stopped = server.stop();
    report.check("ranges", stopped);
    report
}

/// A session that sends this frame when it may send chunks.
async fn one(address: &str, load: &Load, frame: pb::SenderFrame) -> End {
    let Ok(mut ferry) = FerryClient::connect(format!("http://{address}")).await else {
        return End::Gone("no connection".to_owned());
    };
    let (out, frames_out) = mpsc::channel(16);
    let mut frames = match ferry.push(ReceiverStream::new(frames_out)).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return end_of(&status),
    };
    let open = pb::SenderOpen {
        chunk_len: CHUNK as u32,
        restart: true,
        ..load.open("ranges", [3; 16])
    };
    let _ = out.send(frame_open(open)).await;
    let _ = out.send(load.announcement()).await;
    let mut frame = Some(frame);
    loop {
        match timeout(Duration::from_secs(5), frames.message()).await {
            Err(_) => return End::Gone("it was taken without a word".to_owned()),
            Ok(Err(status)) => return end_of(&status),
            Ok(Ok(None)) => return End::Done,
            Ok(Ok(Some(answer))) => {
                if answer.wanted.iter().any(|w| w.last)
                    && let Some(frame) = frame.take()
                {
                    let _ = out.send(frame).await;
                }
                if answer.ack.is_some_and(|a| a.settled_count > 0) {
                    return End::Gone("it was acked".to_owned());
                }
            }
        }
    }
}
