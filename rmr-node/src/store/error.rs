//! Why something cannot be done to a store, in words for an operator.

use std::io;
use std::path::{Path, PathBuf};

use rmr_common::pool::{Epoch, PoolId};
use thiserror::Error;

use super::signature::Signature;
use super::size::ByteSize;
use super::superblock::{InvalidSuperblock, SuperblockError};

/// Why something cannot be done to a store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// The device or file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What came of it.
        source: io::Error,
    },
    /// The path is a directory, a character device or the like.
    #[error("{}: neither a block device nor a regular file", .0.display())]
    NotADisk(PathBuf),
    /// A file was to be made at a symbolic link.
    #[error("{}: a symbolic link, which is not followed where a file is made: name the file that is meant", .0.display())]
    Link(PathBuf),
    /// A file was to be made among device nodes, whose file system is in memory.
    #[error("{}: there is no such device, and no file is made below /dev: it would be in memory, and gone at the next boot", .0.display())]
    NoSuchDevice(PathBuf),
    /// Somebody else uses it.
    #[error("{}: in use: {holder}", path.display())]
    Busy {
        /// The device or file.
        path: PathBuf,
        /// Who uses it, as far as is known.
        holder: &'static str,
    },
    /// There is something on it already.
    #[error("{}: refusing to overwrite what is there: {}. If it may be lost for ever, say so with --overwrite", path.display(), list(found))]
    Occupied {
        /// The device or file.
        path: PathBuf,
        /// All that was recognised.
        found: Vec<Signature>,
    },
    /// The file has data of no known kind.
    #[error("{}: the file holds data; if it may be lost for ever, say so with --overwrite", .0.display())]
    FileHasData(PathBuf),
    /// It was said to read as zeroes, and does not.
    #[error("{}: said to read as zeroes, and holds {}: have it zeroed instead", path.display(), list(found))]
    NotZero {
        /// The device or file.
        path: PathBuf,
        /// What was recognised.
        found: Vec<Signature>,
    },
    /// It was said to read as zeroes, and has data of no known kind.
    #[error("{}: said to read as zeroes, and has data at byte {offset}, which the new pool would be served: leave --assume-zero out, and it is zeroed", path.display())]
    HasData {
        /// The device.
        path: PathBuf,
        /// Where the first byte is that is not zero.
        offset: u64,
    },
    /// It is smaller than the store that is, or is to be, on it.
    #[error("{}: has {}, the store needs {} ({} bytes)", path.display(), ByteSize(*found), ByteSize(*needed), needed)]
    TooSmall {
        /// The device or file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size that is needed in bytes.
        needed: u64,
    },
    /// Its maps are too small for what the pool is to become.
    #[error("{}: can hold a pool of at most {} ({largest} bytes), for which its maps were made, and the pool is to have {} ({wanted} bytes): replace this member with a store that is created with a larger maximum", path.display(), ByteSize(*largest), ByteSize(*wanted))]
    NoMapRoom {
        /// The device or file.
        path: PathBuf,
        /// The size that the pool is to have, in bytes.
        wanted: u64,
        /// The largest pool that it can hold, in bytes.
        largest: u64,
    },
    /// It cannot write as little as a guest may write.
    #[error("{}: writes sectors of {found} bytes, and the pool has logical blocks of {expected}: create the pool with --block-size {found}", path.display())]
    SectorSize {
        /// The device or file.
        path: PathBuf,
        /// Its sector size in bytes.
        found: u32,
        /// The pool's logical block size in bytes.
        expected: u32,
    },
    /// What was asked to be stored is not valid.
    #[error("{}: {source}", path.display())]
    Invalid {
        /// The device or file.
        path: PathBuf,
        /// What is wrong with it.
        source: InvalidSuperblock,
    },
    /// Neither superblock copy can be believed.
    #[error("{}: no store can be opened here. Superblock copy 0: {}. Copy 1: {}", path.display(), copies[0], copies[1])]
    NoSuperblock {
        /// The device or file.
        path: PathBuf,
        /// What is wrong with each copy.
        copies: Box<[SuperblockError; 2]>,
    },
    /// The store is in a format that only newer programs know.
    #[error("{}: {source}", path.display())]
    NewerFormat {
        /// The device or file.
        path: PathBuf,
        /// Which format.
        source: SuperblockError,
    },
    /// The two superblock copies are of different stores.
    #[error("{}: its two superblock copies are of different stores: part of it was overwritten by another store", .0.display())]
    TwoStores(PathBuf),
    /// An epoch that is to be taken back is not above the one that is to follow.
    #[error("{}: the newest epoch accepted is {found}, which is not above {wanted}: nothing is to be taken back", path.display())]
    EpochNotLower {
        /// The device or file.
        path: PathBuf,
        /// The epoch that was to be put in its place.
        wanted: Epoch,
        /// The epoch that the store has.
        found: Epoch,
    },
    /// The store belongs to another pool.
    #[error("{}: belongs to pool '{name}' ({found}), not to pool {expected}", path.display())]
    WrongPool {
        /// The device or file.
        path: PathBuf,
        /// The pool that was expected.
        expected: PoolId,
        /// The pool that it belongs to.
        found: PoolId,
        /// That pool's name.
        name: String,
    },
}

fn list(found: &[Signature]) -> String {
    let texts: Vec<String> = found.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

/// Adds to an I/O error which path it was and what was tried.
pub(super) trait During<T> {
    fn during(self, path: &Path, what: &'static str) -> Result<T, StoreError>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, path: &Path, what: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io { path: path.to_owned(), what, source })
    }
}
