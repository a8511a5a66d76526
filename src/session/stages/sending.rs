//! The stages of a sending session.

use super::{
    meter::{Flow, Loads, Meter, Work},
    report::Stages,
};
#[cfg(test)]
use crate::protocol::Side;
use crate::{
    plan::CheckpointName,
    protocol::{PipelineStage, ReceiverStages, SenderStages, StageTimes},
};
use bytes::Bytes;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// What the sender counts beside its workers.
#[derive(Debug, Default)]
pub(in crate::session) struct SendFlow {
    /// Raw bytes between wanted and handed to a lane.
    preparing_bytes: u64,
    /// Raw bytes between wanted and acked.
    in_flight_bytes: u64,
    /// Cells are wanted and there is no room for them.
    has_no_room: bool,
    /// The caller may still add entries, and there is nothing else to do.
    awaits_source: bool,
    lane_count: u32,
    most_lanes: u32,
    /// Lanes that have as much on its way as they may, and could have more.
    full_count: u32,
    /// Chunks are ready and wait for the rate that the user allows.
    is_rate_limited: bool,

    no_room: Duration,
    /// Chunks were ready and waited for the rate that the user allows.
    rate_wait: Duration,
    source_wait: Duration,
    /// No cell can be begun until acks come, as far as what is in flight is on its way and
    /// no lane is at work; or lanes wait for acks or for the rate with chunks at hand.
    ack_wait: Duration,
    /// Bytes on their way × seconds.
    away_byte_seconds: f64,
}

impl SendFlow {
    fn away_bytes(&self) -> u64 {
        self.in_flight_bytes.saturating_sub(self.preparing_bytes)
    }
}

impl Flow for SendFlow {
    fn pass(&mut self, loads: &Loads, time: Duration) {
        let is_prepared = self.preparing_bytes == 0 && self.in_flight_bytes > 0;
        let rest = 1.0 - loads.of(PipelineStage::Send).share();
        let mut waiting = f64::from(self.full_count) / f64::from(self.most_lanes.max(1));
        if self.has_no_room || is_prepared {
            let away_share = self.away_bytes() as f64 / self.in_flight_bytes.max(1) as f64;
            waiting = waiting.max(away_share * rest);
        }
        // What the user wants to wait is nobody's fault.
        match self.is_rate_limited {
            true => self.rate_wait += time.mul_f64(rest),
            false => self.ack_wait += time.mul_f64(waiting.min(rest)),
        }
        if self.awaits_source && self.in_flight_bytes == 0 {
            self.source_wait += time;
        }
        if self.has_no_room && loads.of(PipelineStage::Read).is_idle() {
            self.no_room += time;
        }
        self.away_byte_seconds += self.away_bytes() as f64 * time.as_secs_f64();
    }
}

/// The stages of one sending session. Cloning shares it.
#[derive(Clone, Debug)]
pub(in crate::session) struct SendStages {
    meter: Arc<Meter<SendFlow>>,
    #[cfg(test)]
    throttle: Option<super::throttle::Throttle>,
}

