//! Stores: the on-disk format of a pool's member, and everything that is done to one: create, open, grow,
//! inspect, destroy.
//! `docs/on-disk-format.md` describes the format byte by byte and argues why it survives crashes.

mod backing;
pub mod cli;
mod create;
mod destroy;
mod epoch;
mod error;
mod grow;
mod inspect;
mod layout;
mod open;
mod page;
mod signature;
mod size;
mod superblock;
mod writer;

pub use create::{CreateOptions, ZeroPolicy, remove_unfinished};
pub use error::StoreError;
pub use grow::Growth;
pub use inspect::{CopyReport, MapReport, Report};
pub use layout::{
    CHUNKS_PER_PAGE, DATA_ALIGNMENT, Layout, MapKind, PAGE_BITS_BYTES, PAGE_BYTES, PAGE_SIZE,
    SUPERBLOCK_OFFSETS,
};
pub use open::{MapPage, Maps, PageHealth, PageSource, Recovered, Store};
pub use page::{PageBits, PageError, full_page};
pub use signature::Signature;
pub use size::{ByteSize, SizeError};
pub use superblock::{
    ClientRecord, FORMAT_VERSION, InvalidSuperblock, MAX_CLIENT_NAME, Superblock, SuperblockError,
    fit_client_name,
};
pub use writer::{MetadataIo, MetadataWriter, Ticket, WriterFailed};

#[cfg(test)]
pub(crate) mod tests;
