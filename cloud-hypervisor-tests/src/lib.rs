//! Whole-system tests, demonstration and benchmarks of the replicated disk: real processes, real guests, one machine.
//!
//! * [`lab`] — what the tests in `tests/` are written with: nodes, pools, daemons, guests.
//! * [`scenario`] — whole-system scenarios that run on TCP and, inside a guest, on verbs.
//! * [`mod@bench`] — load generator, verifying writer, and the comparison with what a user would pick instead.

pub mod bench;
pub mod lab;
pub mod scenario;
