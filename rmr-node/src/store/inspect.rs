//! A report of all that a store says, for an operator or a program, however damaged the store is.

use std::fmt;
use std::path::{Path, PathBuf};

use rmr_common::pool::Position;
use rmr_common::text::printable;
use rmr_common::words;
use serde::Serialize;

use super::backing::Backing;
use super::error::{During, StoreError};
use super::layout::{MapKind, SUPERBLOCK_OFFSETS};
use super::open::{PageHealth, choose, read_maps, read_superblocks};
use super::signature::{Signature, scan};
use super::size::ByteSize;
use super::superblock::Superblock;
use crate::disk::Medium;

/// What [`Store::inspect`](super::Store::inspect) found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The device or file.
    pub path: PathBuf,
    /// What it is.
    pub medium: Medium,
    /// Its size in bytes.
    pub size: u64,
    /// Whether another process held it; what is reported may then be changing.
    pub in_use: bool,
    /// Both superblock copies.
    pub superblock_copies: [CopyReport; 2],
    /// What the newest intact copy says; `None` when the store cannot be opened.
    pub superblock: Option<Superblock>,
    /// Bytes that the store takes, metadata included; `None` as above.
    pub store_size: Option<u64>,
    /// The largest pool that the store has room for in its maps, in bytes; `None` as above.
    pub max_pool_size: Option<u64>,
    /// The maps; empty when there is no superblock to find them by.
    pub maps: Vec<MapReport>,
    /// What else was recognised on the device, if it is no store.
    pub signatures: Vec<Signature>,
    /// Everything that is not as it should be, in words.
    pub problems: Vec<String>,
}

/// One superblock copy.
#[derive(Clone, Debug, Serialize)]
pub struct CopyReport {
    /// Where it lies, in bytes.
    pub offset: u64,
    /// Its generation, when it is intact.
    pub generation: Option<u64>,
    /// What is wrong with it, when it is not.
    pub error: Option<String>,
}

/// One map.
#[derive(Clone, Debug, Serialize)]
pub struct MapReport {
    /// Which one.
    pub map: MapKind,
    /// Where its first page lies in the first copy of the map area, in bytes.
    pub offset: u64,
    /// How many pages it has.
    pub pages: usize,
    /// How many of them have two intact copies.
    pub intact: usize,
    /// Pages with one intact copy after a crash; it counts.
    pub torn: Vec<usize>,
    /// Pages with one intact copy after an orderly end, and pages with none: all their bits count as set.
    pub lost: Vec<usize>,
    /// How many chunks of the pool count as set.
    pub chunks_set: u64,
}

pub(super) fn inspect(path: &Path) -> Result<Report, StoreError> {
    let (backing, in_use) = Backing::open_read_only(path)?;
    let copies = read_superblocks(path, &backing)?;
    let copy = |slot: usize| CopyReport {
        offset: SUPERBLOCK_OFFSETS[slot],
        generation: copies[slot].as_ref().ok().map(|(generation, _)| *generation),
        error: copies[slot].as_ref().err().map(ToString::to_string),
    };
    let mut report = Report {
        path: path.to_owned(),
        medium: backing.medium,
        size: backing.size,
        in_use,
        superblock_copies: [copy(0), copy(1)],
        superblock: None,
        store_size: None,
        max_pool_size: None,
        maps: Vec::new(),
        signatures: Vec::new(),
        problems: Vec::new(),
    };
    for (slot, copy) in copies.iter().enumerate() {
        if let Err(error) = copy {
            report.problems.push(format!("superblock copy {slot}: {error}"));
        }
    }
    match choose(path, &copies) {
        Ok((_, superblock)) => describe(&backing, superblock, &mut report)?,
        Err(error) => {
            report.signatures =
                scan(&backing.file, backing.size).during(path, "looking for what is there")?;
            report.problems.push(error.to_string());
        }
    }
    Ok(report)
}

