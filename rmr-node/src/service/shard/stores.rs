//! Stores: taken in, closed, and deleted step by step.

use std::sync::Arc;
use std::time::Duration;

use rmr_common::pool::StoreId;

use super::super::deletion::{self, Closure, Deletion, Remains};
use super::super::member::Member;
use super::super::places::Stage;
use super::{Command, Deleting, Phase, Shard};
use crate::admin::Responder;
use crate::admin::api::{ControlError, ErrorCode, LeftOut, StoreChanged, UnixMs};
use crate::ctl::advice::Advice;
use crate::store::Store;

impl Shard {
    /// Serves a store, whose place is reserved.
    pub(super) fn adopt(&mut self, store: Store) -> Result<(), ControlError> {
        let internal = |e: &dyn std::fmt::Display| ControlError::new(ErrorCode::Internal, e.to_string());
        if !matches!(self.phase, Phase::Serving) {
            return Err(ControlError::new(ErrorCode::Busy, "the node is stopping"));
        }
        let pool = store.superblock().spec.id;
        let disk = store
            .disk_file()
            .map_err(|e| internal(&e))
            .and_then(|file| self.engine.add_disk(file).map_err(|e| internal(&e)))?;
        let member = Member::new(store, disk, &self.shared);
        let (spec, view) = (member.replica.spec(), member.replica.view());
        tracing::info!(
            pool = %spec.name, member = %member.replica.member(), path = %member.store.path().display(),
            clean = member.store.was_clean(), inline = self.engine.is_inline(disk), "store is open: {view}"
        );
        match self.members.iter().position(Option::is_none) {
            Some(free) => self.members[free] = Some(member),
            None => self.members.push(Some(member)),
        }
        self.shared.pools().set_stage(pool, Stage::Open);
        Ok(())
    }

    pub(super) fn delete(&mut self, deleting: &Deleting, responder: Responder<()>) {
        let (store, force) = (deleting.store, deleting.force);
        if let Some(index) = self.deletions.iter().position(|d| d.remains.store == store) {
            return match self.deletions[index].is_under_way() {
                Some(busy) => responder.send(Err(busy)),
                None => self.destroy(index, responder),
            };
        }
        if self.closure_of(store).is_some() {
            let text = format!("store {store} is being closed: delete it when it is");
            return responder.send(Err(ControlError::new(ErrorCode::Busy, text)));
        }
        let Some((index, member)) = self.member_of_store(store) else {
            let text = format!("this node has no store {store}");
            return responder.send(Err(ControlError::new(ErrorCode::NotFound, text)));
        };
        if let Some(holder) = member.replica.status().holder.filter(|h| h.connected && !force) {
            let text = format!("pool '{}' is held by {}", member.replica.spec().name, holder.description);
            return responder.send(Err(ControlError::new(ErrorCode::InUse, text)));
        }
        member.closing = true;
        let path = member.store.path().to_owned();
        let remains = Remains {
            store,
            pool: member.pool(),
            name: member.replica.spec().name.clone(),
            own: deleting.own,
            path,
            tried: false,
        };
        let pool = remains.pool;
        self.shared.pools().set_stage(pool, Stage::Closing);
        self.lose_clients(index, "the store is being deleted");
        self.deletions.push(Deletion { remains, stage: deletion::Stage::Closing(index, responder) });
    }

    /// Destroys stores that were to be deleted and have nothing under way any more.
    pub(super) fn advance_deletions(&mut self) {
        for at in 0..self.deletions.len() {
            let deletion::Stage::Closing(index, _) = self.deletions[at].stage else { continue };
            let Some(Some(member)) = self.members.get(index) else { continue };
            if member.replica.is_busy()
                || member.makes_room
                || !member.metadata_idle()
                || self.engine.remove_disk(member.disk).is_err()
            {
                self.next_tick = self.next_tick.min(self.now + Duration::from_millis(10));
                continue;
            }
            // The pool stays in the list until nothing of it is left: a store created meanwhile would be destroyed too.
            self.members[index] = None;
            if let deletion::Stage::Closing(_, responder) =
                std::mem::replace(&mut self.deletions[at].stage, deletion::Stage::Failed)
            {
                self.destroy(at, responder);
            }
        }
    }

    /// Has a closed store destroyed.
    pub(super) fn destroy(&mut self, at: usize, responder: Responder<()>) {
        let deletion = &mut self.deletions[at];
        deletion.stage = deletion::Stage::Destroying(responder);
        let (remains, handle) = (deletion.remains.clone(), self.shards[self.index].clone());
        let shared = Arc::clone(&self.shared);
        let work = move || {
            let result = remains.destroy();
            if let (Ok(()), Err(error)) = (&result, shared.forget_store(&remains.path)) {
                tracing::error!(path = %remains.path.display(), "a deleted store stays on the list of those to open: {error}");
            }
            handle.send(Command::Destroyed(remains.store, result));
        };
        if let Err(error) = std::thread::Builder::new().name("delete-store".into()).spawn(work) {
            deletion.ended(Err(format!("no thread for it: {error}")));
        }
    }

