//! Which store of which pool is where on this node: those that are served, those that are being made, and those left out.
//!
//! A pool's id, its name and its path are reserved here before anything is made, and given back when nothing came of it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rmr_common::pool::{PoolId, StoreId};

use super::Shared;
use crate::admin::api::{ControlError, ErrorCode, LeftOut};

/// Where a pool's store is served.
#[derive(Clone, Debug)]
pub(crate) struct PoolPlace {
    pub(crate) name: String,
    pub(crate) store: StoreId,
    pub(crate) path: PathBuf,
    pub(crate) shard: usize,
    pub(crate) stage: Stage,
}

/// How far a store is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// It is being made or opened.
    Making,
    /// It is served.
    Open,
    /// It is being closed or deleted.
    Closing,
}

impl Stage {
    const fn words(self) -> &'static str {
        match self {
            Self::Making => "is being made or opened",
            Self::Open => "is open",
            Self::Closing => "is being closed",
        }
    }
}

/// See the module's comment.
#[derive(Default)]
pub(crate) struct Places {
    pools: HashMap<PoolId, PoolPlace>,
    names: HashMap<String, PoolId>,
    left_out: BTreeMap<PathBuf, LeftOut>,
}

impl Places {
    /// The place of a pool, whatever its stage.
    pub(crate) fn get(&self, pool: PoolId) -> Option<&PoolPlace> {
        self.pools.get(&pool)
    }

    /// The pool of this name.
    pub(crate) fn named(&self, name: &str) -> Option<(PoolId, &PoolPlace)> {
        let id = self.names.get(name)?;
        Some((*id, self.pools.get(id)?))
    }

    /// The place of a store.
    pub(crate) fn of_store(&self, store: StoreId) -> Option<(PoolId, &PoolPlace)> {
        self.pools.iter().find(|(_, place)| place.store == store).map(|(id, place)| (*id, place))
    }

    /// The place of the store at a path.
    pub(crate) fn at(&self, path: &Path) -> Option<(PoolId, &PoolPlace)> {
        self.pools.iter().find(|(_, place)| place.path == path).map(|(id, place)| (*id, place))
    }

    /// All places.
    pub(crate) fn all(&self) -> impl Iterator<Item = (PoolId, &PoolPlace)> {
        self.pools.iter().map(|(id, place)| (*id, place))
    }

    /// Number of stores that are served.
    pub(crate) fn open_count(&self) -> usize {
        self.pools.values().filter(|place| place.stage != Stage::Making).count()
    }

    /// The shard with the fewest stores, of `shards`.
    pub(crate) fn emptiest_shard(&self, shards: usize) -> usize {
        let mut counts = vec![0_usize; shards.max(1)];
        for place in self.pools.values() {
            if let Some(count) = counts.get_mut(place.shard) {
                *count += 1;
            }
        }
        (0..counts.len()).min_by_key(|shard| counts[*shard]).unwrap_or(0)
    }

    /// Takes id, name and path for a store, unless another one has one of them.
    pub(crate) fn reserve(&mut self, pool: PoolId, place: PoolPlace) -> Result<(), ControlError> {
        let exists = |text: String| Err(ControlError::new(ErrorCode::Exists, text));
        let holder = self.pools.get_key_value(&pool).or_else(|| {
            let id = self.names.get(&place.name)?;
            self.pools.get_key_value(id)
        });
        if let Some((id, other)) = holder {
            let text = format!(
                "this node has a store of pool '{}' ({id}) already: store {} at {} {}",
                other.name,
                other.store,
                other.path.display(),
                other.stage.words()
            );
            return exists(text);
        }
        if let Some((id, other)) = self.at(&place.path) {
            let text = format!(
                "{}: pool '{}' ({id}) has its store there, which {}",
                place.path.display(),
                other.name,
                other.stage.words()
            );
            return exists(text);
        }
        self.names.insert(place.name.clone(), pool);
        self.pools.insert(pool, place);
        Ok(())
    }

    /// A store that was left out, of another pool with this name: no pool is made beside it, or both would be in each
    /// other's way when it comes back.
    pub(crate) fn left_out_name(&self, pool: PoolId, name: &str) -> Option<&LeftOut> {
        self.left_out
            .values()
            .find(|l| l.name.as_deref() == Some(name) && l.pool.is_some_and(|id| id != pool))
    }

    /// Sets how far the store of a pool is.
    pub(crate) fn set_stage(&mut self, pool: PoolId, stage: Stage) {
        if let Some(place) = self.pools.get_mut(&pool) {
            place.stage = stage;
        }
    }

