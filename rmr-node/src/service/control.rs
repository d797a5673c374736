//! The admin API's view of the service: requests go to the shard that owns the state.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rmr_common::pool::{Command as PoolCommand, CommandReply, PoolId, StoreId};

use super::Shared;
use super::command::ask_others;
use super::keeper::Keeper;
use super::places::{PoolPlace, Stage};
use super::shard::{Command, Deleting, ShardHandle};
use crate::admin::api::{
    ControlError, CreateStore, DeleteStore, ErrorCode, NodeInfo, PoolKey, PoolStatus, StoreChanged,
    StoreCreated, StoreList, StoreName, UnixMs,
};
use crate::admin::{NodeControl, Reply, Responder, reply};

/// See the module's comment.
pub(super) struct Control {
    shared: Arc<Shared>,
    shards: Vec<ShardHandle>,
    keeper: Arc<Keeper>,
}

impl Control {
    pub(super) const fn new(shared: Arc<Shared>, shards: Vec<ShardHandle>, keeper: Arc<Keeper>) -> Self {
        Self { shared, shards, keeper }
    }

    /// The place of a store that is open.
    fn place_of(&self, name: &StoreName) -> Option<(PoolId, PoolPlace)> {
        let pools = self.shared.pools();
        let place = match (&name.path, name.store) {
            (Some(path), store) => pools.at(path).filter(|(_, place)| store.is_none_or(|s| s == place.store)),
            (None, Some(store)) => pools.of_store(store),
            (None, None) => None,
        };
        place.filter(|(_, place)| place.stage != Stage::Making).map(|(pool, place)| (pool, place.clone()))
    }

    fn info(&self) -> NodeInfo {
        let config = &self.shared.config;
        let sum = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (stores, left_out) = {
            let pools = self.shared.pools();
            (pools.open_count(), pools.left_out().count())
        };
        NodeInfo {
            name: config.node_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_ms: self.shared.started,
            now_unix_ms: UnixMs::now(),
            data_addresses: self.shared.advertised().clone(),
            admin_address: config.admin,
            engine: engine_words(self.shared.inline.iter().map(|i| i.load(Ordering::Relaxed))).to_owned(),
            shards: sum(config.shards),
            stores: sum(stores),
            stores_left_out: sum(left_out),
            max_stores: sum(self.shared.max_stores),
            connections: sum(self.shared.connections.count()),
            max_connections: sum(config.max_connections),
            buffer_bytes: config.buffer_memory * config.shards as u64,
            transport: self.shared.counters(),
            authentication_failures: self.shared.keys.failures(),
            buffer_used_bytes: self.shared.buffer_used.iter().map(|u| u.load(Ordering::Relaxed)).sum(),
            buffer_lent_bytes: self.shared.buffer_lent.iter().map(|u| u.load(Ordering::Relaxed)).sum(),
        }
    }
}

