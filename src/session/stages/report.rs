//! What came of a session's stages, and the one that limited it.

use crate::protocol::{PipelineStage, ReceiverStages, SenderStages, Side, StageTimes};
use std::time::Duration;

/// How the stages of both sides spent a session: the one under way, or the last one.
/// All zero before the first and for a push that found its checkpoint published.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Stages {
    /// From the receiver's consent to this moment, or to Done.
    pub elapsed: Duration,
    /// Lanes that carried chunks, at most at a time.
    pub lanes: u32,
    /// Chunks were ready and waited for the rate that the user allows.
    pub rate_wait: Duration,
    /// The sender's. Until the receiver's are known all waiting for it is put down to
    /// the network.
    pub sender: SenderStages,
    /// The receiver's, which it tells with Done; none before, or when it does not tell.
    pub receiver: Option<ReceiverStages>,
}

/// One stage, and how much of the session it was busy.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct StageShare {
    /// Whose stage.
    pub side: Side,
    /// Which.
    pub stage: PipelineStage,
    /// Its times.
    pub times: StageTimes,
    /// `times.busy` as a share of the session, 0 to 1.
    pub share: f64,
}

impl Stages {
    pub(super) fn new(
        elapsed: Duration,
        lanes: u32,
        sender: SenderStages,
        receiver: Option<ReceiverStages>,
    ) -> Self {
        // Nothing takes longer than the session, whatever a receiver says.
        let within = |times: &mut StageTimes| {
            times.busy = times.busy.min(elapsed);
            times.blocked = times.blocked.min(elapsed);
        };
        let mut stages = Stages {
            elapsed,
            lanes,
            rate_wait: Duration::ZERO,
            sender,
            receiver,
        };
        let SenderStages {
            read,
            checksum,
            codec,
            send,
        } = &mut stages.sender;
        [read, checksum, codec, send].into_iter().for_each(within);
        if let Some(receiver) = &mut stages.receiver {
            let ReceiverStages {
                receive,
                checksum,
                codec,
                place,
                sync,
                held_bytes: _,
            } = receiver;
            [receive, checksum, codec, place, sync]
                .into_iter()
                .for_each(within);
        }
        stages
    }

    /// Every stage that is known of, in the order in which a chunk meets them.
    pub fn shares(&self) -> Vec<StageShare> {
        use PipelineStage::{Checksum, Codec, Place, Read, Receive, Send, Sync};
        let elapsed = self.elapsed.as_secs_f64().max(1e-9);
        let of = |side, stage, times: StageTimes| StageShare {
            side,
            stage,
            times,
            share: (times.busy.as_secs_f64() / elapsed).min(1.0),
        };
        let s = &self.sender;
        let mut shares = vec![
            of(Side::Sender, Read, s.read),
            of(Side::Sender, Checksum, s.checksum),
            of(Side::Sender, Codec, s.codec),
            of(Side::Sender, Send, s.send),
        ];
        if let Some(r) = &self.receiver {
            shares.extend([
                of(Side::Receiver, Receive, r.receive),
                of(Side::Receiver, Codec, r.codec),
                of(Side::Receiver, Checksum, r.checksum),
                of(Side::Receiver, Place, r.place),
                of(Side::Receiver, Sync, r.sync),
            ]);
        }
        shares
    }

    /// The stages by how busy they were, the busiest first. Empty when nothing was sent
    /// or compared.
    pub fn ranking(&self) -> Vec<StageShare> {
        // Whatever travels or is compared is summed first.
        if self.sender.checksum.busy.is_zero() {
            return Vec::new();
        }
        let mut shares = self.shares();
        shares.sort_by_key(|row| std::cmp::Reverse(row.times.busy));
        shares
    }

    /// Whether the rate that the user allows limited the session, more than any stage.
    pub fn is_rate_limited(&self) -> bool {
        let busiest = self.bottleneck().map(|row| row.times.busy);
        self.rate_wait > busiest.unwrap_or_default()
    }

    /// The stage that limited the session: the busiest. `None` when nothing was sent or
    /// compared.
    pub fn bottleneck(&self) -> Option<StageShare> {
        self.ranking().into_iter().next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(seconds: u64) -> StageTimes {
        StageTimes {
            busy: Duration::from_secs(seconds),
            blocked: Duration::ZERO,
        }
    }

    #[test]
    fn the_busiest_stage_of_either_side_is_named() {
        let sender = SenderStages {
            read: busy(3),
            checksum: busy(1),
            send: busy(2),
            ..SenderStages::default()
        };
        let receiver = ReceiverStages {
            checksum: busy(5),
            place: busy(4),
            ..ReceiverStages::default()
        };
        let named = |sender, receiver| {
            let stages = Stages::new(Duration::from_secs(10), 1, sender, receiver);
            let row = stages.bottleneck();
            row.map(|row| (row.side, row.stage, (row.share * 100.0).round() as u32))
        };
        let found = named(sender, Some(receiver));
        assert_eq!(found, Some((Side::Receiver, PipelineStage::Checksum, 50)));
        // One that does not tell.
        let found = named(sender, None);
        assert_eq!(found, Some((Side::Sender, PipelineStage::Read, 30)));
        // Only published: nothing travelled.
        let published = ReceiverStages {
            sync: busy(9),
            ..ReceiverStages::default()
        };
        assert_eq!(named(SenderStages::default(), Some(published)), None);
    }

    #[test]
    fn a_receiver_that_lies_claims_no_more_than_the_session() {
        let receiver = ReceiverStages {
            place: busy(1 << 40),
            ..ReceiverStages::default()
        };
        let sender = SenderStages {
            checksum: busy(1),
            ..SenderStages::default()
        };
        let stages = Stages::new(Duration::from_secs(10), 1, sender, Some(receiver));
        let row = stages.bottleneck().unwrap();
        assert_eq!((row.times, row.share), (busy(10), 1.0));
    }
}
