//! A real node and its clients over real sockets: well-behaved ones, and peers that break every rule.

mod clients;
mod disks;
mod flushes;
mod memory;
mod stop;
mod stores;
mod strangers;
mod support;
