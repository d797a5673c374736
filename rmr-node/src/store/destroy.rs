//! Makes a store unusable for ever.

use std::os::unix::fs::FileExt;
use std::path::Path;

use rmr_common::pool::PoolId;

use super::backing::Backing;
use super::error::{During, StoreError};
use super::layout::{PAGE_BYTES, SUPERBLOCK_OFFSETS};
use super::open::{check_pool, choose, read_superblocks};
use super::superblock::Superblock;

/// Wipes both superblocks, durably, and then the maps.
pub(super) fn destroy(path: &Path, expected: Option<PoolId>) -> Result<Superblock, StoreError> {
    let backing = Backing::open(path)?;
    let (_, superblock) = choose(path, &read_superblocks(path, &backing)?)?;
    check_pool(path, &superblock, expected)?;
    let zeroes = [0; PAGE_BYTES];
    for offset in SUPERBLOCK_OFFSETS {
        backing.file.write_all_at(&zeroes, offset).during(path, "wiping the superblock")?;
    }
    backing.sync()?;
    let layout = superblock.layout;
    for offset in (layout.map_offset..layout.data_offset.min(backing.size)).step_by(zeroes.len()) {
        backing.file.write_all_at(&zeroes, offset).during(path, "wiping the maps")?;
    }
    backing.sync()?;
    Ok(superblock)
}
