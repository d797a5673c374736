//! Who may connect to a pool with a key: the directory of the keys, and the handshake of connections that others open.
//!
//! Key files are read anew for each connection, so that keys are put there, changed and taken away while the node runs.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rmr_common::auth::{Admitted, Denial, Gate, KeyRing, Nonce};
use rmr_common::pool::PoolId;
use rmr_common::replica::ConnectionId;
use rmr_common::throttle::Withheld;
use rmr_common::transport::Connection;
use rmr_common::wire::{Hello, Kind, MessageHeader, Status};

use super::connection::Greeting;
use super::shard::Shard;
use crate::admin::api::{Authentication, AuthenticationFailures};
use crate::config::KeysConfig;

/// Failed attempts are logged one by one, but those of one kind not more often.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// The keys of the node's pools, and what failed.
pub(crate) struct Keys {
    config: KeysConfig,
    denied: [AtomicU64; Denial::ALL.len()],
    logged: Mutex<[Logged; Denial::ALL.len()]>,
}

#[derive(Default)]
struct Logged {
    at: Option<Instant>,
    /// Attempts that failed since, and are not in the log.
    withheld: u64,
}

impl Keys {
    pub(super) fn new(config: KeysConfig) -> Self {
        Self { config, denied: Default::default(), logged: Mutex::default() }
    }

    /// The keys of a pool; none where it has none.
    ///
    /// # Errors
    /// In words: there is a key that cannot be used, or has to be one and there is none.
    pub(super) fn of(&self, pool: PoolId, name: &str) -> Result<KeyRing, String> {
        let keys = match &self.config.directory {
            None => KeyRing::default(),
            Some(directory) => {
                KeyRing::from_directory(directory, pool, name).map_err(|error| error.to_string())?
            }
        };
        if keys.is_empty() && self.config.required {
            return Err("keys.required is set, and there is no key for this pool".to_owned());
        }
        Ok(keys)
    }

    /// What operators are told of a pool's keys, and the fingerprints of these.
    pub(super) fn authentication(&self, pool: PoolId, name: &str) -> (Authentication, Vec<String>) {
        match self.of(pool, name) {
            Ok(keys) => {
                let state = match keys.len() {
                    0 => Authentication::None,
                    1 => Authentication::Key,
                    _ => Authentication::Rotating,
                };
                (state, keys.fingerprints(pool))
            }
            Err(reason) => (Authentication::Unusable { reason }, Vec::new()),
        }
    }

    /// Attempts that failed since the node was started.
    pub(super) fn failures(&self) -> AuthenticationFailures {
        let count = |denial: Denial| self.denied[denial as usize].load(Ordering::Relaxed);
        AuthenticationFailures {
            missing: count(Denial::KeyRequired),
            wrong: count(Denial::WrongKey),
            no_key_here: count(Denial::NoKey),
            unusable_here: count(Denial::Unusable),
        }
    }

    /// Counts an attempt that failed. Returns the number of earlier ones that the log does not have, if this one is logged; else
    /// `None`.
    fn note(&self, denial: Denial) -> Option<Withheld> {
        self.denied[denial as usize].fetch_add(1, Ordering::Relaxed);
        let mut logged = self.logged.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let logged = &mut logged[denial as usize];
        if logged.at.is_some_and(|at| at.elapsed() < LOG_INTERVAL) {
            logged.withheld += 1;
            return None;
        }
        logged.at = Some(Instant::now());
        Some(Some(std::mem::take(&mut logged.withheld)).filter(|&count| count > 0))
    }
}

/// A connection whose opener has been asked for a proof.
pub(super) struct Challenged {
    gate: Gate,
    pool: PoolId,
    header: MessageHeader,
    hello: Hello,
}

impl Shard {
    /// Answers a hello for a pool of this shard: at once, or with a challenge if the pool has a key.
    pub(super) fn greet_here(&mut self, id: ConnectionId, greeting: &Greeting, hello: Hello, pool: PoolId) {
        let header = greeting.header;
        let Some((_, member)) = self.member_at(pool) else {
            return self.refuse(
                id,
                &header,
                Status::Stopping,
                "the store of the pool is being closed".to_owned(),
            );
        };
        if let Err(text) = member.replica.greet(&hello) {
            return self.refuse(id, &header, Status::Version, text);
        }
        let name = member.replica.spec().name.clone();
        let place = (member.replica.member(), member.store.superblock().store);
        let unusable = |reason: String| {
            tracing::debug!(pool = %name, "{reason}");
            (Denial::Unusable, reason)
        };
        let plain = |denial: Denial| (denial, denial.to_string());
        let opened = self.shared().keys.of(pool, &name).map_err(unusable).and_then(|keys| {
            let nonce = Nonce::random().map_err(|error| (Denial::Unusable, error.to_string()))?;
            Gate::open(keys, nonce, pool, place, &greeting.body, hello.nonce.is_some()).map_err(plain)
        });
        match opened {
            Ok(None) => self.welcome(id, &header, &hello, pool, None),
            Ok(Some((gate, body))) => {
                let mut challenge = header.reply(Kind::Challenge, Status::Ok);
                challenge.pool = pool;
                challenge.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
                if let Some(peer) = self.peer_mut(id) {
                    peer.challenged = Some(Box::new(Challenged { gate, pool, header, hello }));
                }
                self.send_body(id, &challenge, body);
            }
            Err((denial, reason)) => self.deny(id, &header, &name, &hello, denial, &reason),
        }
    }

