//! Makes a store unusable for ever.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rmr_common::pool::PoolId;

use super::backing::Backing;
use super::error::{During, StoreError};
use super::layout::{PAGE_BYTES, PAGE_SIZE, SUPERBLOCK_OFFSETS};
use super::open::{check_pool, choose, read_superblocks};
use super::superblock::Superblock;
use crate::disk::{Medium, sys};

/// Wipes both superblocks, durably, and then the maps.
pub(super) fn destroy(path: &Path, expected: Option<PoolId>) -> Result<Superblock, StoreError> {
    let (backing, superblock) = open(path, expected)?;
    for offset in SUPERBLOCK_OFFSETS {
        wipe(&backing, offset, offset + PAGE_SIZE).during(path, "wiping the superblock")?;
    }
    backing.sync()?;
    let layout = superblock.layout;
    wipe(&backing, layout.map_offset, layout.data_offset.min(backing.size))
        .during(path, "wiping the maps")?;
    backing.sync()?;
    Ok(superblock)
}

/// Removes the file of a store. This needs no space, so a full file system has some again afterwards.
pub(super) fn remove(path: &Path, expected: Option<PoolId>) -> Result<Superblock, StoreError> {
    let (backing, superblock) = open(path, expected)?;
    if backing.medium == Medium::BlockDevice {
        return Err(StoreError::NotADisk(path.to_owned()));
    }
    // Under another name, a hard link, it must be no store either. That it cannot be cut matters less than that it goes.
    if let Err(error) = backing.file.set_len(0).and_then(|()| backing.file.sync_all()) {
        tracing::warn!("{}: not emptied before it is removed: {error}", path.display());
    }
    std::fs::remove_file(path).during(path, "removing the file")?;
    backing.sync_name()?;
    Ok(superblock)
}

fn open(path: &Path, expected: Option<PoolId>) -> Result<(Backing, Superblock), StoreError> {
    let backing = Backing::open(path)?;
    let (_, superblock) = choose(path, &read_superblocks(path, &backing)?)?;
    check_pool(path, &superblock, expected)?;
    Ok((backing, superblock))
}

/// Makes a range read as zeroes: in a file by a hole, which takes no space on a full file system.
fn wipe(backing: &Backing, from: u64, to: u64) -> io::Result<()> {
    if backing.medium != Medium::BlockDevice
        && from < to
        && sys::fallocate(&backing.file, sys::PUNCH_HOLE, from, to - from).is_ok()
    {
        return Ok(());
    }
    let zeroes = [0; PAGE_BYTES];
    (from..to).step_by(zeroes.len()).try_for_each(|offset| backing.file.write_all_at(&zeroes, offset))
}