impl NodeControl for Control {
    fn node_info(&self) -> Reply<NodeInfo> {
        // Shards note their counters when they are asked for their pools.
        let (pools, info) = (self.pools(), self.info());
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            // A shard that has ended has noted its last ones.
            let _ = pools.await;
            Ok(NodeInfo { transport: shared.counters(), ..info })
        })
    }

    fn pools(&self) -> Reply<Vec<PoolStatus>> {
        let replies: Vec<Reply<Vec<PoolStatus>>> = self
            .shards
            .iter()
            .map(|shard| {
                let (responder, reply) = reply();
                shard.send(Command::Status(responder));
                reply
            })
            .collect();
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let mut pools = Vec::new();
            for reply in replies {
                pools.append(&mut reply.await?);
            }
            // Here and not on the shards: it reads files.
            for pool in &mut pools {
                (pool.authentication, pool.key_fingerprints) =
                    shared.keys.authentication(pool.spec.id, &pool.spec.name);
            }
            Ok(pools)
        })
    }

    fn create_store(&self, request: CreateStore) -> Reply<StoreCreated> {
        let (responder, reply) = reply();
        let keeper = Arc::clone(&self.keeper);
        // Zeroing a device takes as long as the device needs; no shard waits for it.
        on_thread("create-store", responder, move || keeper.create(&request));
        reply
    }

    fn delete_store(&self, store: StoreId, request: DeleteStore) -> Reply<()> {
        let place = self.shared.pools().of_store(store).map(|(_, place)| place.clone());
        let Some(place) = place else {
            let text = format!("this node has no store {store}");
            return Box::pin(async { Err(ControlError::new(ErrorCode::NotFound, text)) });
        };
        let (responder, reply): (Responder<()>, _) = reply();
        let own = self.keeper.is_own(&place.path);
        let deleting = Deleting { store, force: request.force, own };
        self.shards[place.shard].send(Command::Delete(deleting, responder));
        reply
    }

    fn stores(&self) -> Reply<StoreList> {
        let list = self.keeper.list();
        Box::pin(async move { Ok(list) })
    }

    fn open_store(&self, path: PathBuf) -> Reply<StoreChanged> {
        let (responder, reply) = reply();
        let keeper = Arc::clone(&self.keeper);
        on_thread("open-store", responder, move || keeper.open_by_command(&path));
        reply
    }

    fn close_store(&self, name: StoreName) -> Reply<StoreChanged> {
        let (responder, reply) = reply();
        match self.place_of(&name) {
            Some((_, place)) => {
                self.shards[place.shard].send(Command::Close(place.store, name.force, responder));
            }
            None => responder.send(self.keeper.close_left_out(&name)),
        }
        reply
    }

    fn delete_store_at(&self, name: StoreName) -> Reply<StoreChanged> {
        if let Some((_, place)) = self.place_of(&name) {
            let deleted = self.delete_store(place.store, DeleteStore { force: name.force });
            let PoolPlace { path, store, name, .. } = place;
            return Box::pin(async move {
                deleted.await?;
                Ok(StoreChanged { path, store: Some(store), name: Some(name), notes: Vec::new() })
            });
        }
        let (responder, reply) = reply();
        let keeper = Arc::clone(&self.keeper);
        on_thread("delete-store", responder, move || keeper.delete_left_out(&name));
        reply
    }

    fn command(&self, pool: PoolKey, command: PoolCommand) -> Reply<CommandReply> {
        let found = {
            let pools = self.shared.pools();
            let place = match &pool {
                PoolKey::Id(id) => pools.get(*id).map(|place| (*id, place)),
                PoolKey::Name(name) => pools.named(name),
            };
            place.filter(|(_, place)| place.stage != Stage::Making).map(|(id, place)| (id, place.shard))
        };
        let Some((id, shard)) = found else {
            let text = format!("there is no pool {pool} on this node");
            return Box::pin(async { Err(ControlError::new(ErrorCode::NotFound, text)) });
        };
        let (responder, asked) = reply();
        self.shards[shard].send(Command::Operator(id, command.clone(), responder));
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let asked = asked.await?;
            let (responder, answer) = reply();
            let work = move || responder.send(Ok(ask_others(&shared, asked, &command)));
            // Other nodes may keep it waiting, which the admin thread must not.
            if let Err(error) = std::thread::Builder::new().name("ask-others".into()).spawn(work) {
                let text = format!("no thread to ask the other nodes: {error}");
                return Err(ControlError::new(ErrorCode::Busy, text));
            }
            answer.await
        })
    }
}

/// What shards use, by which of them have no io_uring.
fn engine_words(inline: impl Iterator<Item = bool>) -> &'static str {
    let (without, with): (Vec<bool>, Vec<bool>) = inline.partition(|inline| *inline);
    match (with.is_empty(), without.is_empty()) {
        (_, true) => "uring",
        (true, false) => "inline",
        (false, false) => "mixed",
    }
}

/// Does what may wait for a device on a thread, and answers.
fn on_thread<T: Send + 'static>(
    name: &str,
    responder: Responder<T>,
    work: impl FnOnce() -> Result<T, ControlError> + Send + 'static,
) {
    // The responder goes with the work if there is no thread, and answers that the node is stopping.
    let run = move || responder.send(work());
    if let Err(error) = std::thread::Builder::new().name(name.to_owned()).spawn(run) {
        tracing::error!("no thread for an operator's command: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_is_what_the_shards_have_and_not_what_was_configured() {
        for (shards, words) in
            [(&[false, false][..], "uring"), (&[true, true], "inline"), (&[false, true], "mixed")]
        {
            assert_eq!(engine_words(shards.iter().copied()), words);
        }
    }
}
