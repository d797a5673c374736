//! Reads what a store holds and decides what of it can be believed: the newest intact copy of each page, and "everything
//! is set" where no copy is.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rmr_common::pool::{Chunk, ChunkSize, Epoch, PoolId, StoreId};
use serde::Serialize;

use super::backing::Backing;
use super::create::{self, CreateOptions};
use super::destroy;
use super::epoch;
use super::error::{During, StoreError};
use super::grow::Growth;
use super::inspect::{self, Report};
use super::layout::{CHUNKS_PER_PAGE, Layout, MapKind, PAGE_BYTES, PAGE_SIZE, SUPERBLOCK_OFFSETS};
use super::page::{PageBits, PageError, decode_page, encode_page, full_page, slot_of};
use super::size::ByteSize;
use super::superblock::{Superblock, SuperblockError};
use super::writer::MetadataWriter;
use crate::disk::{DiskFile, sys};

/// How much of a map page's two copies was intact.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageHealth {
    /// Both copies.
    Intact,
    /// One copy, after an unclean end: the other was being written when the machine went down, and nobody was told that
    /// it is durable. The intact one counts.
    Torn,
    /// One copy, though the store was closed in order, so nothing was being written: the other one rotted, and may have
    /// been the newer. All bits count as set.
    Rotten,
    /// No copy. All bits count as set.
    Lost,
}

/// One page of a map as it counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MapPage {
    /// The bits.
    pub bits: Box<PageBits>,
    /// The newest sequence number that is known.
    pub sequence: u64,
    /// How much was intact.
    pub health: PageHealth,
}

/// The maps of a store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Maps {
    pages: Vec<MapPage>,
    pages_per_map: u32,
    chunk_count: u64,
}

impl Maps {
    /// The pages of a map, in order.
    #[must_use]
    pub fn pages(&self, kind: MapKind) -> &[MapPage] {
        let per_map = self.pages_per_map as usize;
        let first = kind.position() * per_map;
        &self.pages[first..first + per_map]
    }

    /// The chunks of the pool that are set in a map, in order.
    pub fn chunks(&self, kind: MapKind) -> impl Iterator<Item = Chunk> + '_ {
        let bits = |(page, first): (&MapPage, u64)| {
            let bits = page.bits.clone();
            (0..CHUNKS_PER_PAGE).filter(move |&n| is_set(&bits, n)).map(move |n| Chunk(first + n))
        };
        let firsts = (0u64..).step_by(usize::try_from(CHUNKS_PER_PAGE).expect("32256"));
        self.pages(kind).iter().zip(firsts).flat_map(bits).take_while(|chunk| chunk.0 < self.chunk_count)
    }

    /// How many chunks of the pool are set in a map.
    #[must_use]
    pub fn count(&self, kind: MapKind) -> u64 {
        self.chunks(kind).count() as u64
    }

    fn sequences(&self) -> Vec<u64> {
        self.pages.iter().map(|page| page.sequence).collect()
    }
}

fn is_set(bits: &PageBits, n: u64) -> bool {
    let byte = usize::try_from(n / 8).expect("below 4032");
    bits[byte] & (1 << (n % 8)) != 0
}

/// A store that this process holds, and nobody else.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    file: File,
    size: u64,
    superblock: Superblock,
    generation: u64,
    maps: Maps,
    was_clean: bool,
    warnings: Vec<String>,
}

