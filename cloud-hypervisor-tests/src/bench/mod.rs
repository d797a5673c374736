//! Load and measurement: a load generator that behaves like a guest, a writer that remembers what it was promised,
//! and the comparison with what a user would run instead.
//!
//! * [`load`] — describe a load with a [`load::LoadSpec`], run it, get a [`load::Report`].
//! * [`verify`] — the memory of what was promised, and the check of what is read against it.
//! * [`disk`] — one virtio-blk disk on a vhost-user socket, seen from the guest's side.
//! * [`guest`] — a guest that outlives its daemon, and notes when it was kept waiting.
//! * [`processes`] — processor time, context switches and memory of the processes under load.
//! * [`systems`] — starts and stops the systems that are compared.
//! * [`compare`] — workloads, rounds, medians and bars of `make bench`.
//! * [`resync`] — what `make bench-resync` measures: what a resync moves, how long it takes, what the guest notices.
//! * [`size`] — sizes as people write them.
//! * [`histogram`] — latencies with a bounded relative error.

pub mod compare;
pub mod disk;
pub mod guest;
pub mod histogram;
pub mod load;
pub mod processes;
#[cfg(test)]
mod ram_disk;
pub mod resync;
mod ring;
pub mod size;
mod sys;
pub mod systems;
pub mod verify;
