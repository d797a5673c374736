//! Stores: taken in, and deleted step by step.

use std::time::Duration;

use rmr_common::pool::StoreId;

use super::super::PoolPlace;
use super::super::deletion::{Deletion, Remains, Stage};
use super::super::member::Member;
use super::{Command, Shard};
use crate::admin::Responder;
use crate::admin::api::{ControlError, ErrorCode};
use crate::store::Store;

impl Shard {
    pub(super) fn adopt(&mut self, store: Store) -> Result<(), ControlError> {
        let internal = |e: &dyn std::fmt::Display| ControlError::new(ErrorCode::Internal, e.to_string());
        let superblock = store.superblock();
        let place =
            PoolPlace { name: superblock.spec.name.clone(), store: superblock.store, shard: self.index };
        let pool = superblock.spec.id;
        {
            let mut pools = self.shared.pools();
            if pools.contains_key(&pool) || pools.values().any(|p| p.name == place.name) {
                let text = format!("this node has a store of pool '{}' already", place.name);
                return Err(ControlError::new(ErrorCode::Exists, text));
            }
            pools.insert(pool, place);
        }
        let disk = store
            .disk_file()
            .map_err(|e| internal(&e))
            .and_then(|file| self.engine.add_disk(file).map_err(|e| internal(&e)));
        let disk = disk.inspect_err(|_| {
            self.shared.pools().remove(&pool);
        })?;
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
        Ok(())
    }

    pub(super) fn delete(&mut self, store: StoreId, force: bool, responder: Responder<()>) {
        if let Some(index) = self.deletions.iter().position(|d| d.remains.store == store) {
            return match self.deletions[index].is_under_way() {
                Some(busy) => responder.send(Err(busy)),
                None => self.destroy(index, responder),
            };
        }
        let store_dir = self.shared.config.store_dir.clone();
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
            own: store_dir.is_some_and(|dir| path.parent() == Some(&dir)),
            path,
            tried: false,
        };
        let clients: Vec<_> =
            self.peers.iter().filter(|(_, p)| p.member == Some(index)).map(|(id, _)| *id).collect();
        for id in clients {
            self.lost(id, "the store is being deleted");
        }
        self.deletions.push(Deletion { remains, stage: Stage::Closing(index, responder) });
    }

    /// Destroys stores that were to be deleted and have nothing under way any more.
    pub(super) fn advance_deletions(&mut self) {
        for at in 0..self.deletions.len() {
            let Stage::Closing(index, _) = self.deletions[at].stage else { continue };
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
            if let Stage::Closing(_, responder) =
                std::mem::replace(&mut self.deletions[at].stage, Stage::Failed)
            {
                self.destroy(at, responder);
            }
        }
    }

    /// Has a closed store destroyed.
    pub(super) fn destroy(&mut self, at: usize, responder: Responder<()>) {
        let deletion = &mut self.deletions[at];
        deletion.stage = Stage::Destroying(responder);
        let (remains, handle) = (deletion.remains.clone(), self.shards[self.index].clone());
        let work = move || handle.send(Command::Destroyed(remains.store, remains.destroy()));
        if let Err(error) = std::thread::Builder::new().name("delete-store".into()).spawn(work) {
            deletion.ended(Err(format!("no thread for it: {error}")));
        }
    }
}
