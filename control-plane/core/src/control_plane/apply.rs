//! Raft's rounds: effects out, committed entries into the state, results to who waits for them.

use towline_proto::v1::{self, node_directive::Directive};

use super::{ControlPlane, Read, SNAPSHOT_BYTES};
use crate::command::{self, Halt};
use crate::input::{Answer, Effect};
use crate::invariants;
use crate::proposals::Waiter;
use crate::reconcile::{Session, directive, must_reset};
use crate::refusal::{Refusal, RefusalKind};
use crate::replica::Committed;
use crate::snapshot;
use crate::state::Done;

impl ControlPlane {
    pub(super) fn drive(&mut self, effects: &mut Vec<Effect>) -> Result<(), Halt> {
        while let Some(round) = self.replica.round()? {
            effects.extend(round.effects);
            self.notice_leadership(effects);
            if let Some(record) = round.snapshot {
                self.install(&record)?;
            }
            for entry in round.committed {
                self.apply(entry, effects)?;
            }
            self.replica.applied(self.applied);
            for (context, index) in round.reads {
                let asked = self.reads.asked.iter_mut().find(|round| round.context == context);
                if let Some(asked) = asked {
                    asked.index = Some(index);
                }
            }
            self.answer_reads(effects);
            self.offer_snapshot();
        }
        self.notice_leadership(effects);
        self.save_snapshot(effects);
        Ok(())
    }

    fn notice_leadership(&mut self, effects: &mut Vec<Effect>) {
        let leads = self.replica.leads();
        if leads && !self.led {
            self.liveness.lead(self.now.mono_ms);
        }
        if !leads && self.led {
            self.resign(effects);
        }
        self.led = leads;
    }

    fn install(&mut self, record: &v1::SnapshotRecord) -> Result<(), Halt> {
        let state = snapshot::decode(record.index, &record.state)?;
        invariants::check(&state).map_err(|violation| Halt::Snapshot {
            index: record.index,
            reason: violation.to_string(),
        })?;
        self.state = state;
        self.applied = record.index;
        self.saved = record.index;
        Ok(())
    }

    fn apply(&mut self, entry: Committed, effects: &mut Vec<Effect>) -> Result<(), Halt> {
        let waiters = self.proposals.take(entry.term, entry.index);
        self.ready = self.ready || (self.led && entry.term == self.replica.term());
        if entry.data.is_empty() {
            self.applied = entry.index;
            self.fail_all(waiters.unwrap_or_else(|stale| stale), effects);
            return Ok(());
        }
        let batch = command::decode(entry.index, &entry.data)?;
        let (results, changes) = self.state.apply(&batch);
        self.applied = entry.index;
        match waiters {
            Ok(waiters) => {
                for (waiter, result) in waiters.into_iter().zip(results) {
                    self.settle(waiter, result, effects);
                }
            }
            Err(stale) => self.fail_all(stale, effects),
        }
        effects.extend(self.sessions.tell(&self.state, &changes));
        effects.extend(self.watches.tell(&self.state, &changes));
        Ok(())
    }

    fn fail_all(&mut self, waiters: Vec<Waiter>, effects: &mut Vec<Effect>) {
        for waiter in waiters {
            self.fail(waiter, &Refusal::unknown(), effects);
        }
    }

    fn settle(&mut self, waiter: Waiter, result: Result<Done, Refusal>, effects: &mut Vec<Effect>) {
        match waiter {
            Waiter::Request(id) => effects.push(Effect::Answer(id, result.map(to_answer))),
            Waiter::Create(creation) => {
                self.proposals.end(&creation);
                let id = creation.request_id;
                match result {
                    Err(raced) if raced.kind == RefusalKind::Raced => {
                        if let Err(refusal) = self.create_again(*creation, raced) {
                            effects.push(Effect::Answer(id, Err(refusal)));
                        }
                    }
                    result => effects.push(Effect::Answer(id, result.map(to_answer))),
                }
            }
            Waiter::Observed(session, sequence) => match result {
                Ok(_) => {
                    let ack = Directive::ObservedAck(v1::ObservedAck { sequence });
                    effects.push(Effect::Directives(session, vec![directive(ack)]));
                }
                Err(refusal) => {
                    self.sessions.close(session);
                    effects.push(must_reset(session, &refusal.message));
                    effects.push(Effect::EndSession(session, refusal));
                }
            },
            Waiter::Open(session) => self.opened(session, result, effects),
            Waiter::Nobody => {}
        }
    }

    fn opened(
        &mut self,
        session: crate::SessionId,
        result: Result<Done, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        match result {
            Ok(Done::Node { id, epoch }) => {
                self.liveness.heard(id, self.now.mono_ms);
                let opened = Session { node: id, epoch };
                effects.extend(self.sessions.open(session, opened, &self.state));
            }
            Ok(_) => {}
            Err(refusal) => effects.push(Effect::EndSession(session, refusal)),
        }
    }

    fn answer_reads(&mut self, effects: &mut Vec<Effect>) {
        let (ready, waiting) = std::mem::take(&mut self.reads.asked)
            .into_iter()
            .partition(|round| round.index.is_some_and(|index| index <= self.applied));
        self.reads.asked = waiting;
        for read in ready.into_iter().flat_map(|round: super::ReadRound| round.reads) {
            self.answer_read(read, effects);
        }
    }

    fn answer_read(&mut self, read: Read, effects: &mut Vec<Effect>) {
        match read {
            Read::Request(id, caller, request) => {
                let answer = self.answer(&caller, &request);
                effects.push(Effect::Answer(id, answer));
            }
            Read::Watch(id, caller, which) => {
                match crate::reads::find(&self.state, &caller, &which) {
                    Ok((sandbox, record)) => {
                        let view = self.state.view(record);
                        self.watches.add(id, sandbox);
                        effects.push(Effect::WatchUpdate(id, Box::new(view)));
                    }
                    Err(refusal) => effects.push(Effect::WatchEnd(id, Some(refusal))),
                }
            }
        }
    }

    /// Gives raft the state as it is, for a member that the log cannot bring up.
    fn offer_snapshot(&self) {
        if self.replica.snapshot_wanted() {
            self.replica.offer_snapshot(self.labelled_state());
        }
    }

    fn labelled_state(&self) -> v1::SnapshotRecord {
        let mut record = self.replica.label(self.applied);
        record.state = snapshot::encode(&self.state);
        record
    }

    fn save_snapshot(&mut self, effects: &mut Vec<Effect>) {
        let entries = self.applied - self.saved.min(self.applied);
        let bytes_due = self.replica.log_bytes() >= SNAPSHOT_BYTES
            && entries >= self.config.snapshot_entries / 10;
        let due = entries >= self.config.snapshot_entries || bytes_due;
        if !due || self.saving.is_some() {
            return;
        }
        self.saving = Some(self.applied);
        effects.push(Effect::SaveSnapshot(self.labelled_state()));
    }
}

fn to_answer(done: Done) -> Answer {
    match done {
        Done::Sandbox(sandbox) => Answer::Sandbox(sandbox),
        Done::Forked(sandboxes) => Answer::Forked(sandboxes),
        Done::Image(image) => Answer::Image(image),
        Done::Token(id) => Answer::Token(id),
        Done::Admitted { role, project } => Answer::Admitted { role, project },
        Done::Node { .. } | Done::Nothing => Answer::Done,
    }
}