fn describe(backing: &Backing, superblock: Superblock, report: &mut Report) -> Result<(), StoreError> {
    let store_size = superblock.layout.store_size(superblock.spec.size);
    if backing.size < store_size {
        report.problems.push(format!(
            "the device has {} bytes, the store needs {store_size}: it was truncated or copied in part",
            backing.size
        ));
    }
    if backing.size >= superblock.layout.data_offset {
        let maps = read_maps(&backing.path, backing, &superblock, &mut report.problems)?;
        for kind in MapKind::all() {
            let pages = maps.pages(kind);
            let which = |wanted: &[PageHealth]| {
                let matching = pages.iter().enumerate().filter(|(_, page)| wanted.contains(&page.health));
                matching.map(|(index, _)| index).collect::<Vec<_>>()
            };
            report.maps.push(MapReport {
                map: kind,
                offset: superblock.layout.page_offset(kind, 0, 0),
                pages: pages.len(),
                intact: which(&[PageHealth::Intact]).len(),
                torn: which(&[PageHealth::Torn]),
                lost: which(&[PageHealth::Rotten, PageHealth::Lost]),
                chunks_set: maps.count(kind),
            });
        }
    }
    report.store_size = Some(store_size);
    report.max_pool_size = Some(superblock.layout.largest_pool(superblock.spec.chunk_size));
    report.superblock = Some(superblock);
    Ok(())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = if self.in_use { ", in use by another process" } else { "" };
        writeln!(f, "{}: {} of {}{held}", self.path.display(), self.medium, ByteSize(self.size))?;
        for (slot, copy) in self.superblock_copies.iter().enumerate() {
            let state = match (&copy.error, copy.generation) {
                (None, Some(generation)) => format!("intact, generation {generation}"),
                (error, _) => error.clone().unwrap_or_default(),
            };
            writeln!(f, "superblock copy {slot} at {}: {state}", copy.offset)?;
        }
        if let Some(superblock) = &self.superblock {
            self.fmt_superblock(superblock, f)?;
        }
        for map in &self.maps {
            write!(f, "  {:<24} {} of {} pages intact", map.map.to_string(), map.intact, map.pages)?;
            writeln!(f, ", {} torn, {} lost, {} chunks set", map.torn.len(), map.lost.len(), map.chunks_set)?;
        }
        for signature in &self.signatures {
            writeln!(f, "found: {signature}")?;
        }
        for problem in &self.problems {
            writeln!(f, "PROBLEM: {problem}")?;
        }
        Ok(())
    }
}

impl Report {
    fn fmt_superblock(&self, superblock: &Superblock, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Superblock { spec, view, layout, .. } = superblock;
        writeln!(f, "pool '{}' ({})", spec.name, spec.id)?;
        writeln!(
            f,
            "  {} in chunks of {} and logical blocks of {} bytes",
            ByteSize(spec.size),
            ByteSize(spec.chunk_size.bytes()),
            spec.logical_block_size
        )?;
        for member in &spec.members {
            let state = view.state(member.id).map_or("not in the view".to_owned(), |state| state.to_string());
            let own = if member.id == superblock.member { "  <- this store" } else { "" };
            writeln!(f, "  member {} store {} at {}: {state}{own}", member.id, member.store, member.address)?;
        }
        writeln!(f, "{view}")?;
        writeln!(f, "newest epoch accepted: {}", superblock.epoch)?;
        writeln!(f, "position: {}", superblock.position())?;
        for member in &spec.members {
            let known = superblock.attested.of(member.id);
            let regressed = if superblock.attested.regressed.contains(member.id) {
                "; it went back in time since"
            } else {
                ""
            };
            if *known != Position::default() {
                writeln!(f, "  member {} was seen at {known}{regressed}", member.id)?;
            }
        }
        match &superblock.client {
            None => writeln!(f, "client: none yet")?,
            Some(client) => {
                let attached = if client.attached { "attached" } else { "detached in order" };
                // Whoever attached has chosen it.
                writeln!(f, "client: {} ({}), {attached}", printable(&client.name), client.id)?;
            }
        }
        let yes_no = |yes| if yes { "yes" } else { "no" };
        writeln!(f, "closed in order: {}", yes_no(superblock.clean_shutdown))?;
        writeln!(f, "write-through: {}", yes_no(superblock.write_through))?;
        writeln!(f, "created: {}", words::utc(superblock.created_unix_s))?;
        writeln!(
            f,
            "maps at {} and {}, {} pages each, room for {} chunks: the pool may grow to {}; data at {}",
            layout.map_offset,
            layout.map_offset + layout.map_stride,
            layout.pages_per_map,
            layout.chunk_capacity(),
            ByteSize(layout.largest_pool(spec.chunk_size)),
            layout.data_offset
        )
    }
}
