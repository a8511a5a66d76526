//! What the receiving loop and the store do for the role.

use super::{recover::records, *};

impl World {
    pub(super) fn compare(&mut self, session: &mut Session) {
        let at = self.rng.below(session.comparing.len());
        let (job, bytes) = &mut session.comparing[at];
        let Some(bytes) = bytes else {
            *bytes = Some(self.disk.read(&job.slot, job.offset, job.raw_len));
            return;
        };
        let (equal, crc) = (*blake3::hash(bytes).as_bytes() == job.blake3, crc32c(bytes));
        session.receiver.compared(job, equal, crc, self.now);
        self.story.kept_cells += u64::from(equal);
        self.story.differing_cells += u64::from(!equal);
        session.comparing.swap_remove(at);
        session.receiver_idle = false;
    }

    pub(super) fn poll_receiver(&mut self, session: &mut Session) {
        let action = session.receiver.poll(self.now);
        let said_more = self.poll_lanes(session);
        let Some(action) = action else {
            session.receiver_idle = !said_more;
            return;
        };
        match action {
            ReceiveAction::Send(frame) => {
                assert!(
                    session.is_link_broken || frame.ack.is_none_or(|n| n <= session.sent_count)
                );
                self.ledger.sent(&frame, &session.view, &self.journal);
                self.story.rejected += frame.rejects.len() as u64;
                if session.sender.is_some() {
                    session.to_sender.push_back(frame);
                }
            }
            ReceiveAction::Commit(group) => session.committing = Some(self.committing(group)),
            ReceiveAction::Compare(job) => session.comparing.push((job, None)),
            ReceiveAction::Publish(plan) => self.publish(session, &plan),
        }
    }

    /// Whether any lane that joined had something to say.
    fn poll_lanes(&mut self, session: &mut Session) -> bool {
        let mut said_more = false;
        for lane in session.lanes.iter_mut().filter(|l| !l.is_lost_to_receiver) {
            while let Some(frame) = session.receiver.poll_lane(lane.number, self.now) {
                assert!(frame.is_of_any_lane());
                self.story.rejected += frame.rejects.len() as u64;
                said_more = true;
                if !lane.is_lost_to_sender {
                    lane.to_sender.push_back(frame);
                }
            }
        }
        said_more
    }

    /// The steps of a commit in their order, or in that of a mutant.
    fn committing(&mut self, group: Group) -> Committing {
        self.story.forgotten += group.forget.len() as u64;
        let mut steps: Vec<_> = (0..group.files.len()).map(CommitStep::File).collect();
        if self.mutant != Mutant::SkipNames {
            steps.push(CommitStep::Names);
        }
        let records = [CommitStep::Append, CommitStep::SyncJournal];
        match self.mutant {
            Mutant::JournalFirst => drop(steps.splice(0..0, records)),
            Mutant::SkipJournalSync => steps.push(CommitStep::Append),
            _ => steps.extend(records),
        }
        match self.mutant {
            Mutant::AckFirst => steps.insert(0, CommitStep::Acknowledge),
            _ => steps.push(CommitStep::Acknowledge),
        }
        Committing {
            group,
            steps: steps.into(),
        }
    }

    pub(super) fn commit_step(&mut self, session: &mut Session) {
        let Some(committing) = &mut session.committing else {
            return;
        };
        let group = &committing.group;
        match committing.steps.pop_front() {
            Some(CommitStep::File(i)) => {
                let (slot, recorded) = &group.files[i];
                self.disk.sync_data(slot, *recorded);
            }
            Some(CommitStep::Names) => self.disk.sync_names(),
            Some(CommitStep::Append) => self.journal.append(&records(group)),
            Some(CommitStep::SyncJournal) => self.journal.sync(),
            Some(CommitStep::Acknowledge) => {
                session.receiver_idle = false;
                let complete = session.receiver.committed(group.id);
                complete
                    .into_iter()
                    .for_each(|number| self.disk.close(number));
            }
            None => {}
        }
        if committing.steps.is_empty() {
            session.committing = None;
        }
    }

    /// Publishing succeeds, or it fails before the rename and the transfer goes on.
    fn publish(&mut self, session: &mut Session, plan: &PublishPlan) {
        checks::check_publish(session, plan, &self.disk);
        if self.faults.cut + self.faults.power > 0 && self.rng.chance(300) {
            if self.rng.chance(500) {
                self.journal.append(&[Record::Publish {
                    manifest_blake3: [1; 32],
                    overwrite: false,
                }]);
            }
            session.cut();
        } else {
            self.is_published = true;
        }
    }
}
