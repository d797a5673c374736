//! Takes back an epoch that no attachment can follow: the way out for a pool whose epochs a faulty client has used up.

use std::os::unix::fs::FileExt;
use std::path::Path;

use rmr_common::pool::{Epoch, PoolId, ViewNumber};

use super::backing::Backing;
use super::error::{During, StoreError};
use super::layout::SUPERBLOCK_OFFSETS;
use super::open::{Recovered, check_pool};
use super::page::slot_of;
use super::superblock::Superblock;

/// Lowers the newest epoch that the store has accepted to `epoch`, and that of its view if it is higher. Both copies of the
/// superblock are written, durably; nothing else is changed. Returns the superblock before and after.
pub(super) fn reset_epoch(
    path: &Path,
    expected: PoolId,
    epoch: Epoch,
) -> Result<(Superblock, Superblock), StoreError> {
    let backing = Backing::open(path)?;
    backing.file.sync_all().during(path, "flushing")?;
    let Recovered { superblock: before, mut generation, .. } = Recovered::read(path, &backing)?;
    check_pool(path, &before, Some(expected))?;
    if epoch >= before.epoch {
        return Err(StoreError::EpochNotLower { path: path.to_owned(), wanted: epoch, found: before.epoch });
    }
    let mut after = before.clone();
    after.epoch = epoch;
    if after.view.epoch > epoch {
        after.view.epoch = epoch;
        // Numbers of this size were made up, too. Members that have the same view come to the same number.
        after.view.number = ViewNumber(after.view.number.0 % Epoch::LAST_DECISION_NS);
    }
    for _ in 0..2 {
        generation += 1;
        let page = after.encode(generation);
        let page = page.map_err(|source| StoreError::Invalid { path: path.to_owned(), source })?;
        let offset = SUPERBLOCK_OFFSETS[slot_of(generation)];
        backing.file.write_all_at(page.bytes(), offset).during(path, "writing the superblock")?;
        backing.sync()?;
    }
    Ok((before, after))
}
