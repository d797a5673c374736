//! RMR, *reliable multicast replication*: the protocol and client library of a replicated disk.
//!
//! A **pool** is one replicated disk. Its **members** are stores on nodes; a **leg** is a client's connection to
//! one member. A write goes once, in one hop, to every leg. The crate knows offsets, lengths and scatter/gather
//! lists, and nothing of virtio: a disk daemon, an object store or a log may all stand on it.
//!
//! * [`auth`] — how both sides of a connection prove that they know the key of a pool.
//! * [`wire`] — message layouts, byte by byte (`docs/protocol.md`).
//! * [`pool`] — identities, the pool specification, views and their legal steps.
//! * [`map`] — dirty and intent maps.
//! * [`client`] — the coordinator and data path of a pool, a state machine without I/O.
//! * [`replica`] — one member's protocol behaviour, a state machine without I/O.
//! * [`text`] — words of strangers, made fit for logs and terminals.
//! * [`transport`] — bindings of the message set to TCP and to an in-memory network.

/// Whether a deliberate mistake is made here, for the simulator to find; see `mutants`.
#[cfg(feature = "mutants")]
macro_rules! mutant {
    ($name:ident) => {
        $crate::mutants::is_active($crate::mutants::Mutant::$name)
    };
}

#[cfg(not(feature = "mutants"))]
macro_rules! mutant {
    ($name:ident) => {
        false
    };
}

// Files that tests of other crates share name this crate as those do.
#[cfg(test)]
extern crate self as rmr_common;

pub mod auth;
pub mod buffer;
pub mod client;
pub mod clock;
pub mod driver;
pub mod map;
#[cfg(feature = "mutants")]
pub mod mutants;
pub mod pool;
pub mod reactor;
pub mod replica;
pub mod sim;
pub mod text;
pub mod throttle;
pub mod time;
pub mod transport;
pub mod wire;
pub mod words;
