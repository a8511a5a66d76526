//! ReceiverFrames, and a sender that hears them.

use crate::{
    format::Dtype,
    plan::{CHUNK_LEN_MIN, EntryHeader, Grid},
    protocol::{Abort, ReceiverControl, ReceiverFrame, SendAction, Sender, SenderConfig},
    wire::{decode_receiver_frame, encode_message, encode_receiver_frame, pb},
};
use prost::Message;

/// What a sender may ask for after one frame before the rest does not matter.
const MAX_ACTIONS: usize = 200;

/// Lengths of the entries that the sender has.
const ENTRY_LENS: [u64; 4] = [5 << 20, 0, 1, 256 << 10];

/// Any number of messages, each with two bytes of length in front.
///
/// # Panics
/// A property is broken.
pub fn receiver_frames(data: &[u8]) {
    let mut input = super::input::Input::new(data);
    let mut sender = Some(announced());
    while !input.is_empty() {
        let len = usize::from(input.u16());
        let Ok(message) = pb::ReceiverFrame::decode(input.bytes(len)) else {
            continue;
        };
        let Ok(frame) = decode_receiver_frame(message) else {
            continue;
        };
        check_decoded(&frame);
        // A sender stops listening at the first error.
        sender = sender.and_then(|sender| hear(sender, &frame));
    }
}

fn check_decoded(frame: &ReceiverFrame) {
    if let Some(ReceiverControl::Abort(Abort { message, .. })) = &frame.control {
        assert!(message.len() <= 1024);
    }
    let message = encode_receiver_frame(frame);
    let bytes = encode_message(&message);
    assert_eq!(
        pb::ReceiverFrame::decode(&bytes[5..]).as_ref(),
        Ok(&message)
    );
    let again = decode_receiver_frame(message).expect("what was written is in order");
    assert_eq!(&again, frame);
}

fn grid() -> Grid {
    Grid::new(CHUNK_LEN_MIN).expect("the smallest grid")
}

/// A sender that has announced a few entries.
fn announced() -> Sender {
    let config = SenderConfig {
        grid: grid(),
        window_bytes: 1 << 20,
    };
    let mut sender = Sender::new(config, None);
    for (i, len) in ENTRY_LENS.into_iter().enumerate() {
        let header = EntryHeader::tensor(format!("t{i}"), Dtype::U8, &[len]);
        sender.add(header.expect("a header in order"), false);
    }
    sender.seal();
    assert_eq!(sender.poll(), Some(SendAction::Announce(0..4)));
    sender
}

/// The sender, if it found nothing wrong with the frame, after what it does next.
fn hear(mut sender: Sender, frame: &ReceiverFrame) -> Option<Sender> {
    sender.handle(0, frame).ok()?;
    for _ in 0..MAX_ACTIONS {
        match sender.poll() {
            Some(SendAction::Send(cell)) => {
                assert!(sender.span(cell).is_some(), "it sends what is not there");
                sender.sent(0, cell);
            }
            Some(SendAction::Recheck { cell, .. }) => sender.rechecked(cell, true).unwrap(),
            Some(_) => {}
            None => break,
        }
    }
    let progress = sender.progress();
    for part in [
        progress.durable_bytes,
        progress.settled_bytes,
        progress.resumed_bytes + progress.acked_bytes,
    ] {
        assert!(part <= progress.total_bytes, "{progress:?}");
    }
    let durable_bytes: u64 = ENTRY_LENS
        .into_iter()
        .zip(sender.durable_cells())
        .flat_map(|(len, cells)| cells.iter().map(move |r| (len, r)))
        .map(|(len, r)| grid().span_bytes(len, r.start, r.end - r.start))
        .sum();
    assert_eq!(progress.durable_bytes, durable_bytes);
    Some(sender)
}
