//! Tensors that can be used before all of their checkpoint is there.

use std::{fmt, path::PathBuf, sync::Arc};

/// A tensor or side file that is complete and durable while others may be on their way.
///
/// Its file is read-only from now on and its bytes never change: what maps it may keep it
/// over the end of the transfer and for as long as it likes. If its source turns out to
/// have changed, and the transfer goes on with other bytes, those come into another file of
/// the same name, and it is told of again. It is told of anew in every session, too.
///
/// A tensor of a shared file ([`OutFormat::Safetensors`](crate::OutFormat)) is not told of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadyTensor {
    /// Name of the checkpoint where it is received.
    pub checkpoint: String,
    /// Name of the tensor or side file.
    pub name: String,
    /// Where its file lies until the checkpoint is published; after that it has the same
    /// name in the folder of the checkpoint.
    pub path: PathBuf,
    /// Raw bytes of it.
    pub byte_len: u64,
    /// It was asked for before the others.
    pub is_first: bool,
}

/// Who wants to hear of each [`ReadyTensor`].
///
/// ```
/// use tensorferry::{OnReady, PullOptions};
///
/// let mut options = PullOptions::default();
/// options.transfer.first = vec!["embedding*".to_owned()];
/// options.on_ready = Some(OnReady::new(|tensor| {
///     println!("{} can be mapped from {}", tensor.name, tensor.path.display());
/// }));
/// ```
#[derive(Clone)]
pub struct OnReady {
    tell: Arc<dyn Fn(&ReadyTensor) + Send + Sync>,
    only_first: bool,
}

impl OnReady {
    /// Calls this from a thread of the receiver, for one tensor after the other of each
    /// transfer. What takes long keeps the next ones, and the end of the transfer, waiting.
    pub fn new(tell: impl Fn(&ReadyTensor) + Send + Sync + 'static) -> Self {
        OnReady {
            tell: Arc::new(tell),
            only_first: false,
        }
    }

    /// The same, of those only that were asked for before the others.
    pub fn of_first(tell: impl Fn(&ReadyTensor) + Send + Sync + 'static) -> Self {
        OnReady {
            tell: Arc::new(tell),
            only_first: true,
        }
    }

    /// Whether it wants to hear of a tensor.
    pub(crate) fn wants(&self, is_first: bool) -> bool {
        is_first || !self.only_first
    }

    pub(crate) fn tell(&self, tensor: &ReadyTensor) {
        (self.tell)(tensor);
    }
}

impl fmt::Debug for OnReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnReady").finish_non_exhaustive()
    }
}
