//! A disk as an engine sees it: an open file or block device, its size, what I/O must be aligned to, and how its ranges
//! are made zero. Which of several ways to zero a range works is found by trying, once per disk.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;

use libc::c_int;
use rmr_common::buffer::Segment;
use serde::Serialize;

use super::{DiskError, Io, sys};

/// What a disk is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Medium {
    /// A block device.
    BlockDevice,
    /// A file on a disk.
    File,
    /// A file in memory (tmpfs, ramfs): gone with the machine.
    Memory,
}

impl Medium {
    /// What this open file lies on.
    ///
    /// # Errors
    /// When the kernel does not say, or it is neither a block device nor a regular file.
    pub fn of(file: &File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if kind.is_block_device() {
            return Ok(Self::BlockDevice);
        }
        if !kind.is_file() {
            let text = "neither a block device nor a regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        match sys::file_system_magic(file)? {
            sys::TMPFS_MAGIC | sys::RAMFS_MAGIC => Ok(Self::Memory),
            _ => Ok(Self::File),
        }
    }
}

impl std::fmt::Display for Medium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BlockDevice => "block device",
            Self::File => "file",
            Self::Memory => "file in memory",
        })
    }
}

/// A disk that is ready for an engine.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    /// Another open file description of the same, and the one that holds the store's lock.
    metadata: Option<(File, File)>,
    size: u64,
    medium: Medium,
    direct: bool,
    offset_alignment: u32,
    memory_alignment: u32,
    can_punch: Cell<bool>,
    can_zero: Cell<bool>,
}

impl DiskFile {
    /// Prepares an open file of `size` bytes: direct I/O where there is such a thing. A file system without it is used
    /// through the page cache, with a warning in the log.
    ///
    /// # Errors
    /// When the file cannot be asked what it is.
    pub fn new(file: File, size: u64) -> io::Result<Self> {
        let medium = Medium::of(&file)?;
        let mut direct = false;
        // Memory has nothing to bypass.
        if medium != Medium::Memory {
            match sys::set_direct(&file) {
                Ok(()) => direct = true,
                Err(error) => tracing::warn!(
                    "no direct I/O here ({error}); going through the page cache costs a copy and hides I/O errors until a flush"
                ),
            }
        }
        let alignment = if direct { sys::direct_alignment(&file)? } else { None };
        let (memory_alignment, offset_alignment) = match (direct, alignment) {
            (false, _) => (1, 1),
            (true, Some(found)) => (found.memory.max(1), found.offset),
            // A kernel before 6.1 does not tell; 512 is right for nearly all, and the kernel refuses what is not.
            (true, None) => (512, 512),
        };
        let (can_punch, can_zero) = (Cell::new(true), Cell::new(true));
        let metadata = None;
        Ok(Self {
            file,
            metadata,
            size,
            medium,
            direct,
            offset_alignment,
            memory_alignment,
            can_punch,
            can_zero,
        })
    }

    /// Gives the disk another open file description, `metadata`, for `IoKind::FlushMetadata`. The kernel reports a failed
    /// write-back once for each description, so one that both kinds of flush shared would tell only one of them. `lock` is kept
    /// open for as long as the disk.
    #[must_use]
    pub fn with_metadata(self, metadata: File, lock: File) -> Self {
        Self { metadata: Some((metadata, lock)), ..self }
    }

    /// Size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// It has become larger.
    pub(super) const fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    /// What it is made of.
    #[must_use]
    pub const fn medium(&self) -> Medium {
        self.medium
    }

    /// Whether I/O bypasses the page cache.
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        self.direct
    }

    /// What offsets and lengths must be multiples of, in bytes.
    #[must_use]
    pub const fn alignment(&self) -> u32 {
        self.offset_alignment
    }

    /// Whether space can be given back, as far as it was tried.
    #[must_use]
    pub const fn punches_holes(&self) -> bool {
        self.can_punch.get()
    }

    /// Whether ranges are made zero without writing zeroes, as far as it was tried.
    #[must_use]
    pub const fn zeroes_ranges(&self) -> bool {
        self.can_zero.get()
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// What data, metadata and the lock go through.
    #[cfg(test)]
    pub(crate) fn descriptions(&self) -> Vec<&File> {
        let (metadata, lock) = self.metadata.as_ref().expect("a store has them");
        vec![&self.file, metadata, lock]
    }

    /// What a flush of metadata goes through.
    pub(super) fn metadata_file(&self) -> &File {
        self.metadata.as_ref().map_or(&self.file, |(metadata, _)| metadata)
    }

    /// A flush failed. What the page cache still has of it is not on the disk, and counts as written: it must not be read again.
    pub(super) fn forget_unwritten(&self) {
        if !self.direct
            && self.medium != Medium::Memory
            && let Err(error) = sys::forget_pages(&self.file)
        {
            tracing::warn!("the page cache keeps what a failed flush did not write: {error}");
        }
    }

    /// Whether the request is one that this disk can be asked.
    pub(super) fn check(&self, io: &Io) -> Result<(), DiskError> {
        let (offset, length) = (io.offset, io.length);
        if io.kind.is_flush() {
            return Ok(());
        }
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(DiskError::OutOfRange { offset, length, size: self.size });
        }
        let found = io.payload.length();
        if io.kind.has_payload() && found != length {
            return Err(DiskError::PayloadLength { expected: length, found });
        }
        let alignment = self.offset_alignment;
        if !(offset | length).is_multiple_of(u64::from(alignment)) {
            return Err(DiskError::Misaligned { offset, length, alignment });
        }
        Ok(())
    }

    /// Whether direct I/O takes this memory.
    pub(super) fn check_memory(&self, io: &Io, segments: &[Segment]) -> Result<(), DiskError> {
        let (alignment, mask) = (self.memory_alignment, self.memory_alignment as usize - 1);
        let pieces = self.offset_alignment as usize - 1;
        let aligned = |s: &Segment| (s.base() as usize) & mask == 0 && s.length() & pieces == 0;
        if segments.iter().all(aligned) {
            return Ok(());
        }
        let alignment = alignment.max(self.offset_alignment);
        Err(DiskError::Misaligned { offset: io.offset, length: io.length, alignment })
    }

    /// Notes when `fallocate` does not know this mode here: it is not tried on this disk again.
    pub(super) fn note_unsupported(&self, mode: c_int, errno: i32) {
        if matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) {
            let which = if mode == sys::PUNCH_HOLE { &self.can_punch } else { &self.can_zero };
            which.set(false);
        }
    }

    /// Takes `fallocate` for unknown here, as on a disk that has no such thing.
    #[cfg(test)]
    pub(super) fn without(self, punch: bool, zero_range: bool) -> Self {
        self.can_punch.set(!punch);
        self.can_zero.set(!zero_range);
        self
    }
}
