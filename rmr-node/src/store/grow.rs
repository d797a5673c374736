//! Makes room for a larger pool in a store that is in use. Only the room: that the pool is larger is written to the
//! superblock afterwards, together with the view that says so.

use std::fs::File;
use std::path::{Path, PathBuf};

use rmr_common::pool::ChunkSize;

use super::backing::Backing;
use super::error::{During, StoreError};
use super::layout::Layout;
use crate::disk::Medium;

/// Work on one store, to be done on a thread that may wait for the device. At most one may be under way for a store: one
/// that is late would zero what has become data since.
#[derive(Debug)]
pub struct Growth {
    path: PathBuf,
    file: File,
    layout: Layout,
    from: u64,
    to: u64,
}

impl Growth {
    /// Checks what can be checked at once.
    pub(super) fn new(
        path: &Path,
        file: &File,
        layout: Layout,
        chunk_size: ChunkSize,
        from: u64,
        to: u64,
    ) -> Result<Self, StoreError> {
        if layout.chunk_capacity() < chunk_size.count(to) {
            let largest = layout.largest_pool(chunk_size);
            return Err(StoreError::NoMapRoom { path: path.to_owned(), wanted: to, largest });
        }
        let file = file.try_clone().during(path, "preparing to grow")?;
        Ok(Self { path: path.to_owned(), file, layout, from, to })
    }

    /// Makes the room, durable and reading as zeroes, and gives the new size of the device or file. Repeating it after a
    /// failure or a crash is safe. A device that cannot zero itself is written, which takes its time.
    ///
    /// # Errors
    /// When a device is too small, a file system refuses, or on an I/O error. The store is as it was, perhaps on a larger file.
    pub fn run(self) -> Result<u64, StoreError> {
        let backing = Backing::with_file(&self.path, self.file)?;
        let (end, needed) = (self.layout.store_size(self.from), self.layout.store_size(self.to));
        if needed <= end {
            return Ok(backing.size);
        }
        let size = match backing.medium {
            Medium::BlockDevice if backing.size < needed => {
                let (path, found) = (self.path, backing.size);
                return Err(StoreError::TooSmall { path, found, needed });
            }
            Medium::BlockDevice => {
                backing.zero(end, needed, &mut |_, _| ())?;
                backing.size
            }
            Medium::File | Medium::Memory => {
                let size = backing.size.max(needed);
                // What lies behind the end of the store came from somewhere else. Cut off, it comes back as a hole.
                let cut = backing.file.set_len(end).and_then(|()| backing.file.set_len(size));
                cut.during(&self.path, "extending the file")?;
                size
            }
        };
        backing.sync()?;
        Ok(size)
    }
}
