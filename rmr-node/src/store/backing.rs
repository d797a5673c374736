//! The device or file under a store: opened so that nobody else has it, and asked what it can do.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::{During, StoreError};
use crate::disk::{Medium, first_other, sys};

/// How much is zeroed at a time, so that progress can be told.
const ZERO_STEP: u64 = 256 << 20;

/// An open device or file that is locked against every other process.
#[derive(Debug)]
pub(super) struct Backing {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) medium: Medium,
    pub(super) size: u64,
}

impl Backing {
    /// Opens for reading and writing, exclusively.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, false)
    }

    /// As [`Backing::open`] for a regular file, which is created, empty, if it does not exist. A symbolic link is not followed.
    pub(super) fn open_or_create(path: &Path) -> Result<Self, StoreError> {
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_file() => Self::open_with(path, false),
            Ok(found) if found.is_symlink() => Err(StoreError::Link(path.to_owned())),
            Ok(_) => Err(StoreError::NotADisk(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::open_with(path, true),
            Err(error) => Err(error).during(path, "looking for it"),
        }
    }

    /// Opens for reading only, without a claim or a lock: other processes notice nothing.
    pub(super) fn look(path: &Path) -> Result<Self, StoreError> {
        let kind = fs::metadata(path).during(path, "opening")?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(StoreError::NotADisk(path.to_owned()));
        }
        let file = File::open(path).during(path, "opening")?;
        Self::with_file(path, file)
    }

    /// Whether it is still the file of this name: it may have been given another one between opening and locking.
    pub(super) fn is_at(&self, path: &Path) -> io::Result<bool> {
        let identity = |found: &fs::Metadata| (found.dev(), found.ino());
        match fs::metadata(path) {
            Ok(found) => Ok(identity(&found) == identity(&self.file.metadata()?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn open_with(path: &Path, create: bool) -> Result<Self, StoreError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(create).mode(0o600);
        if !create {
            let kind = fs::metadata(path).during(path, "opening")?.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                return Err(StoreError::NotADisk(path.to_owned()));
            }
            if kind.is_block_device() {
                // Without O_CREAT this claims a block device: it fails if a file system, MD, LVM or swap has it.
                options.custom_flags(libc::O_EXCL);
            } else if fs::symlink_metadata(path).is_ok_and(|found| found.is_file()) {
                // It cannot become a link between the two calls.
                options.custom_flags(libc::O_NOFOLLOW);
            }
        }
        let file = options.open(path).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => {
                let holder =
                    "the kernel holds it (mounted, swap, LVM, MD, device mapper) or another store's process";
                StoreError::Busy { path: path.to_owned(), holder }
            }
            _ => StoreError::Io { path: path.to_owned(), what: "opening", source },
        })?;
        if !sys::try_lock(&file, true).during(path, "locking")? {
            let holder = "another process holds its lock, an rmr-node as a rule";
            return Err(StoreError::Busy { path: path.to_owned(), holder });
        }
        Self::with_file(path, file)
    }

    /// Opens for reading only, without a claim or lock; true when somebody else holds the lock.
    pub(super) fn open_read_only(path: &Path) -> Result<(Self, bool), StoreError> {
        let kind = fs::metadata(path).during(path, "opening")?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(StoreError::NotADisk(path.to_owned()));
        }
        let file = File::open(path).during(path, "opening")?;
        let in_use = !sys::try_lock(&file, false).during(path, "asking for its lock")?;
        Ok((Self::with_file(path, file)?, in_use))
    }

    /// A file that is open and locked already.
    pub(super) fn with_file(path: &Path, mut file: File) -> Result<Self, StoreError> {
        let medium = Medium::of(&file).during(path, "asking what it is")?;
        let size = file.seek(SeekFrom::End(0)).during(path, "asking for its size")?;
        Ok(Self { path: path.to_owned(), file, medium, size })
    }

    /// Opens the device or file once more, for flushes of its own.
    pub(super) fn open_again(path: &Path, file: &File) -> io::Result<File> {
        // Without O_EXCL: this process has claimed a block device already.
        let again = OpenOptions::new().read(true).write(true).open(path)?;
        let identity = |found: &fs::Metadata| (found.dev(), found.ino(), found.rdev());
        if identity(&again.metadata()?) != identity(&file.metadata()?) {
            return Err(io::Error::other("another file has this name now"));
        }
        Ok(again)
    }

    /// Smallest write in bytes.
    pub(super) fn sector_size(&self) -> Result<u32, StoreError> {
        if self.medium == Medium::Memory {
            return Ok(1);
        }
        if let Some(found) =
            sys::direct_alignment(&self.file).during(&self.path, "asking for its sector size")?
        {
            return Ok(found.offset);
        }
        if self.medium != Medium::BlockDevice {
            return Ok(512);
        }
        let text =
            self.queue_attribute("logical_block_size").during(&self.path, "asking for its sector size")?;
        let parsed = text.parse().map_err(io::Error::other);
        parsed.during(&self.path, "understanding its sector size")
    }

    /// Whether completed writes are durable without a flush. What is in memory has nothing to flush to.
    pub(super) fn is_write_through(&self) -> bool {
        match self.medium {
            Medium::Memory => true,
            Medium::File => false,
            // When the kernel does not say, a cache has to be assumed.
            Medium::BlockDevice => {
                self.queue_attribute("write_cache").is_ok_and(|text| text == "write through")
            }
        }
    }

    /// Makes a range of a block device read as zeroes: by a command of the device that gives the space back, else the kernel
    /// writes them. Where there is no such command, nothing is written to what reads as zeroes already, so that a thin
    /// volume stays thin.
    pub(super) fn zero(
        &self,
        from: u64,
        to: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), StoreError> {
        let mut at = from;
        while at < to {
            let length = ZERO_STEP.min(to - at);
            let punched = sys::fallocate(&self.file, sys::PUNCH_HOLE, at, length);
            self.fill_with_zeroes(punched, at, at + length).during(&self.path, "writing zeroes")?;
            at += length;
            progress(at - from, to - from);
        }
        Ok(())
    }

    /// Writes zeroes to a step that could not be punched, from its first byte that is none.
    fn fill_with_zeroes(&self, punched: io::Result<()>, from: u64, to: u64) -> io::Result<()> {
        if punched.is_ok() {
            return Ok(());
        }
        match first_other(&self.file, from, to) {
            Some(at) => sys::fallocate(&self.file, sys::ZERO_RANGE, at, to - at),
            None => Ok(()),
        }
    }

    /// Makes the store durable.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_all().during(&self.path, "flushing")
    }

    /// Makes the name of a file durable.
    pub(super) fn sync_name(&self) -> Result<(), StoreError> {
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = File::open(parent).and_then(|directory| directory.sync_all());
        directory.during(&self.path, "flushing its directory")
    }

    /// An attribute of the device's request queue; a partition's queue is that of its disk.
    fn queue_attribute(&self, name: &str) -> io::Result<String> {
        let device = self.file.metadata()?.rdev();
        let base = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
        let mut text = String::new();
        File::open(format!("{base}/queue/{name}"))
            .or_else(|_| File::open(format!("{base}/../queue/{name}")))?
            .read_to_string(&mut text)?;
        Ok(text.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_device_that_cannot_be_punched_is_written_only_from_the_first_byte_that_is_no_zero() {
        let Some(device) = crate::disk::tests::LoopDevice::new(8 << 20) else { return };
        let backing = Backing::open(&device.path).unwrap();
        let refused = || Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        backing.fill_with_zeroes(refused(), 0, 8 << 20).unwrap();
        backing.sync().unwrap();
        assert_eq!(device.allocated(), 0, "a thin device stays thin");
        backing.file.write_all_at(&[7; 4096], 5 << 20).unwrap();
        backing.fill_with_zeroes(refused(), 0, 8 << 20).unwrap();
        backing.sync().unwrap();
        assert!((4096..=3 << 20).contains(&device.allocated()), "{} bytes", device.allocated());
        assert_eq!(first_other(&backing.file, 0, 8 << 20), None);
        backing.file.write_all_at(&[7; 4096], 5 << 20).unwrap();
        backing.zero(0, 8 << 20, &mut |_, _| ()).unwrap();
        backing.sync().unwrap();
        assert_eq!((device.allocated(), first_other(&backing.file, 0, 8 << 20)), (0, None));
    }
}