impl Store {
    /// Creates a store; see [`CreateOptions`]. `progress` is told how many bytes of how many are zeroed.
    ///
    /// # Errors
    /// When something is there already, in use, too small or otherwise unfit; nothing is changed then.
    pub fn create(
        path: &Path,
        options: &CreateOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Superblock, StoreError> {
        create::create(path, options, progress)
    }

    /// Opens a store and keeps it locked until it is dropped. Copies of pages that a crash damaged are written anew, after an
    /// unclean end all pages are, and the mark of a clean shutdown is taken off, durably, before this returns.
    ///
    /// # Errors
    /// When it is in use, no store, damaged beyond use, smaller than it was, newer than this program, or not of the pool
    /// `expected`.
    pub fn open(path: &Path, expected: Option<PoolId>) -> Result<Self, StoreError> {
        let backing = Backing::open(path)?;
        // What the last process wrote may still be in a cache. It must not be taken as the copy to keep, and the other
        // copy overwritten, before it is durable.
        backing.file.sync_all().during(path, "flushing")?;
        // Pages whose writeback failed count as clean, and hold what the disk does not.
        if let Err(error) = sys::drop_cache(&backing.file) {
            tracing::debug!("{}: its pages stay cached: {error}", path.display());
        }
        let recovered = Recovered::read(path, &backing)?;
        let Recovered { mut superblock, mut generation, mut maps, warnings } = recovered;
        check_pool(path, &superblock, expected)?;
        repair(&backing, &superblock, &mut maps)?;
        if !superblock.clean_shutdown {
            renew(&backing, &superblock, &mut maps)?;
        }
        let was_clean = std::mem::replace(&mut superblock.clean_shutdown, false);
        superblock.write_through = backing.is_write_through();
        // Both copies, so that a superblock that rots later never brings the mark of a clean shutdown back.
        for _ in 0..2 {
            generation += 1;
            let page = superblock.encode(generation);
            let page = page.map_err(|source| StoreError::Invalid { path: path.to_owned(), source })?;
            let offset = SUPERBLOCK_OFFSETS[slot_of(generation)];
            backing.file.write_all_at(page.bytes(), offset).during(path, "writing the superblock")?;
            backing.file.sync_all().during(path, "flushing")?;
        }
        for warning in &warnings {
            tracing::warn!("{}: {warning}", path.display());
        }
        let (path, file, size) = (backing.path, backing.file, backing.size);
        Ok(Self { path, file, size, superblock, generation, maps, was_clean, warnings })
    }

    /// Reads which store this is, without changing or locking it.
    ///
    /// # Errors
    /// When it cannot be read, or is no store that can be opened.
    pub fn identify(path: &Path) -> Result<Superblock, StoreError> {
        let backing = Backing::look(path)?;
        let (_, superblock) = choose(path, &read_superblocks(path, &backing)?)?;
        Ok(superblock)
    }

    /// Looks at a store without changing or locking it, however damaged it is.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn inspect(path: &Path) -> Result<Report, StoreError> {
        inspect::inspect(path)
    }

    /// Makes a store unusable for ever: wipes both superblocks and all maps. A file stays, empty of meaning.
    ///
    /// # Errors
    /// When it is in use, not a store of ours, or not of the pool `expected`.
    pub fn destroy(path: &Path, expected: Option<PoolId>) -> Result<Superblock, StoreError> {
        destroy::destroy(path, expected)
    }

    /// Removes the file of a store, after making sure that it is one. Needs no free space on the file system.
    ///
    /// # Errors
    /// When it is in use, not a store of ours, a device, or not of the pool `expected`.
    pub fn remove(path: &Path, expected: Option<PoolId>) -> Result<Superblock, StoreError> {
        destroy::remove(path, expected)
    }

    /// What is wrong with the space that the store may come to need: a file is sparse, and its file system may be too small
    /// for all of it.
    #[must_use]
    pub fn space_warning(&self) -> Option<String> {
        if self.file.metadata().is_ok_and(|found| found.file_type().is_block_device()) {
            return None;
        }
        let allocated = self.file.metadata().ok()?.blocks().saturating_mul(512);
        let (missing, free) = (self.size.saturating_sub(allocated), sys::free_bytes(&self.file).ok()??);
        (missing > free).then(|| {
            format!(
                "{}: the store may come to need {} more, and its file system has {} free: writes fail for want of space when \
                 that is used up, and the member is then Out until there is more",
                self.path.display(),
                ByteSize(missing),
                ByteSize(free)
            )
        })
    }

    /// Lets go of the maps, which are in the hands of whoever serves the store: there are thousands of stores on a node.
    pub fn forget_maps(&mut self) {
        self.maps.pages = Vec::new();
        self.maps.pages_per_map = 0;
    }

