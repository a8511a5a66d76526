//! The link between the roles.

use super::*;
use std::collections::VecDeque;

impl World {
    /// A frame on its way to the receiver.
    pub(super) fn deliver(&mut self, session: &mut Session) -> Result<(), ProtocolError> {
        let (frame, is_broken) = self.next_frame(&mut session.to_receiver);
        session.is_link_broken |= is_broken;
        let Some(mut frame) = frame else {
            return Ok(());
        };
        if let Frame::Batch(batch, payload) = &mut frame {
            if let Some(bytes) = payload.first_mut()
                && self.rng.chance(self.faults.damage)
            {
                let at = self.rng.below(bytes.len());
                bytes[at] ^= 1 << self.rng.below(8);
                session.is_link_noisy = true;
            }
            self.ledger.announced(batch, &session.view, self.layout);
        }
        session.take_frame(frame)
    }

    /// A frame on its way to the sender.
    pub(super) fn answer(&mut self, session: &mut Session) -> Result<(), ProtocolError> {
        let (frame, is_broken) = self.next_frame(&mut session.to_sender);
        session.is_link_broken |= is_broken;
        let (Some(frame), Some(sender)) = (frame, &mut session.sender) else {
            return Ok(());
        };
        session.sender_idle = false;
        sender.handle(0, &frame)
    }

    /// What comes out of the link next, and whether it did what links of ours
    /// never do.
    fn next_frame<T: Clone>(&mut self, queue: &mut VecDeque<T>) -> (Option<T>, bool) {
        let mut is_broken = false;
        if queue.len() > 1 && self.rng.chance(self.faults.swap) {
            let other = 1 + self.rng.below(queue.len() - 1);
            queue.swap(0, other);
            is_broken = true;
        }
        let frame = queue.pop_front();
        if self.rng.chance(self.faults.lose) {
            return (None, true);
        }
        if let Some(frame) = &frame
            && self.rng.chance(self.faults.double)
        {
            queue.push_front(frame.clone());
            is_broken = true;
        }
        (frame, is_broken)
    }
}
