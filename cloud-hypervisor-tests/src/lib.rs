//! Whole-system tests, demonstration and benchmarks of the replicated disk.

pub mod bench;