    /// Takes back the newest epoch that the store has accepted, and the epoch of its view with it if that is higher. A client
    /// that attached under a higher epoch is forgotten by that, and not fenced any more. Returns the superblock before and
    /// after.
    ///
    /// # Errors
    /// When it is in use, not a store of ours, not of this pool, or its epoch is not higher.
    pub fn reset_epoch(
        path: &Path,
        pool: PoolId,
        epoch: Epoch,
    ) -> Result<(Superblock, Superblock), StoreError> {
        epoch::reset_epoch(path, pool, epoch)
    }

    /// The device or file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The superblock as it was when the store was opened, without the mark of a clean shutdown; see [`Store::was_clean`].
    #[must_use]
    pub const fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The maps as they were when the store was opened.
    #[must_use]
    pub const fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Whether the store had been closed in order.
    #[must_use]
    pub const fn was_clean(&self) -> bool {
        self.was_clean
    }

    /// What was found damaged, in words; also in the log.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Size of the device in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Prepares to make room for a pool of `to` bytes. Whatever lies beyond `from` bytes of the pool is nobody's data.
    ///
    /// # Errors
    /// When the maps have no room for it.
    pub fn growth(&self, chunk_size: ChunkSize, from: u64, to: u64) -> Result<Growth, StoreError> {
        Growth::new(&self.path, &self.file, self.superblock.layout, chunk_size, from, to)
    }

    /// The device or file has become larger, as [`Growth::run`] told.
    pub const fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    /// The writer that goes on from what the store holds. There must be one at a time.
    #[must_use]
    pub fn metadata_writer(&self) -> MetadataWriter {
        MetadataWriter::new(self.superblock.clone(), self.generation, &self.maps.sequences())
    }

    /// The store as a disk for an engine, once for each engine that serves it. Its offsets are those of the device: the
    /// pool's byte 0 is at `superblock().layout.data_offset`. The lock lasts until the store and all of these are gone.
    ///
    /// Data and metadata each have an open file description of their own, so that neither is told of the other's failed
    /// write-back in its place. The store's own is for what makes room in it.
    ///
    /// # Errors
    /// When it cannot be opened again, or asked what it is.
    pub fn disk_file(&self) -> Result<DiskFile, StoreError> {
        let again = || Backing::open_again(&self.path, &self.file);
        let disk = || -> io::Result<DiskFile> {
            let disk = DiskFile::new(again()?, self.size)?;
            Ok(disk.with_metadata(again()?, self.file.try_clone()?))
        };
        disk().during(&self.path, "preparing for I/O")
    }
}

/// Where metadata pages are read from: a device, or a simulated one.
pub trait PageSource {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// The page at `offset`.
    ///
    /// # Errors
    /// `EIO` for a page that the medium lost, which counts as a damaged copy; anything else ends the reading.
    fn read_page(&self, offset: u64) -> io::Result<Box<[u8; PAGE_BYTES]>>;
}

impl PageSource for Backing {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_page(&self, offset: u64) -> io::Result<Box<[u8; PAGE_BYTES]>> {
        let mut bytes = Box::new([0; PAGE_BYTES]);
        self.file.read_exact_at(&mut bytes[..], offset)?;
        Ok(bytes)
    }
}

/// What the metadata of a store come to, after whatever happened to it.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// The superblock that counts.
    pub superblock: Superblock,
    /// Its generation.
    pub generation: u64,
    /// The maps.
    pub maps: Maps,
    /// What was found damaged, in words.
    pub warnings: Vec<String>,
}

impl Recovered {
    /// Reads a store's metadata as [`Store::open`] does; `path` is for messages. Repairs nothing.
    ///
    /// # Errors
    /// When there is no store, or none that can be believed.
    pub fn read(path: &Path, source: &dyn PageSource) -> Result<Self, StoreError> {
        let copies = read_superblocks(path, source)?;
        let (generation, superblock) = choose(path, &copies)?;
        let needed = superblock.layout.store_size(superblock.spec.size);
        if source.size() < needed {
            return Err(StoreError::TooSmall { path: path.to_owned(), found: source.size(), needed });
        }
        let mut warnings = Vec::new();
        for (slot, copy) in copies.iter().enumerate() {
            if let Err(error) = copy {
                warnings
                    .push(format!("superblock copy {slot} is not intact ({error}); the other one is used"));
            }
        }
        let maps = read_maps(path, source, &superblock, &mut warnings)?;
        Ok(Self { superblock, generation, maps, warnings })
    }

