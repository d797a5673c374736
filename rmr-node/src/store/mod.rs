//! Stand-in while the store module is on its own branch.

pub mod size;
