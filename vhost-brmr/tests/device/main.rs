//! The device as a guest and its hypervisor see it, through a real socket and real rings.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used)] // helpers of tests fail as tests do
#![allow(clippy::cast_possible_truncation)] // patterns of bytes are made from counters

mod cost;
mod dirty_log;
mod front_end;
mod handover;
mod hostile;
mod listener;
mod program;
mod requests;
mod resize;
mod restart;
mod session;
mod support;