    /// Takes the proof of a connection that was challenged.
    pub(super) fn prove(&mut self, id: ConnectionId, body: &[u8]) {
        let Some(challenged) = self.peer_mut(id).and_then(|peer| peer.challenged.take()) else { return };
        let Challenged { gate, pool, header, hello } = *challenged;
        match gate.check(body) {
            Ok(admitted) => self.welcome(id, &header, &hello, pool, Some(&admitted)),
            Err(denial) => {
                let name = self.member_at(pool).map(|(_, m)| m.replica.spec().name.clone());
                let name = name.unwrap_or_else(|| pool.to_string());
                self.deny(id, &header, &name, &hello, denial, &denial.to_string());
            }
        }
    }

    /// Lets a connection in.
    fn welcome(
        &mut self,
        id: ConnectionId,
        header: &MessageHeader,
        hello: &Hello,
        pool: PoolId,
        admitted: Option<&Admitted>,
    ) {
        let Some((index, member)) = self.member_at(pool) else {
            return self.refuse(
                id,
                header,
                Status::Stopping,
                "the store of the pool is being closed".to_owned(),
            );
        };
        let mut reply = match member.replica.greet(hello) {
            Ok(reply) => reply,
            Err(text) => return self.refuse(id, header, Status::Version, text),
        };
        let share = self.share();
        let Some(peer) = self.peer_mut(id) else { return };
        reply.limits.max_io = reply.limits.max_io.min(peer.wire.max_io());
        if peer.wire.is_rdma() {
            let share = u32::try_from(share / 2).unwrap_or(u32::MAX);
            reply.limits.max_bytes = reply.limits.max_bytes.min(share);
        }
        peer.member = Some(index);
        peer.role = hello.role;
        let mut body = reply.encode();
        if let Some(admitted) = admitted {
            body = admitted.seal(body);
        }
        let mut answer = header.reply(Kind::HelloReply, Status::Ok);
        answer.pool = pool;
        answer.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.send_body(id, &answer, body);
    }

    /// Turns somebody away who has no key, another one, or one for nothing.
    fn deny(
        &mut self,
        id: ConnectionId,
        header: &MessageHeader,
        pool: &str,
        hello: &Hello,
        denial: Denial,
        reason: &str,
    ) {
        let address = self.peer_mut(id).map(|peer| peer.address);
        if let (Some(withheld), Some(address)) = (self.shared().keys.note(denial), address) {
            tracing::warn!(
                pool, client = %address, withheld,
                "not let in: {reason}; it says that it is '{}'", hello.description
            );
        }
        let text = format!("node {}: {denial}", self.shared().config.node_name);
        self.turn_away(id, header, denial.status(), text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_attempts_in_a_row_one_is_logged_and_all_are_counted() {
        let keys = Keys::new(KeysConfig { directory: None, required: false });
        assert_eq!(keys.note(Denial::WrongKey), Some(None));
        assert!((0..9).all(|_| keys.note(Denial::WrongKey).is_none()));
        assert_eq!((keys.failures().wrong, keys.failures().missing), (10, 0));
        // One of another kind is not hidden by them.
        assert_eq!(keys.note(Denial::KeyRequired), Some(None));
        keys.logged.lock().unwrap()[Denial::WrongKey as usize].at = Instant::now().checked_sub(LOG_INTERVAL);
        assert_eq!(keys.note(Denial::WrongKey), Some(Some(9)));
        assert_eq!((keys.failures().wrong, keys.failures().missing), (11, 1));
    }

    #[test]
    fn a_node_that_requires_keys_has_no_pool_without_one() {
        let directory = tempfile::tempdir().unwrap();
        let keys =
            |required| Keys::new(KeysConfig { directory: Some(directory.path().to_owned()), required });
        assert_eq!(keys(false).authentication(PoolId::random(), "vm-1").0, Authentication::None);
        let (unusable, _) = keys(true).authentication(PoolId::random(), "vm-1");
        assert!(matches!(unusable, Authentication::Unusable { .. }), "{unusable:?}");
    }
}
