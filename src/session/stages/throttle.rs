//! For tests: makes one stage of one transfer slow, inside what is measured.

use crate::{
    plan::CheckpointName,
    protocol::{PipelineStage, Side},
};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// A stage and what each byte costs there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Throttle {
    pub(crate) side: Side,
    pub(crate) stage: PipelineStage,
    pub(crate) bytes_per_second: u64,
}

static BY_CHECKPOINT: Mutex<Option<HashMap<String, Throttle>>> = Mutex::new(None);

/// From now on every session of this name, which no other test has, is slow.
pub(crate) fn set(name: &CheckpointName, throttle: Throttle) {
    let mut all = BY_CHECKPOINT.lock().unwrap_or_else(PoisonError::into_inner);
    all.get_or_insert_default()
        .insert(name.to_string(), throttle);
}

/// The throttle of a session on this side, if there is one.
pub(crate) fn of(name: &CheckpointName, side: Side) -> Option<Throttle> {
    let all = BY_CHECKPOINT.lock().unwrap_or_else(PoisonError::into_inner);
    let found = all.as_ref()?.get(name.as_str()).copied();
    found.filter(|throttle| throttle.side == side)
}

/// How long these bytes are to take at this stage beside what they take anyway.
pub(crate) fn delay(throttle: Option<Throttle>, stage: PipelineStage, bytes: usize) -> Duration {
    match throttle {
        Some(throttle) if throttle.stage == stage => {
            Duration::from_secs_f64(bytes as f64 / throttle.bytes_per_second as f64)
        }
        _ => Duration::ZERO,
    }
}

/// The same in a job, which may sleep.
pub(crate) fn sleep(throttle: Option<Throttle>, stage: PipelineStage, bytes: usize) {
    let delay = delay(throttle, stage, bytes);
    if !delay.is_zero() {
        std::thread::sleep(delay);
    }
}