    /// Gives id, name and path of a pool back.
    pub(crate) fn remove(&mut self, pool: PoolId) {
        if let Some(place) = self.pools.remove(&pool) {
            self.names.remove(&place.name);
        }
    }

    /// The stores left out, by path.
    pub(crate) fn left_out(&self) -> impl Iterator<Item = &LeftOut> {
        self.left_out.values()
    }

    /// The store left out at a path.
    pub(crate) fn left_out_at(&self, path: &Path) -> Option<&LeftOut> {
        self.left_out.get(path)
    }

    /// Puts a store on the list of those left out. Since when is kept from the last time. True when its reason is news.
    pub(crate) fn leave_out(&mut self, mut entry: LeftOut) -> bool {
        let before = self.left_out.get(&entry.path);
        let is_news = before.is_none_or(|b| b.reason != entry.reason);
        if let Some(before) = before {
            entry.since_unix_ms = before.since_unix_ms;
            // A device that does not answer any more is known by what it was.
            if entry.store.is_none() {
                entry.pool = before.pool;
                entry.name.clone_from(&before.name);
                entry.member = before.member;
                entry.store = before.store;
            }
        }
        self.left_out.insert(entry.path.clone(), entry);
        is_news
    }

    /// Takes a store off the list of those left out.
    pub(crate) fn take_in(&mut self, path: &Path) -> Option<LeftOut> {
        self.left_out.remove(path)
    }
}

/// A reservation, given back when it is dropped before the store is open.
pub(crate) struct Reservation {
    shared: Arc<Shared>,
    pool: PoolId,
}

impl Reservation {
    /// Reserves a place.
    pub(crate) fn take(shared: &Arc<Shared>, pool: PoolId, place: PoolPlace) -> Result<Self, ControlError> {
        shared.pools().reserve(pool, place)?;
        Ok(Self { shared: Arc::clone(shared), pool })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut pools = self.shared.pools();
        if pools.get(self.pool).is_some_and(|place| place.stage == Stage::Making) {
            pools.remove(self.pool);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::UnixMs;

    fn place(name: &str, path: &str) -> PoolPlace {
        PoolPlace {
            name: name.into(),
            store: StoreId::random(),
            path: path.into(),
            shard: 0,
            stage: Stage::Making,
        }
    }

    #[test]
    fn id_name_and_path_are_each_taken_once_and_given_back() {
        let mut places = Places::default();
        let (a, b) = (PoolId::random(), PoolId::random());
        places.reserve(a, place("vm-1", "/s/1")).unwrap();
        for (pool, other, words) in [
            (a, place("vm-2", "/s/2"), "already"),
            (b, place("vm-1", "/s/2"), &a.to_string()),
            (b, place("vm-2", "/s/1"), "has its store there"),
        ] {
            let error = places.reserve(pool, other).unwrap_err();
            assert!(error.code == ErrorCode::Exists && error.message.contains(words), "{error}");
        }
        places.remove(a);
        places.reserve(b, place("vm-1", "/s/1")).unwrap();
        assert_eq!(places.named("vm-1").map(|(id, _)| id), Some(b));
        assert_eq!(places.open_count(), 0, "it is being made");
        places.set_stage(b, Stage::Open);
        assert_eq!(places.open_count(), 1);
    }

    #[test]
    fn a_store_that_stays_left_out_keeps_what_is_known_of_it_and_since_when() {
        let mut places = Places::default();
        let store = StoreId::random();
        let entry = |reason: &str, store: Option<StoreId>, since| LeftOut {
            path: "/dev/vdb".into(),
            pool: store.map(|_| PoolId::from_bytes([1; 16])),
            name: store.map(|_| "vm-1".to_owned()),
            member: None,
            store,
            reason: reason.into(),
            closed: false,
            since_unix_ms: UnixMs(since),
            attempts: 1,
            next_attempt_s: None,
        };
        assert!(places.leave_out(entry("busy", Some(store), 1)));
        assert!(!places.leave_out(entry("busy", Some(store), 2)));
        assert!(places.leave_out(entry("it does not answer", None, 3)));
        let left = places.left_out_at(Path::new("/dev/vdb")).unwrap();
        assert_eq!(
            (left.store, left.since_unix_ms, left.name.as_deref()),
            (Some(store), UnixMs(1), Some("vm-1"))
        );
        assert!(places.left_out_name(PoolId::random(), "vm-1").is_some());
        assert!(places.left_out_name(PoolId::from_bytes([1; 16]), "vm-1").is_none());
    }
}
