//! The stages of a receiving session.

use super::meter::{Flow, Load, Loads, Meter, Work};
#[cfg(test)]
use crate::protocol::Side;
use crate::{
    plan::CheckpointName,
    protocol::{DiskWait, PipelineStage, ReceiverStages, StageTimes},
};
use std::{sync::Arc, time::Duration};

/// What the receiver counts beside its workers.
#[derive(Debug, Default)]
pub(in crate::session) struct ReceiveFlow {
    /// Lanes that wait for memory; they are at work otherwise.
    short: Load,
    /// Raw bytes that have arrived and are not written.
    held_bytes: u64,
    disk_wait: DiskWait,

    withheld: Duration,
    disk: Duration,
    held_byte_seconds: f64,
}

impl Flow for ReceiveFlow {
    fn pass(&mut self, _loads: &Loads, time: Duration) {
        self.short.pass(time);
        self.held_byte_seconds += self.held_bytes as f64 * time.as_secs_f64();
        if self.disk_wait != DiskWait::Nothing {
            self.disk += time;
        }
        if self.disk_wait == DiskWait::Acks {
            self.withheld += time;
        }
    }
}

/// The stages of one receiving session. Cloning shares it.
#[derive(Clone, Debug)]
pub(in crate::session) struct ReceiveStages {
    meter: Arc<Meter<ReceiveFlow>>,
    #[cfg(test)]
    throttle: Option<super::throttle::Throttle>,
}

impl ReceiveStages {
    /// A session of this checkpoint begins.
    #[cfg_attr(
        not(test),
        expect(unused_variables, reason = "only tests slow some down")
    )]
    pub(in crate::session) fn new(checkpoint: &CheckpointName) -> Self {
        ReceiveStages {
            meter: Arc::new(Meter::new(ReceiveFlow::default())),
            #[cfg(test)]
            throttle: super::throttle::of(checkpoint, Side::Receiver),
        }
    }

    #[cfg(test)]
    pub(in crate::session) fn slow(&self, stage: PipelineStage, bytes: usize) {
        super::throttle::sleep(self.throttle, stage, bytes);
    }

    #[cfg(test)]
    pub(in crate::session) async fn slow_down(&self, bytes: usize) {
        let stage = PipelineStage::Receive;
        tokio::time::sleep(super::throttle::delay(self.throttle, stage, bytes)).await;
    }

    /// A worker is at this stage as long as the value lives.
    pub(in crate::session) fn work(&self, stage: PipelineStage) -> Work<'_, ReceiveFlow> {
        self.meter.work(stage)
    }

    /// A lane that is at work waits for memory instead, as long as the value lives.
    pub(in crate::session) fn short_of_memory(&self) -> Short<'_> {
        let mut ledger = self.meter.ledger();
        ledger.loads.of_mut(PipelineStage::Receive).end();
        ledger.flow.short.begin();
        Short(&self.meter)
    }

    /// This many raw bytes have arrived; they are held as long as the value lives.
    pub(in crate::session) fn hold(&self, bytes: u64) -> Held {
        self.meter.ledger().flow.held_bytes += bytes;
        Held {
            stages: self.clone(),
            bytes,
        }
    }

    /// What the sender waits for, if it is the disk.
    pub(in crate::session) fn set_disk_wait(&self, wait: DiskWait) {
        self.meter.ledger().flow.disk_wait = wait;
    }

    /// What there is to tell the sender.
    pub(in crate::session) fn figures(&self) -> ReceiverStages {
        let elapsed = self.meter.elapsed().as_secs_f64().max(1e-9);
        let ledger = self.meter.ledger();
        let (loads, flow) = (&ledger.loads, &ledger.flow);
        let whole = |time: StageTimes| StageTimes {
            // As it goes over the wire.
            busy: Duration::from_micros(time.busy.as_micros() as u64),
            blocked: Duration::from_micros(time.blocked.as_micros() as u64),
        };
        ReceiverStages {
            receive: whole(StageTimes {
                blocked: flow.short.busy(),
                ..loads.times(PipelineStage::Receive)
            }),
            checksum: whole(loads.times(PipelineStage::Checksum)),
            codec: whole(loads.times(PipelineStage::Codec)),
            place: whole(StageTimes {
                blocked: flow.withheld,
                ..loads.times(PipelineStage::Place)
            }),
            sync: whole(StageTimes {
                busy: flow.disk,
                blocked: Duration::ZERO,
            }),
            held_bytes: (flow.held_byte_seconds / elapsed) as u64,
        }
    }
}

/// A lane waits for memory.
#[derive(Debug)]
#[must_use = "the waiting ends when it is dropped"]
pub(in crate::session) struct Short<'a>(&'a Meter<ReceiveFlow>);

impl Drop for Short<'_> {
    fn drop(&mut self) {
        let mut ledger = self.0.ledger();
        ledger.flow.short.end();
        ledger.loads.of_mut(PipelineStage::Receive).begin();
    }
}

/// Bytes that have arrived and are not written.
#[derive(Debug)]
pub(in crate::session) struct Held {
    stages: ReceiveStages,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.stages.meter.ledger().flow.held_bytes -= self.bytes;
    }
}
