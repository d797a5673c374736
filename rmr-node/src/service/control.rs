//! The admin API's view of the service: requests go to the shard that owns the state.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rmr_common::pool::{Command as PoolCommand, CommandReply, StoreId};

use super::Shared;
use super::command::ask_others;
use super::shard::{Command, ShardHandle};
use crate::admin::api::{
    ControlError, CreateStore, DeleteStore, ErrorCode, NodeInfo, PoolKey, PoolStatus, StoreCreated, UnixMs,
};
use crate::admin::{NodeControl, Reply, Responder, reply};
use crate::store::{CreateOptions, Store, ZeroPolicy};

/// See the module's comment.
pub(super) struct Control {
    shared: Arc<Shared>,
    shards: Vec<ShardHandle>,
}

impl Control {
    pub(super) const fn new(shared: Arc<Shared>, shards: Vec<ShardHandle>) -> Self {
        Self { shared, shards }
    }

    fn info(&self) -> NodeInfo {
        let config = &self.shared.config;
        let sum = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        NodeInfo {
            name: config.node_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_ms: self.shared.started,
            now_unix_ms: UnixMs::now(),
            data_addresses: self.shared.advertised().clone(),
            admin_address: config.admin,
            engine: engine_words(self.shared.inline.iter().map(|i| i.load(Ordering::Relaxed))).to_owned(),
            shards: sum(config.shards),
            stores: sum(self.shared.pools().len()),
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
        // The pool with the fewest stores of this node goes to the shard with the fewest.
        let shard = {
            let pools = self.shared.pools();
            (0..self.shards.len())
                .min_by_key(|i| pools.values().filter(|p| p.shard == *i).count())
                .unwrap_or(0)
        };
        let (shared, handle) = (Arc::clone(&self.shared), self.shards[shard].clone());
        // Zeroing a device takes as long as the device needs; no shard waits for it.
        let work = move || match create(&shared, &request) {
            Ok(store) => handle.send(Command::Adopt(Box::new(store), responder)),
            Err(error) => responder.send(Err(error)),
        };
        if let Err(error) = std::thread::Builder::new().name("create-store".into()).spawn(work) {
            let text = format!("no thread to create the store: {error}");
            return Box::pin(async { Err(ControlError::new(ErrorCode::Busy, text)) });
        }
        reply
    }

    fn delete_store(&self, store: StoreId, request: DeleteStore) -> Reply<()> {
        let place = self.shared.pools().values().find(|p| p.store == store).cloned();
        let Some(place) = place else {
            let text = format!("this node has no store {store}");
            return Box::pin(async { Err(ControlError::new(ErrorCode::NotFound, text)) });
        };
        let (responder, reply): (Responder<()>, _) = reply();
        self.shards[place.shard].send(Command::Delete(store, request.force, responder));
        reply
    }

    fn command(&self, pool: PoolKey, command: PoolCommand) -> Reply<CommandReply> {
        let found = {
            let pools = self.shared.pools();
            let place = match &pool {
                PoolKey::Id(id) => pools.get_key_value(id),
                PoolKey::Name(name) => pools.iter().find(|(_, place)| place.name == *name),
            };
            place.map(|(id, place)| (*id, place.shard))
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

fn create(shared: &Shared, request: &CreateStore) -> Result<Store, ControlError> {
    let spec = &request.spec;
    {
        let pools = shared.pools();
        if pools.contains_key(&spec.id) || pools.values().any(|p| p.name == spec.name) {
            let text = format!("this node has a store of pool '{}' already", spec.name);
            return Err(ControlError::new(ErrorCode::Exists, text));
        }
    }
    let Some(member) = spec.member(request.member) else {
        let text = format!("pool '{}' has no member {}", spec.name, request.member);
        return Err(ControlError::new(ErrorCode::Invalid, text));
    };
    let path = match &request.path {
        Some(path) => shared
            .config
            .place_for_store(path)
            .map_err(|error| ControlError::new(ErrorCode::Forbidden, error.to_string()))?,
        None => shared.config.new_store_path(spec.id, request.member).ok_or_else(|| {
            let text = "this node has no store directory (store_dir): name a device or file for the store";
            ControlError::new(ErrorCode::Invalid, text)
        })?,
    };
    let options = CreateOptions {
        spec: spec.clone(),
        member: request.member,
        store: member.store,
        view: request.view.clone(),
        overwrite: request.overwrite,
        zero: if request.assume_zero { ZeroPolicy::Check } else { ZeroPolicy::Zero },
        max_size: request.max_size_bytes,
    };
    Store::create(&path, &options, &mut |_, _| {}).map_err(ControlError::from)?;
    Store::open(&path, Some(spec.id)).map_err(ControlError::from)
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
