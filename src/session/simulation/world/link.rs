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
        session.is_link_noisy |= self.damage(&mut frame);
        if let Frame::Batch(batch, _) = &frame {
            self.ledger.announced(batch, &session.view, self.layout);
        }
        session.take_frame(0, frame)
    }

    /// Something happens on a lane that joined.
    pub(super) fn move_lane(&mut self, session: &mut Session) -> Result<(), ProtocolError> {
        let at = self.rng.below(session.lanes.len());
        if self.rng.chance(self.faults.lane_loss) {
            session.lose_lane(at, &mut self.rng);
            self.story.lost_lanes += 1;
            return Ok(());
        }
        let lane = &mut session.lanes[at];
        let number = lane.number;
        if self.rng.chance(500) {
            if let Some(mut frame) = lane.to_receiver.pop_front()
                && !session.has_ended
            {
                session.is_link_noisy |= self.damage(&mut frame);
                session.take_frame(number, frame)?;
            }
        } else if let Some(frame) = lane.to_sender.pop_front()
            && let Some(sender) = &mut session.sender
        {
            session.sender_idle = false;
            sender.handle(number, &frame)?;
        }
        Ok(())
    }

    fn damage(&mut self, frame: &mut Frame) -> bool {
        if let Frame::Batch(_, payload) = frame
            && let Some(bytes) = payload.iter_mut().find(|bytes| !bytes.is_empty())
            && self.rng.chance(self.faults.damage)
        {
            let at = self.rng.below(bytes.len());
            bytes[at] ^= 1 << self.rng.below(8);
            return true;
        }
        false
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
