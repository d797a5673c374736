//! Whole-system tests of the replicated disk: real processes, real guests, one machine.
//!
//! [`lab`] is the library that the tests in `tests/` are written with.

pub mod lab;