    /// A writer that goes on from here.
    #[must_use]
    pub fn writer(&self) -> MetadataWriter {
        MetadataWriter::new(self.superblock.clone(), self.generation, &self.maps.sequences())
    }
}

/// Both superblock copies, with their generations.
pub(super) type Copies = [Result<(u64, Superblock), SuperblockError>; 2];

pub(super) fn read_superblocks(path: &Path, source: &dyn PageSource) -> Result<Copies, StoreError> {
    let read = |slot: usize| {
        if SUPERBLOCK_OFFSETS[slot] + PAGE_SIZE > source.size() {
            return Ok(Err(SuperblockError::Magic));
        }
        match source.read_page(SUPERBLOCK_OFFSETS[slot]) {
            Ok(bytes) => Ok(Superblock::decode(&bytes[..], slot)),
            // A sector that cannot be read is a damaged copy; the other one may be well.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                Ok(Err(SuperblockError::Field("it cannot be read (I/O error)".to_owned())))
            }
            Err(error) => Err(error).during(path, "reading the superblock"),
        }
    };
    Ok([read(0)?, read(1)?])
}

/// The superblock that counts: the newer intact copy.
pub(super) fn choose(path: &Path, copies: &Copies) -> Result<(u64, Superblock), StoreError> {
    let newer = |copy: &&SuperblockError| matches!(copy, SuperblockError::NewerFormat { .. });
    if let Some(source) = copies.iter().filter_map(|copy| copy.as_ref().err()).find(newer) {
        return Err(StoreError::NewerFormat { path: path.to_owned(), source: source.clone() });
    }
    match copies {
        [Ok(a), Ok(b)] if a.1.store != b.1.store || a.1.spec.id != b.1.spec.id => {
            Err(StoreError::TwoStores(path.to_owned()))
        }
        [Ok(a), Ok(b)] => Ok(if a.0 > b.0 { a.clone() } else { b.clone() }),
        [Ok(one), Err(_)] | [Err(_), Ok(one)] => Ok(one.clone()),
        [Err(a), Err(b)] => {
            let copies = Box::new([a.clone(), b.clone()]);
            Err(StoreError::NoSuperblock { path: path.to_owned(), copies })
        }
    }
}

pub(super) fn check_pool(
    path: &Path,
    found: &Superblock,
    expected: Option<PoolId>,
) -> Result<(), StoreError> {
    match expected {
        Some(expected) if expected != found.spec.id => {
            let (path, name) = (path.to_owned(), found.spec.name.clone());
            Err(StoreError::WrongPool { path, expected, found: found.spec.id, name })
        }
        _ => Ok(()),
    }
}

/// All pages of all maps, as they count; what is wrong with any goes to `warnings`.
pub(super) fn read_maps(
    path: &Path,
    source: &dyn PageSource,
    superblock: &Superblock,
    warnings: &mut Vec<String>,
) -> Result<Maps, StoreError> {
    let layout = superblock.layout;
    let chunk_count = superblock.spec.chunk_count();
    let mut pages = Vec::new();
    for kind in MapKind::all() {
        for index in 0..layout.pages_per_map {
            let read = |slot| {
                read_page(source, superblock.store, layout, kind, index, slot).during(path, "reading maps")
            };
            let copies = [read(0)?, read(1)?];
            let page = judge(copies, index, chunk_count, superblock.clean_shutdown, |problem| {
                warnings.push(format!("{kind}, page {index}: {problem}"));
            });
            pages.push(page);
        }
    }
    Ok(Maps { pages, pages_per_map: layout.pages_per_map, chunk_count })
}

