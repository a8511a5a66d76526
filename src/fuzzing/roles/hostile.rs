//! What no honest peer says.

use super::{
    super::input::Input,
    CELL_LEN, U8,
    session::{Fate, Frame, Session, announcement},
};
use crate::{
    format::codec::Codec,
    plan::{CellId, EntryHeader, RangeSet, SourceState},
    protocol::{Batch, ChunkHead, Compare, Durable, Finish, Keep, ReceiverFrame, Reject, Wanted},
};

/// A number that is often small and sometimes at the edge.
fn number(input: &mut Input) -> u64 {
    match input.below(16) {
        0 => u64::MAX - u64::from(input.byte()),
        1 => input.u64(),
        2 => 1 << input.below(64),
        _ => u64::from(input.byte() % 8),
    }
}

fn entry(input: &mut Input) -> u32 {
    u32::try_from(number(input)).unwrap_or(u32::MAX)
}

fn ranges(input: &mut Input) -> RangeSet {
    let mut set = RangeSet::new();
    for _ in 0..input.below(4) {
        let first = number(input);
        set.insert(first..first.saturating_add(number(input)));
    }
    set
}

/// A chunk that was not asked for, at any place and of any length.
pub(super) fn chunk(session: &mut Session, lane: u32, input: &mut Input) -> Fate {
    // Half of them fit their cell and are wrong only in coming at all.
    let cell = CellId {
        entry: u32::from(input.byte() % 4),
        cell: u64::from(input.byte() % 5),
    };
    let span = session.sender.span(cell).filter(|_| input.chance(2));
    let head = span.map(|(offset, raw_len)| ChunkHead {
        entry: cell.entry,
        offset,
        raw_len,
        encoded_len: raw_len,
        codec: Codec::None.id(),
        crc32c: u32::from(input.byte()),
    });
    let head = head.unwrap_or_else(|| ChunkHead {
        entry: entry(input),
        offset: match input.chance(2) {
            true => number(input),
            false => number(input).wrapping_mul(u64::from(CELL_LEN)),
        },
        raw_len: match input.chance(3) {
            true => number(input) as u32,
            false => CELL_LEN,
        },
        encoded_len: match input.chance(3) {
            true => number(input) as u32,
            false => CELL_LEN,
        },
        codec: u32::from(input.byte() % 6),
        crc32c: u32::from(input.byte()),
    });
    let sum = head.crc32c ^ u32::from(input.chance(4));
    let batch = Batch {
        chunks: vec![head],
        ..Batch::default()
    };
    lie_to_receiver(session, lane, Frame::Batch(batch, vec![sum]))
}

/// Sources and entries out of order, twice, or of absurd size.
pub(super) fn announce(session: &mut Session, input: &mut Input) -> Fate {
    let source = |input: &mut Input| SourceState {
        key: [input.byte() % 4; 16],
        fingerprint: [input.byte() % 4; 32],
        settled: input.chance(2),
    };
    let header = |input: &mut Input| {
        let len = number(input);
        match input.below(3) {
            0 => EntryHeader::blob(format!("b{}", input.below(6)), len),
            1 => EntryHeader::tensor(["w", "W", "WW"][input.below(3)], U8, &[len]),
            _ => EntryHeader::tensor(format!("t{}", input.below(6)), U8, &[len]),
        }
    };
    let entry_count = input.below(3);
    let batch = Batch {
        first_source: entry(input),
        sources: (0..input.below(3)).map(|_| source(input)).collect(),
        first_entry: entry(input),
        entries: (0..entry_count)
            .filter_map(|_| Some((header(input).ok()?, input.byte() % 4)))
            .map(|(header, source)| announcement(header, vec![u32::from(source)]))
            .collect(),
        chunks: Vec::new(),
    };
    lie_to_receiver(session, 0, Frame::Batch(batch, Vec::new()))
}

pub(super) fn compare_or_finish(session: &mut Session, input: &mut Input) -> Fate {
    let frame = match input.chance(4) {
        true => Frame::Finish(Finish {
            entry_count: number(input),
            total_bytes: number(input),
            entries_digest: [0; 16],
            fingerprint: None,
        }),
        false => Frame::Compare(Compare {
            entry: entry(input),
            first_cell: number(input),
            hashes: vec![[input.byte() % 4; 32]; 1 + input.below(4)],
        }),
    };
    lie_to_receiver(session, 0, frame)
}

fn lie_to_receiver(session: &mut Session, lane: u32, frame: Frame) -> Fate {
    session.is_hostile = true;
    session.to_receiver[lane as usize].push_back(frame);
    session.reach_receiver(lane)
}

/// An answer that the receiver did not give.
pub(super) fn answer(session: &mut Session, input: &mut Input) -> Fate {
    let mut frame = ReceiverFrame::default();
    for _ in 0..1 + input.below(2) {
        match input.below(5) {
            0 => frame.wanted.push(Wanted {
                entry: entry(input),
                wanted: ranges(input),
                held: ranges(input),
                last: input.chance(2),
            }),
            1 => frame.rejects.push(Reject {
                entry: entry(input),
                offset: number(input).wrapping_mul(u64::from(CELL_LEN)),
                expected_crc32c: 0,
                found_crc32c: 1,
            }),
            2 => frame.ack = Some(number(input)),
            3 => frame.durable.push(Durable {
                entry: entry(input),
                ranges: ranges(input),
            }),
            _ => frame.keeps.push(Keep {
                entry: entry(input),
                ranges: ranges(input),
            }),
        }
    }
    session.is_hostile = true;
    session.to_sender.push_front((0, frame));
    session.reach_sender()
}