    fn lose_clients(&mut self, index: usize, reason: &str) {
        let clients: Vec<_> =
            self.peers.iter().filter(|(_, p)| p.member == Some(index)).map(|(id, _)| *id).collect();
        for id in clients {
            self.lost(id, reason);
        }
    }

    fn closure_of(&self, store: StoreId) -> Option<usize> {
        self.closures.iter().position(|closure| closure.entry.store == Some(store))
    }

    /// Closes a store by command; it stays as it is.
    pub(super) fn close_store(&mut self, store: StoreId, force: bool, responder: Responder<StoreChanged>) {
        let busy = |text: String| Err(ControlError::new(ErrorCode::Busy, text));
        if let Some(at) = self.closure_of(store) {
            // One whose metadata failed stays closed, now that an operator wants it so.
            self.closures[at].entry.closed = true;
            return responder.send(busy(format!("store {store} is being closed already")));
        }
        let Some((index, member)) = self.member_of_store(store) else {
            let text = format!("this node has no store {store} open");
            return responder.send(Err(ControlError::new(ErrorCode::NotFound, text)));
        };
        if member.closing {
            return responder.send(busy(format!("store {store} is being deleted")));
        }
        if let Some(holder) = member.replica.status().holder.filter(|h| h.connected && !force) {
            let text = format!(
                "pool '{}' is held by {}: closing the store takes this member out from under it (take it out first with \
                 `{}`, or add --force)",
                member.replica.spec().name,
                holder.description,
                Advice::maintenance_on(&member.replica.spec().name, member.replica.member())
            );
            return responder.send(Err(ControlError::new(ErrorCode::InUse, text)));
        }
        self.begin_closure(index, "closed by an operator".to_owned(), true, Some(responder));
    }

    /// Closes stores whose metadata cannot be written. They are opened again after a pause: what they have is then read from
    /// the disk, and not believed because it was meant to be there.
    pub(super) fn close_failed(&mut self) {
        if !matches!(self.phase, Phase::Serving) {
            return;
        }
        for index in 0..self.members.len() {
            let Some(member) = &self.members[index] else { continue };
            if !member.closing
                && let Some(failure) = member.metadata_failure()
            {
                let reason = format!("{failure}; its disk may be failing, see the kernel's log");
                self.begin_closure(index, reason, false, None);
            }
        }
    }

    fn begin_closure(
        &mut self,
        index: usize,
        reason: String,
        closed: bool,
        responder: Option<Responder<StoreChanged>>,
    ) {
        let deadline = self.now + self.shared.config.stop_timeout;
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        member.closing = true;
        let (spec, pool) = (member.replica.spec(), member.pool());
        let entry = LeftOut {
            path: member.store.path().to_owned(),
            pool: Some(pool),
            name: Some(spec.name.clone()),
            member: Some(member.replica.member()),
            store: Some(member.store.superblock().store),
            reason,
            closed,
            since_unix_ms: UnixMs::now(),
            attempts: 0,
            next_attempt_s: None,
        };
        tracing::info!(pool = %spec.name, member = %member.replica.member(), "closing the store: {}", entry.reason);
        let failed = member.metadata_failure().is_some();
        self.shared.pools().set_stage(pool, Stage::Closing);
        self.closures.push(Closure { index, entry, deadline, marked: failed, responder });
        if failed {
            self.lose_clients(index, "the metadata of the store cannot be written");
        } else {
            self.say_goodbye_for(Some(index), "the store is being closed");
        }
    }

    /// Takes stores further that are being closed.
    pub(super) fn advance_closures(&mut self) {
        for at in (0..self.closures.len()).rev() {
            let Closure { index, deadline, marked, .. } = self.closures[at];
            if self.now >= deadline {
                self.lose_clients(index, "the store is being closed, and the client did not leave in time");
            }
            let has_clients = self.peers.values().any(|p| p.member == Some(index));
            let Some(Some(member)) = self.members.get_mut(index) else { continue };
            let is_busy = has_clients || member.replica.is_busy() || member.makes_room;
            if is_busy || !member.metadata_idle() {
                self.next_tick = self.next_tick.min(self.now + Duration::from_millis(10));
                continue;
            }
            if !marked {
                member.mark_clean();
                self.closures[at].marked = true;
                self.activate(index);
                self.next_tick = self.now;
                continue;
            }
            if self.engine.remove_disk(member.disk).is_err() {
                self.next_tick = self.next_tick.min(self.now + Duration::from_millis(10));
                continue;
            }
            self.close_source(index);
            self.members[index] = None;
            let Closure { entry, responder, .. } = self.closures.swap_remove(at);
            let changed = StoreChanged {
                path: entry.path.clone(),
                store: entry.store,
                name: entry.name.clone(),
                notes: Vec::new(),
            };
            let pool = entry.pool;
            self.shared.leave_out(entry);
            if let Some(pool) = pool {
                self.shared.pools().remove(pool);
            }
            if let Some(responder) = responder {
                responder.send(Ok(changed));
            }
        }
    }
}