type PageCopy = Result<(u64, Box<PageBits>), PageError>;

fn read_page(
    source: &dyn PageSource,
    store: StoreId,
    layout: Layout,
    kind: MapKind,
    index: u32,
    slot: usize,
) -> io::Result<PageCopy> {
    match source.read_page(layout.page_offset(kind, index, slot)) {
        Ok(bytes) => Ok(decode_page(&bytes[..], store, kind, index, slot)),
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(Err(PageError::Unreadable)),
        Err(error) => Err(error),
    }
}

/// Which bits a page has, from its two copies. Losing a bit would let a stale block be served; setting one too many only
/// costs resync. So whatever is in doubt is set.
fn judge(
    copies: [PageCopy; 2],
    index: u32,
    chunk_count: u64,
    clean: bool,
    mut problem: impl FnMut(String),
) -> MapPage {
    let set_all = || full_page(index, chunk_count);
    match copies {
        [Ok(a), Ok(b)] => {
            let (sequence, bits) = if a.0 > b.0 { a } else { b };
            MapPage { bits, sequence, health: PageHealth::Intact }
        }
        [Ok((sequence, bits)), Err(error)] | [Err(error), Ok((sequence, bits))] if !clean => {
            problem(format!("one copy is not intact ({error}); taken for a write that the crash cut short"));
            MapPage { bits, sequence, health: PageHealth::Torn }
        }
        [Ok((sequence, _)), Err(error)] | [Err(error), Ok((sequence, _))] => {
            problem(format!(
                "one copy is not intact ({error}) though the store was closed in order; ALL CHUNKS of the page count as set"
            ));
            MapPage { bits: set_all(), sequence, health: PageHealth::Rotten }
        }
        [Err(a), Err(b)] => {
            problem(format!(
                "no copy is intact (copy 0: {a}; copy 1: {b}); ALL CHUNKS of the page count as set"
            ));
            MapPage { bits: set_all(), sequence: 0, health: PageHealth::Lost }
        }
    }
}

/// Writes every page once more, in the place of its older copy. The process before may have ended because a flush failed: its
/// pages then read as it wrote them, count as written, and are not on the disk; and no flush says so.
fn renew(backing: &Backing, superblock: &Superblock, maps: &mut Maps) -> Result<(), StoreError> {
    let mut pages = maps.pages.iter_mut();
    for kind in MapKind::all() {
        for (index, page) in (0..maps.pages_per_map).zip(&mut pages) {
            page.sequence += 1;
            let bytes = encode_page(superblock.store, kind, index, page.sequence, &page.bits);
            let offset = superblock.layout.page_offset(kind, index, slot_of(page.sequence));
            backing.file.write_all_at(bytes.bytes(), offset).during(&backing.path, "writing maps again")?;
        }
    }
    backing.file.sync_all().during(&backing.path, "flushing")
}

/// Writes pages of which a copy was damaged anew, in both places, so that damage found later is not taken for this one.
fn repair(backing: &Backing, superblock: &Superblock, maps: &mut Maps) -> Result<(), StoreError> {
    // One pass per copy, with a flush between them: never is the only good copy overwritten by one not yet durable.
    for pass in 0..2 {
        let mut wrote = false;
        let mut pages = maps.pages.iter_mut();
        for kind in MapKind::all() {
            for (index, page) in (0..maps.pages_per_map).zip(&mut pages) {
                if page.health == PageHealth::Intact {
                    continue;
                }
                page.sequence += 1;
                let bytes = encode_page(superblock.store, kind, index, page.sequence, &page.bits);
                let offset = superblock.layout.page_offset(kind, index, slot_of(page.sequence));
                backing.file.write_all_at(bytes.bytes(), offset).during(&backing.path, "repairing maps")?;
                wrote = true;
            }
        }
        if wrote {
            backing.file.sync_all().during(&backing.path, "flushing")?;
            tracing::info!(
                "{}: damaged map pages were written anew ({}/2)",
                backing.path.display(),
                pass + 1
            );
        }
    }
    Ok(())
}
