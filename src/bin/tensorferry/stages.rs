//! What limited a transfer, in one line and in figures.

use serde::Serialize;
use std::collections::BTreeMap;
use tensorferry::{PipelineStage, Side, StageShare, Stages, format::codec::Codec};

/// One stage in the done event.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct StageFigures {
    busy_s: f64,
    blocked_s: f64,
}

/// `limited by: writing on the receiver (busy 92 %), then reading (61 %)`; nothing when
/// nothing travelled.
pub(crate) fn line(stages: &Stages) -> Option<String> {
    let ranking = stages.ranking();
    let mut rows = ranking.iter();
    let mut text = if stages.is_rate_limited() {
        let waited = stages.rate_wait.as_secs_f64() / stages.elapsed.as_secs_f64().max(1e-9);
        format!("limited by: --bwlimit (waited {:.0} %)", waited * 100.0)
    } else {
        let first = rows.next()?;
        format!("limited by: {} (busy {} %)", words(first), percent(first))
    };
    if let Some(second) = rows.next().filter(|row| percent(row) > 0) {
        text += &format!(", then {} ({} %)", words(second), percent(second));
    }
    Some(text)
}

/// Times of every stage by its name; those that both sides have bear that of the
/// receiver in front.
pub(crate) fn figures(stages: &Stages) -> BTreeMap<&'static str, StageFigures> {
    let rows = stages.shares().into_iter();
    rows.map(|row| {
        let figures = StageFigures {
            busy_s: row.times.busy.as_secs_f64(),
            blocked_s: row.times.blocked.as_secs_f64(),
        };
        (key(&row), figures)
    })
    .collect()
}

/// How chunks were encoded; `mixed` when not all of them alike.
pub(crate) fn codec_word(codecs: &[Codec]) -> Option<&'static str> {
    Some(match codecs {
        [] => return None,
        [Codec::None] => "none",
        [Codec::Lz4] => "lz4",
        codecs if codecs.iter().all(|codec| codec.is_constant()) => "constant",
        _ => "mixed",
    })
}

fn key(row: &StageShare) -> &'static str {
    match (row.side, row.stage) {
        (Side::Receiver, PipelineStage::Checksum) => "receiver_checksum",
        (Side::Receiver, PipelineStage::Codec) => "receiver_codec",
        (_, stage) => stage.as_str(),
    }
}

fn words(row: &StageShare) -> &'static str {
    match (row.stage, row.side) {
        (PipelineStage::Read, _) => "reading the source",
        (PipelineStage::Checksum, Side::Sender) => "checksums on the sender",
        (PipelineStage::Checksum, Side::Receiver) => "checksums on the receiver",
        (PipelineStage::Codec, Side::Sender) => "compression on the sender",
        (PipelineStage::Codec, Side::Receiver) => "decompression on the receiver",
        (PipelineStage::Send, _) => "the network",
        (PipelineStage::Receive, _) => "taking in on the receiver",
        (PipelineStage::Place, _) => "page writes on the receiver",
        (PipelineStage::Sync, _) => "syncs on the receiver",
        _ => row.stage.as_str(),
    }
}

fn percent(row: &StageShare) -> u64 {
    (row.share * 100.0).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_two_busiest_stages_are_named_with_their_sides() {
        let mut stages = Stages::default();
        assert_eq!(line(&stages), None);
        stages.elapsed = Duration::from_secs(10);
        stages.sender.checksum.busy = Duration::from_millis(1_004);
        stages.sender.send.busy = Duration::from_millis(9_196);
        let first = "limited by: the network (busy 92 %), then checksums on the sender (10 %)";
        assert_eq!(line(&stages).as_deref(), Some(first));
        stages.sender.send.busy = Duration::ZERO;
        let alone = "limited by: checksums on the sender (busy 10 %)";
        assert_eq!(line(&stages).as_deref(), Some(alone));
        let mut receiver = tensorferry::ReceiverStages::default();
        receiver.checksum.busy = Duration::from_secs(4);
        stages.receiver = Some(receiver);
        let line = line(&stages).unwrap();
        assert!(
            line.starts_with("limited by: checksums on the receiver (busy 40 %)"),
            "{line}"
        );
    }

    #[test]
    fn every_stage_has_a_key_of_its_own() {
        let mut stages = Stages::default();
        assert_eq!(figures(&stages).len(), 4);
        stages.receiver = Some(Default::default());
        assert_eq!(figures(&stages).len(), 9);
    }

    #[test]
    fn the_codec_is_named_when_there_was_only_one() {
        for (codecs, word) in [
            (&[] as &[_], None),
            (&[Codec::None], Some("none")),
            (&[Codec::Lz4], Some("lz4")),
            (&[Codec::Zero, Codec::Fill], Some("constant")),
            (&[Codec::None, Codec::Lz4], Some("mixed")),
            (&[Codec::Zero, Codec::Lz4], Some("mixed")),
        ] {
            assert_eq!(codec_word(codecs), word, "{codecs:?}");
        }
    }
}
