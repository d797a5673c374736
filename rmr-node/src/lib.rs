//! The storage service of a replicated disk, and what its command line `rmrctl` is made of.
//!
//! * [`config`] — settings of `rmr-node`: file, flags, defaults, limits.
//! * [`lifecycle`] — start, readiness and graceful stop of the process.
//! * [`admin`] — the HTTP/JSON API that operators and `rmrctl` talk to.
//! * [`ctl`] — the commands of `rmrctl`.
//! * [`doctor`] — what this machine has, and what is missing for what.
//! * [`service`] — the running service: shards, connections, replicas.
//! * [`store`] — the on-disk format of a store, and its tools.
//! * [`disk`] — disk I/O and its buffers.

pub mod admin;
pub mod config;
pub mod ctl;
pub mod disk;
pub mod doctor;
pub mod lifecycle;
pub mod service;
pub mod store;
