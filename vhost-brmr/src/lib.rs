//! vhost-user-blk for one replicated disk: the daemon `vhost-brmr`, as a library so that all of it can be tested.
//!
//! ```text
//! daemon ─► event_loop ─┬─► frontend ──► device, memory, queue      messages of the hypervisor
//!                       └─► engine ──► request, flight, queue       the data path
//!                              └─► disk                             the seam to what stores the data
//! ```
//!
//! * [`daemon`], [`args`], [`config`], [`socket`] — the program around it.
//! * [`event_loop`] — one thread, one epoll set, one turn per wake-up.
//! * [`frontend`] — vhost-user messages; why not `vhost-user-backend`'s daemon is said there.
//! * [`engine`] — chains to requests, completions to used elements.
//! * [`request`] — parses descriptor chains; everything a hostile guest can do to them ends there.
//! * [`queue`] — one ring, its notifications and its faults.
//! * [`pace`] — whether the guest waits for each answer.
//! * [`flight`] — requests in flight. [`inflight`] — what the next daemon is told of them after a crash.
//! * [`memory`] — guest memory. [`dirty_log`] — which of it was written, for live migration. [`device`] — features and configuration space.
//! * [`disk`] — the seam. [`pool_disk`] — the pool behind it. [`testing`] — a disk in memory behind it, for tests.

pub mod args;
pub mod config;
pub mod daemon;
pub mod device;
pub mod dirty_log;
pub mod disk;
pub mod engine;
pub mod event_loop;
pub mod flight;
pub mod frontend;
pub mod inflight;
pub mod memory;
pub mod pace;
pub mod pool_disk;
pub mod queue;
pub mod request;
pub mod socket;
pub mod sys;
pub mod testing;
