//! Creates a store on a device or file, after making sure that nobody's data is there.

use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rmr_common::pool::{Attested, Mark, MemberId, PoolSpec, StoreId, View};

use super::backing::Backing;
use super::error::{During, StoreError};
use super::layout::{Layout, MapKind, PAGE_BITS_BYTES, SUPERBLOCK_OFFSETS};
use super::page::{encode_page, slot_of};
use super::signature::scan;
use super::superblock::{InvalidSuperblock, Superblock};
use crate::disk::{Medium, sys};

/// Maps are made this many times larger than the pool needs, so that it can grow. Costs 18 bytes per spare 8 chunks.
const GROWTH: u64 = 8;
/// This much is cleared at both ends of a device, where other formats keep what they are found by.
const EDGE: u64 = 1 << 20;

/// How much of a device is read at a time where it is said to read as zeroes.
const CHECK_STEP: usize = 1 << 20;

/// What the name of a file that is not a store yet ends with.
const UNFINISHED: &str = ".rmr-unfinished";

/// How the data area comes to read as zeroes, as it must on all members alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ZeroPolicy {
    /// Make it so. Free for a file; a device without a command for it is written in full.
    #[default]
    Zero,
    /// The operator vouches that the device reads as zeroes, e.g. a new thin volume.
    AssumeZero,
    /// Somebody says that the device reads as zeroes, and it is read to make sure: over the network anybody may say so, and
    /// would be served what an earlier store has left.
    Check,
}

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The pool.
    pub spec: PoolSpec,
    /// Which member of it the store will be.
    pub member: MemberId,
    /// The new store's identity, as the specification lists it.
    pub store: StoreId,
    /// The view to begin with.
    pub view: View,
    /// Whether what is there may be destroyed.
    pub overwrite: bool,
    /// How the data area comes to read as zeroes.
    pub zero: ZeroPolicy,
    /// The pool size up to which the store can grow, in bytes; `None` for eight times the pool's size.
    pub max_size: Option<u64>,
}

/// Creates the store. `progress` is told how many bytes of how many are zeroed.
///
/// # Errors
/// When anything recognisable, or any data in a file, is there already and `overwrite` is not set; when somebody uses the
/// device, when it is too small or its sectors are too large, when the options contradict one another, or on an I/O
/// error. Until the very last step nothing that can be taken for a store is on the device.
pub(super) fn create(
    path: &Path,
    options: &CreateOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Superblock, StoreError> {
    let mut superblock =
        plan(options).map_err(|source| StoreError::Invalid { path: path.to_owned(), source })?;
    let needed = superblock.layout.store_size(options.spec.size);
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => {
            // Names below /dev/disk are links to devices. A file behind a link may be anybody's.
            if !std::fs::metadata(path).is_ok_and(|target| target.file_type().is_block_device()) {
                return Err(StoreError::Link(path.to_owned()));
            }
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if is_among_devices(path).during(path, "looking for its directory")? {
                return Err(StoreError::NoSuchDevice(path.to_owned()));
            }
            create_file(path, options, &mut superblock, needed)?;
            return Ok(superblock);
        }
        Err(error) => return Err(error).during(path, "looking for it"),
    }
    let mut backing = Backing::open(path)?;
    prepare(&mut backing, options, needed)?;
    write(&backing, &mut superblock, options.zero, progress)?;
    Ok(superblock)
}

/// Whether a new file at this path would lie in the file system of device nodes.
fn is_among_devices(path: &Path) -> io::Result<bool> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = std::fs::canonicalize(parent)?;
    // Another file system is mounted at /dev/shm, and files may be made there.
    Ok(parent.starts_with("/dev") && parent.metadata()?.dev() == Path::new("/dev").metadata()?.dev())
}

/// Makes a new file. It has its name when it is complete: what a crash leaves is of no use, and in nobody's way.
fn create_file(
    path: &Path,
    options: &CreateOptions,
    superblock: &mut Superblock,
    needed: u64,
) -> Result<(), StoreError> {
    let unfinished = unfinished(path);
    let mut backing = Backing::open_or_create(&unfinished)?;
    let is_ours = backing.is_at(&unfinished).during(path, "looking for it")? && !path.exists();
    if !is_ours {
        let holder = "another process has made it just now";
        return Err(StoreError::Busy { path: path.to_owned(), holder });
    }
    path.clone_into(&mut backing.path);
    let emptied = backing.file.set_len(0).during(path, "emptying the file");
    backing.size = 0;
    let made = emptied
        .and_then(|()| prepare(&mut backing, options, needed))
        .and_then(|()| write(&backing, superblock, options.zero, &mut |_, _| ()))
        .and_then(|()| std::fs::rename(&unfinished, path).during(path, "giving it its name"))
        .and_then(|()| {
            // A name that may not last is taken back: whoever is told of the error tries again.
            backing.sync_name().inspect_err(|_| drop(std::fs::remove_file(path)))
        });
    if made.is_err() {
        // That it cannot be removed matters less than why it was not made, and the next one made there empties it.
        let _ = std::fs::remove_file(&unfinished);
    }
    made
}

/// The name of a file that is to become this store.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    PathBuf::from(name)
}

