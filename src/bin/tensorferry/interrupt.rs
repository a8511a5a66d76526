//! Signals: the first Ctrl-C or SIGTERM asks to stop, the second stops. A file that
//! reaches the limit on its length is an error of the write and no signal.

use tensorferry::{Error, ErrorCode};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Hears SIGINT, SIGTERM and SIGXFSZ from now on.
#[derive(Debug)]
pub(crate) struct Interrupt {
    first: watch::Receiver<bool>,
}

impl Interrupt {
    /// Begins to listen; until then the signals kill as usual.
    pub(crate) fn listen() -> Result<Interrupt, Error> {
        let bug = |e: std::io::Error| Error::Bug(format!("signals cannot be heard: {e}"));
        let mut interrupt = signal(SignalKind::interrupt()).map_err(bug)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(bug)?;
        // Once somebody hears it, it kills no more; the write fails all the same.
        drop(signal(SignalKind::from_raw(libc::SIGXFSZ)).map_err(bug)?);
        let (heard, first) = watch::channel(false);
        tokio::spawn(async move {
            for _ in 0..2 {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if heard.send_replace(true) {
                    exit_at_once();
                }
            }
        });
        Ok(Interrupt { first })
    }

    /// Resolves when the first signal has come.
    pub(crate) async fn first(&mut self) {
        if self.first.wait_for(|heard| *heard).await.is_err() {
            // The listener is gone with the runtime.
            std::future::pending::<()>().await;
        }
    }
}

#[expect(
    clippy::exit,
    reason = "whoever asks twice does not want to wait for destructors"
)]
fn exit_at_once() {
    std::process::exit(ErrorCode::Interrupted.exit_code().into());
}
