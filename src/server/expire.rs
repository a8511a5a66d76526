//! Removes what was abandoned: when the server starts, then every hour, or more often
//! where less than four hours are allowed.

use crate::{plan::printable, session::ReceiveContext};
use std::time::Duration;

/// Longest and shortest pause between two looks.
const PAUSES: (Duration, Duration) = (Duration::from_secs(3600), Duration::from_secs(1));

/// Runs until it is dropped.
pub(super) async fn expire(context: ReceiveContext, ttl: Duration) {
    loop {
        remove_idle(&context, ttl).await;
        tokio::time::sleep((ttl / 4).clamp(PAUSES.1, PAUSES.0)).await;
    }
}

async fn remove_idle(context: &ReceiveContext, ttl: Duration) {
    let catalog = context.catalog.clone();
    let found = tokio::task::spawn_blocking(move || catalog.idle_transfers(ttl)).await;
    let idle = match found {
        Ok(Ok(idle)) => idle,
        Ok(Err(error)) => return tracing::warn!(%error, "abandoned transfers cannot be looked for"),
        Err(error) => return tracing::error!(%error, "the search for abandoned transfers panicked"),
    };
    for idle in idle {
        let name = idle.summary.as_ref().map(|s| s.name.clone());
        let shown = name
            .as_ref()
            .map_or_else(String::new, |n| printable(n.as_str(), 256));
        let durable_bytes = idle.summary.as_ref().map_or(0, |s| s.durable_bytes);
        // A session that comes now waits for the removal instead of finding a lock.
        let seat = match &name {
            Some(name) => match context.registry.take_idle(name) {
                Some(seat) => Some(seat),
                None => continue,
            },
            None => None,
        };
        let catalog = context.catalog.clone();
        let removed = tokio::task::spawn_blocking(move || catalog.remove_idle(&idle, ttl)).await;
        drop(seat);
        match removed {
            Ok(Ok(true)) => {
                tracing::info!(checkpoint = %shown, durable_bytes, "an abandoned transfer was removed");
            }
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                tracing::warn!(checkpoint = %shown, %error, "an abandoned transfer cannot be removed");
            }
            Err(error) => tracing::error!(%error, "the removal of a transfer panicked"),
        }
    }
}
