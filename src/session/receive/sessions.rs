//! Sessions that further lanes may join, by token.

use super::Session;
use crate::{
    plan::Digest16,
    protocol::{ProtocolError, Reason},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

type ByToken = Mutex<HashMap<Digest16, Weak<Session>>>;

/// Live sessions of one server. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sessions {
    by_token: Arc<ByToken>,
}

/// The place of a session among those that can be joined; dropping it ends that.
#[derive(Debug)]
pub(super) struct Listed {
    sessions: Sessions,
    token: Digest16,
}

impl Sessions {
    /// From now on lanes may join.
    pub(super) fn add(&self, session: &Arc<Session>) -> Listed {
        let token = session.accept.session_token;
        let mut by_token = self.by_token.lock().unwrap_or_else(PoisonError::into_inner);
        by_token.insert(token, Arc::downgrade(session));
        Listed {
            sessions: self.clone(),
            token,
        }
    }

    /// # Errors
    /// No session of this token is running.
    pub(super) fn get(&self, token: &[u8]) -> Result<Arc<Session>, ProtocolError> {
        let by_token = self.by_token.lock().unwrap_or_else(PoisonError::into_inner);
        let session = by_token.get(token).and_then(Weak::upgrade);
        session.ok_or_else(|| {
            ProtocolError::new(Reason::NotFound, "no session of this token is running")
        })
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut by_token = self
            .sessions
            .by_token
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        by_token.remove(&self.token);
    }
}