impl SendStages {
    /// A session of this checkpoint begins.
    #[cfg_attr(
        not(test),
        expect(unused_variables, reason = "only tests slow some down")
    )]
    pub(in crate::session) fn new(checkpoint: &CheckpointName) -> Self {
        SendStages {
            meter: Arc::new(Meter::new(SendFlow::default())),
            #[cfg(test)]
            throttle: super::throttle::of(checkpoint, Side::Sender),
        }
    }

    #[cfg(test)]
    pub(in crate::session) fn slow(&self, stage: PipelineStage, bytes: usize) {
        super::throttle::sleep(self.throttle, stage, bytes);
    }

    #[cfg(test)]
    pub(in crate::session) async fn slow_down(&self, bytes: usize) {
        let stage = PipelineStage::Send;
        tokio::time::sleep(super::throttle::delay(self.throttle, stage, bytes)).await;
    }

    /// A worker is at this stage as long as the value lives.
    pub(in crate::session) fn work(&self, stage: PipelineStage) -> Work<'_, SendFlow> {
        self.meter.work(stage)
    }

    /// Cells of this many raw bytes are to be read; with them `in_flight_bytes` are
    /// between wanted and acked.
    pub(in crate::session) fn prepare(&self, bytes: u64, in_flight_bytes: u64) {
        let mut ledger = self.meter.ledger();
        ledger.flow.preparing_bytes += bytes;
        ledger.flow.in_flight_bytes = in_flight_bytes;
    }

    /// Raw bytes between wanted and acked, as the role knows them.
    pub(in crate::session) fn set_in_flight(&self, bytes: u64) {
        self.meter.ledger().flow.in_flight_bytes = bytes;
    }

    /// Whether cells wait for room, and whether only the caller can bring more.
    pub(in crate::session) fn set_waiting(&self, has_no_room: bool, awaits_source: bool) {
        let mut ledger = self.meter.ledger();
        ledger.flow.has_no_room = has_no_room;
        ledger.flow.awaits_source = awaits_source;
    }

    /// Chunks wait for the allowed rate as long as the value lives.
    pub(in crate::session) fn limit_rate(&self) -> RateLimited {
        self.meter.ledger().flow.is_rate_limited = true;
        RateLimited(self.clone())
    }

    /// A lane that takes chunks as long as the value lives.
    pub(in crate::session) fn lane(&self) -> LaneLoad {
        let mut ledger = self.meter.ledger();
        ledger.flow.lane_count += 1;
        ledger.flow.most_lanes = ledger.flow.most_lanes.max(ledger.flow.lane_count);
        drop(ledger);
        LaneLoad {
            stages: self.clone(),
            frame_count: Arc::default(),
        }
    }

    /// Where the session stands. Without the receiver's figures all waiting for the
    /// lanes or for acks is the network's.
    pub(in crate::session) fn report(&self, receiver: Option<ReceiverStages>) -> Stages {
        let elapsed = self.meter.elapsed();
        let ledger = self.meter.ledger();
        let (loads, flow) = (&ledger.loads, &ledger.flow);
        let lane_wait = loads.of(PipelineStage::Send).busy();
        let mut by_receiver = Duration::ZERO;
        if let Some(receiver) = receiver {
            // A lane of the receiver that does something takes nothing in meanwhile.
            let receive = receiver.receive;
            let deaf = receive.busy.saturating_add(receive.blocked);
            let lane_part = lane_wait.min(deaf);
            let away_bytes = flow.away_byte_seconds / elapsed.as_secs_f64().max(1e-9);
            let held_share = (receiver.held_bytes as f64 / away_bytes.max(1.0)).min(1.0);
            let held = flow.ack_wait.mul_f64(held_share);
            let ack_part = held
                .saturating_add(receiver.place.blocked)
                .saturating_add(deaf - lane_part)
                .min(flow.ack_wait);
            by_receiver = lane_part + ack_part;
        }
        let read = loads.of(PipelineStage::Read).busy() + flow.source_wait;
        let sender = SenderStages {
            read: StageTimes {
                busy: read,
                blocked: flow.no_room,
            },
            checksum: loads.times(PipelineStage::Checksum),
            codec: loads.times(PipelineStage::Codec),
            send: StageTimes {
                busy: (lane_wait + flow.ack_wait).saturating_sub(by_receiver),
                blocked: by_receiver,
            },
        };
        let mut stages = Stages::new(elapsed, flow.most_lanes, sender, receiver);
        stages.rate_wait = flow.rate_wait.min(elapsed);
        stages
    }
}

/// What one lane has to send.
#[derive(Debug)]
pub(in crate::session) struct LaneLoad {
    stages: SendStages,
    /// Frames that the socket has not taken.
    frame_count: Arc<AtomicU32>,
}

/// Chunks wait for the allowed rate.
#[derive(Debug)]
pub(in crate::session) struct RateLimited(SendStages);

impl Drop for RateLimited {
    fn drop(&mut self) {
        self.0.meter.ledger().flow.is_rate_limited = false;
    }
}

/// A lane waits for acks although there are chunks.
#[derive(Debug)]
pub(in crate::session) struct FullLane(SendStages);

impl Drop for FullLane {
    fn drop(&mut self) {
        self.0.meter.ledger().flow.full_count -= 1;
    }
}

impl LaneLoad {
    /// It has enough on its way as long as the value lives.
    pub(in crate::session) fn wait_full(&self) -> FullLane {
        self.stages.meter.ledger().flow.full_count += 1;
        FullLane(self.stages.clone())
    }

    /// Chunks of `raw_bytes` are this lane's now; it is at work until the value goes.
    pub(in crate::session) fn take(&self, raw_bytes: u64) -> FrameOnLane {
        let is_first = self.frame_count.fetch_add(1, Ordering::AcqRel) == 0;
        let mut ledger = self.stages.meter.ledger();
        let preparing = &mut ledger.flow.preparing_bytes;
        *preparing = preparing.saturating_sub(raw_bytes);
        if is_first {
            ledger.loads.of_mut(PipelineStage::Send).begin();
        }
        drop(ledger);
        FrameOnLane {
            stages: self.stages.clone(),
            frame_count: Arc::clone(&self.frame_count),
        }
    }
}

impl Drop for LaneLoad {
    fn drop(&mut self) {
        self.stages.meter.ledger().flow.lane_count -= 1;
    }
}

/// A frame that a lane has and the socket has not.
#[derive(Debug)]
pub(in crate::session) struct FrameOnLane {
    stages: SendStages,
    frame_count: Arc<AtomicU32>,
}

impl FrameOnLane {
    /// Goes with the last bytes of the frame: the connection lets go of them once they
    /// are written.
    pub(in crate::session) fn end_with_last_of(self, parts: &mut [Bytes]) {
        if let Some(last) = parts.iter_mut().rfind(|part| !part.is_empty()) {
            let bytes = std::mem::take(last);
            let frame = self;
            *last = Bytes::from_owner(LastPart {
                bytes,
                _frame: frame,
            });
        }
    }
}

impl Drop for FrameOnLane {
    fn drop(&mut self) {
        if self.frame_count.fetch_sub(1, Ordering::AcqRel) == 1 {
            let mut ledger = self.stages.meter.ledger();
            ledger.loads.of_mut(PipelineStage::Send).end();
        }
    }
}

struct LastPart {
    bytes: Bytes,
    _frame: FrameOnLane,
}

impl AsRef<[u8]> for LastPart {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
