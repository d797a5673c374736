//! Storage service of a replicated disk.

pub mod disk;
pub mod store;