/// Removes what creations that were cut short have left in a directory, unless somebody is at it. Returns what was removed.
///
/// # Errors
/// When the directory cannot be read.
pub fn remove_unfinished(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let is_unfinished = path.as_os_str().as_encoded_bytes().ends_with(UNFINISHED.as_bytes());
        if is_unfinished && Backing::open(&path).is_ok() && std::fs::remove_file(&path).is_ok() {
            removed.push(path);
        }
    }
    Ok(removed)
}

fn plan(options: &CreateOptions) -> Result<Superblock, InvalidSuperblock> {
    options.spec.validate()?;
    let (size, chunk_size) = (options.spec.size, options.spec.chunk_size);
    let largest = options.max_size.unwrap_or(size.saturating_mul(GROWTH).min(1 << 50)).max(size);
    let (room, needed) = (0, chunk_size.count(largest));
    let layout = Layout::for_chunks(needed).ok_or(InvalidSuperblock::MapRoom { room, needed })?;
    let superblock = Superblock {
        mark: Mark(0),
        attested: Attested::default(),
        spec: options.spec.clone(),
        member: options.member,
        store: options.store,
        epoch: options.view.epoch,
        view: options.view.clone(),
        client: None,
        clean_shutdown: true,
        write_through: false,
        flush_failed: false,
        created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        layout,
    };
    superblock.validate()?;
    Ok(superblock)
}

/// Makes sure that the device may be used and is large enough.
fn prepare(backing: &mut Backing, options: &CreateOptions, needed: u64) -> Result<(), StoreError> {
    let path = || backing.path.clone();
    let (found, expected) = (backing.sector_size()?, options.spec.logical_block_size);
    if found > expected {
        return Err(StoreError::SectorSize { path: path(), found, expected });
    }
    let found = scan(&backing.file, backing.size).during(&backing.path, "looking for what is there")?;
    if !found.is_empty() && !options.overwrite {
        return Err(StoreError::Occupied { path: path(), found });
    }
    if backing.medium == Medium::BlockDevice {
        if !found.is_empty() && options.zero != ZeroPolicy::Zero {
            return Err(StoreError::NotZero { path: path(), found });
        }
    } else {
        let has_data = sys::has_data(&backing.file).during(&backing.path, "looking for data")?;
        if has_data && !options.overwrite {
            return Err(StoreError::FileHasData(path()));
        }
        if backing.size == 0 {
            backing.file.set_len(needed).during(&backing.path, "setting its size")?;
            backing.size = needed;
        }
    }
    if backing.size < needed {
        return Err(StoreError::TooSmall { path: path(), found: backing.size, needed });
    }
    Ok(())
}

/// Reads a device from a byte on, all of it: what lies behind the pool is served when the pool has grown.
fn check_zeroes(backing: &Backing, from: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<(), StoreError> {
    let mut part = vec![0; CHECK_STEP];
    let mut at = from;
    while at < backing.size {
        let length = usize::try_from(backing.size - at).unwrap_or(CHECK_STEP).min(CHECK_STEP);
        let part = &mut part[..length];
        backing.file.read_exact_at(part, at).during(&backing.path, "looking for data")?;
        if let Some(index) = part.iter().position(|&byte| byte != 0) {
            return Err(StoreError::HasData { path: backing.path.clone(), offset: at + index as u64 });
        }
        at += length as u64;
        progress(at - from, backing.size - from);
    }
    Ok(())
}

fn write(
    backing: &Backing,
    superblock: &mut Superblock,
    zero: ZeroPolicy,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), StoreError> {
    let layout = superblock.layout;
    superblock.write_through = backing.is_write_through();
    if backing.medium == Medium::BlockDevice && zero == ZeroPolicy::Check {
        check_zeroes(backing, layout.data_offset, progress)?;
    }
    // What was there is gone before anything new appears, so that a crash leaves neither one nor the other.
    if backing.medium == Medium::BlockDevice {
        backing.zero(0, layout.data_offset, &mut |_, _| ())?;
        backing.zero(
            backing.size.saturating_sub(EDGE).max(layout.data_offset),
            backing.size,
            &mut |_, _| (),
        )?;
        if zero == ZeroPolicy::Zero {
            backing.zero(layout.data_offset, backing.size, progress)?;
        }
    } else if sys::has_data(&backing.file).during(&backing.path, "looking for data")? {
        let emptied = backing.file.set_len(0).and_then(|()| backing.file.set_len(backing.size));
        emptied.during(&backing.path, "emptying the file")?;
    }
    backing.sync()?;
    let empty = Box::new([0; PAGE_BITS_BYTES]);
    for kind in MapKind::all() {
        for index in 0..layout.pages_per_map {
            for sequence in [1, 2] {
                let page = encode_page(superblock.store, kind, index, sequence, &empty);
                let offset = layout.page_offset(kind, index, slot_of(sequence));
                backing.file.write_all_at(page.bytes(), offset).during(&backing.path, "writing maps")?;
            }
        }
    }
    backing.sync()?;
    for generation in [1, 2] {
        let page = superblock.encode(generation);
        let page = page.map_err(|source| StoreError::Invalid { path: backing.path.clone(), source })?;
        let offset = SUPERBLOCK_OFFSETS[slot_of(generation)];
        backing.file.write_all_at(page.bytes(), offset).during(&backing.path, "writing the superblock")?;
    }
    backing.sync()
}
