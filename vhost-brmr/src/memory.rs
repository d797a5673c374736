//! Guest memory: the regions that the front end announces, mapped here, and the translation of guest addresses to
//! segments. A snapshot of the table keeps its regions mapped, so a request that holds one can never lose its memory.
//!
//! Regions are plain mappings of our own rather than `vm_memory`'s: huge pages need an offset and a length rounded to
//! the page size of the file, and the front end's own addresses are needed to find the rings. They carry the dirty log as
//! `vm_memory` has it, so that whatever writes through them marks what it wrote (see [`crate::dirty_log`]).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::ptr;
use std::sync::Arc;

use rmr_common::buffer::Segment;
use rmr_common::transport::rdma::{Fabric, RdmaError, Registration};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::bitmap::{BS, Bitmap, RefSlice};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::dirty_log::{DirtyLog, LogError, LogMap, RegionLog};

/// Most regions: what QEMU and cloud-hypervisor use at most, and what `vhost` in the kernel offers.
pub const MAX_REGIONS: usize = 509;

/// What a log that is too small leaves out, for the error.
const LOGGED: &str = "guest memory";

/// Snapshot of the table of regions. It keeps them mapped.
pub type GuestMemory = GuestRegionCollection<Region>;

/// Why a region was not accepted.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// Nothing to map, or an end beyond what 64 bits can name.
    #[error(
        "memory region at {guest:#x} of {size:#x} bytes, offset {offset:#x}: expected a size above zero and ends within 64 bits"
    )]
    Bounds {
        /// Guest address.
        guest: u64,
        /// Size.
        size: u64,
        /// Offset in the file.
        offset: u64,
    },
    /// The file ends before the region does; touching the rest would kill the process.
    #[error("memory region needs the bytes up to {needed:#x} of its file, which has {found:#x}")]
    FileTooShort {
        /// End of the region in the file.
        needed: u64,
        /// Size of the file.
        found: u64,
    },
    /// Not aligned to a page.
    #[error("memory region at file offset {0:#x}: expected a multiple of 4096")]
    Unaligned(u64),
    /// The kernel refused.
    #[error("mapping {size:#x} bytes of guest memory failed: {source}")]
    Map {
        /// Size asked for.
        size: usize,
        /// Why.
        source: io::Error,
    },
    /// An RDMA device in use cannot have it.
    #[error("memory region of {size:#x} bytes: {source}")]
    Register {
        /// Size of the region.
        size: u64,
        /// Why.
        source: RdmaError,
    },
    /// Two regions cover the same guest address.
    #[error("memory regions overlap near guest address {0:#x}")]
    Overlap(u64),
    /// No such region to remove.
    #[error("no memory region at guest address {guest:#x} of {size:#x} bytes to remove")]
    Unknown {
        /// Guest address asked for.
        guest: u64,
        /// Size asked for.
        size: u64,
    },
    /// The dirty log in use has no bits for it.
    #[error("{0}")]
    Log(#[from] LogError),
    /// More regions than there are slots.
    #[error("{found} memory regions, expected at most {MAX_REGIONS}")]
    TooMany {
        /// How many there would be.
        found: usize,
    },
}

/// One region of guest memory, mapped.
#[derive(Debug)]
pub struct Region {
    guest: GuestAddress,
    /// Address of the region in the front end's own address space, by which it names the rings.
    user: u64,
    length: u64,
    host: *mut u8,
    log: RegionLog,
    /// Lets RDMA devices use the memory; ends before the mapping does, and holds it as well.
    _registration: Option<Registration>,
    _mapping: Arc<Mapping>,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the region; it is only handed on as volatile slices
// and segments, which tolerate concurrent access.
unsafe impl Send for Region {}
// SAFETY: as above; there is no unsynchronised state behind `&Region`.
unsafe impl Sync for Region {}

impl Region {
    /// Maps a region that the front end announced, and registers it for RDMA with `fabric`. What is written through it is
    /// marked in `log`.
    ///
    /// # Errors
    /// When the region overflows, its file is too short, or the kernel refuses the mapping.
    pub fn map(
        announced: &VhostUserMemoryRegion,
        file: &File,
        fabric: Option<&Fabric>,
        log: &Arc<DirtyLog>,
    ) -> Result<Self, MemoryError> {
        let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } = *announced;
        let bounds = MemoryError::Bounds { guest: guest_phys_addr, size: memory_size, offset: mmap_offset };
        let end = mmap_offset.checked_add(memory_size);
        let (Some(end), Some(_), Some(_)) =
            (end, guest_phys_addr.checked_add(memory_size), user_addr.checked_add(memory_size))
        else {
            return Err(bounds);
        };
        if memory_size == 0 || usize::try_from(end).is_err() {
            return Err(bounds);
        }
        if mmap_offset % 4096 != 0 {
            return Err(MemoryError::Unaligned(mmap_offset));
        }
        let meta = file.metadata().map_err(|source| MemoryError::Map { size: 0, source })?;
        // Device files (e.g. /dev/dax) have no size to check.
        if !meta.file_type().is_char_device() && meta.len() < end {
            return Err(MemoryError::FileTooShort { needed: end, found: meta.len() });
        }
        // The block size of a file on hugetlbfs is the size of its pages, to which offset and length must be rounded.
        let page = meta.blksize().next_power_of_two().max(4096);
        let base = mmap_offset & !(page - 1);
        let length =
            (end - base).checked_next_multiple_of(page).and_then(|length| usize::try_from(length).ok());
        let Some(length) = length else { return Err(bounds) };
        let mapping = Arc::new(Mapping::new(file, base, length)?);
        let into = usize::try_from(mmap_offset - base).map_err(|_| bounds)?;
        let host = mapping.base.wrapping_add(into);
        let size = memory_size;
        let register = |fabric: &Fabric| {
            // SAFETY: within the mapping, which the registration holds until no device uses it any more.
            let segment = unsafe { Segment::new(host, usize::try_from(size).unwrap_or(0)) };
            let owner: Arc<Mapping> = Arc::clone(&mapping);
            fabric.register(segment, owner, fabric.exposure())
        };
        let registration = fabric.map(register).transpose();
        let registration = registration.map_err(|source| MemoryError::Register { size, source })?;
        Ok(Self {
            guest: GuestAddress(guest_phys_addr),
            user: user_addr,
            length: memory_size,
            host,
            log: RegionLog::new(Arc::clone(log), guest_phys_addr),
            _registration: registration,
            _mapping: mapping,
        })
    }

    /// Whether this is the region that the front end names so.
    fn is(&self, announced: &VhostUserMemoryRegion) -> bool {
        let VhostUserMemoryRegion { guest_phys_addr, memory_size, .. } = *announced;
        self.guest.0 == guest_phys_addr && self.length == memory_size
    }

    /// The first guest address behind it.
    fn end(&self) -> u64 {
        self.guest.0 + self.length
    }

    /// Where a segment that lies in this region begins in it.
    fn offset_of(&self, segment: &Segment) -> Option<usize> {
        let offset = (segment.base() as usize).checked_sub(self.host as usize)?;
        (offset as u64).checked_add(segment.length() as u64).filter(|end| *end <= self.length)?;
        Some(offset)
    }
}

impl GuestMemoryRegion for Region {
    type B = RegionLog;

    fn len(&self) -> GuestUsize {
        self.length
    }

    fn start_addr(&self) -> GuestAddress {
        self.guest
    }

    fn bitmap(&self) -> RefSlice<'_, RegionLog> {
        self.log.slice_at(0)
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let address = self.check_address(address).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let offset = usize::try_from(address.0).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.host.wrapping_add(offset))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, RegionLog>>, GuestMemoryError> {
        let end = offset.0.checked_add(count as u64).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let start = usize::try_from(offset.0).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        if end > self.length {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        // SAFETY: `start + count` lies within the region, whose mapping lives as long as `self`.
        Ok(unsafe {
            VolatileSlice::with_bitmap(self.host.wrapping_add(start), count, self.log.slice_at(start), None)
        })
    }
}

impl GuestMemoryRegionBytes for Region {}

/// A shared mapping of a part of a file, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    length: usize,
}

// SAFETY: an address and a length; what is done with the memory is up to the region.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out the address and nothing else.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, offset: u64, length: usize) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::Map { size: length, source };
        let offset = libc::off_t::try_from(offset).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        // Keeps guest memory out of core dumps; a failure costs nothing but a larger dump.
        // SAFETY: the range was mapped just above.
        unsafe { libc::madvise(base, length, libc::MADV_DONTDUMP) };
        Ok(Self { base: base.cast(), length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and whoever drops the region holds no pointer into it any more.
        unsafe { libc::munmap(self.base.cast(), self.length) };
    }
}

/// The current table of regions, and the handle through which the rings see it.
#[derive(Debug, Default)]
pub struct MemoryTable {
    current: Arc<GuestMemory>,
    shared: Option<GuestMemoryAtomic<GuestMemory>>,
    /// What regions are registered with.
    fabric: Option<Fabric>,
    /// What is written to any of them is marked here.
    log: Arc<DirtyLog>,
}

impl MemoryTable {
    /// Registers regions that are announced from now on for RDMA.
    pub fn use_fabric(&mut self, fabric: Option<Fabric>) {
        self.fabric = fabric;
    }

    /// The dirty log of all regions.
    #[must_use]
    pub fn log(&self) -> &DirtyLog {
        &self.log
    }

    /// Takes another dirty log, which must have bits for all regions.
    ///
    /// # Errors
    /// When it has not; the old log stands.
    pub fn set_log(&self, map: LogMap) -> Result<(), LogError> {
        self.current.iter().try_for_each(|region| map.check(LOGGED, region.end()))?;
        self.log.set(Some(map));
        Ok(())
    }

    /// The current snapshot.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<GuestMemory> {
        &self.current
    }

    /// The handle that always shows the current snapshot.
    pub fn handle(&mut self) -> GuestMemoryAtomic<GuestMemory> {
        self.shared.get_or_insert_with(|| GuestMemoryAtomic::from(Arc::clone(&self.current))).clone()
    }

    /// Replaces all regions; the old table stands if any of the new ones is refused.
    ///
    /// # Errors
    /// When a region is refused, two overlap, or the dirty log has no bits for one.
    pub fn replace(
        &mut self,
        announced: &[VhostUserMemoryRegion],
        files: &[File],
    ) -> Result<(), MemoryError> {
        let mut regions = Vec::with_capacity(announced.len());
        for (region, file) in announced.iter().zip(files) {
            // A region that is already mapped from the same file could be kept, but the file may have been replaced
            // under the same address; a mapping is cheap next to the risk.
            regions.push(Arc::new(Region::map(region, file, self.fabric.as_ref(), &self.log)?));
        }
        self.install(regions)
    }

    /// Adds a region.
    ///
    /// # Errors
    /// When the region is refused, overlaps another, all slots are taken, or the dirty log has no bits for it.
    pub fn add(&mut self, announced: &VhostUserMemoryRegion, file: &File) -> Result<(), MemoryError> {
        let mut regions = self.regions(|_| true);
        regions.push(Arc::new(Region::map(announced, file, self.fabric.as_ref(), &self.log)?));
        self.install(regions)
    }

    /// Removes a region. It is unmapped when the last request that may use it has completed.
    ///
    /// # Errors
    /// When there is no such region.
    pub fn remove(&mut self, announced: &VhostUserMemoryRegion) -> Result<(), MemoryError> {
        let VhostUserMemoryRegion { guest_phys_addr: guest, memory_size: size, .. } = *announced;
        if !self.current.iter().any(|region| region.is(announced)) {
            return Err(MemoryError::Unknown { guest, size });
        }
        let mut memory = GuestMemory::clone(&self.current);
        if let Ok((rest, _)) = memory.remove_region(GuestAddress(guest), size) {
            memory = rest;
        }
        self.publish(memory);
        Ok(())
    }

    /// Forgets all regions.
    pub fn clear(&mut self) {
        self.publish(GuestMemory::new());
    }

    /// The guest address of an address in the front end's own address space.
    #[must_use]
    pub fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.current.iter().find_map(|region| {
            let offset = user.checked_sub(region.user).filter(|offset| *offset < region.length)?;
            region.guest.checked_add(offset)
        })
    }

    fn regions(&self, keep: impl Fn(&Region) -> bool) -> Vec<Arc<Region>> {
        // `GuestRegionCollection` shows its regions only as references; the clone of the collection is what shares them.
        let mut rest = GuestMemory::clone(&self.current);
        let mut regions = Vec::with_capacity(rest.num_regions() + 1);
        let names: Vec<_> = rest.iter().map(|region| (region.guest, region.length)).collect();
        for (guest, length) in names {
            if let Ok((without, region)) = rest.remove_region(guest, length) {
                rest = without;
                if keep(&region) {
                    regions.push(region);
                }
            }
        }
        regions
    }

    fn install(&mut self, mut regions: Vec<Arc<Region>>) -> Result<(), MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany { found: regions.len() });
        }
        regions.iter().try_for_each(|region| self.log.check(LOGGED, region.end()))?;
        regions.sort_by_key(|region| region.guest);
        if let Some(pair) = regions.windows(2).find(|pair| pair[0].last_addr() >= pair[1].guest) {
            return Err(MemoryError::Overlap(pair[1].guest.0));
        }
        let memory = if regions.is_empty() {
            GuestMemory::new()
        } else {
            let first = regions[0].guest.0;
            GuestMemory::from_arc_regions(regions).map_err(|_| MemoryError::Overlap(first))?
        };
        self.publish(memory);
        Ok(())
    }

    fn publish(&mut self, memory: GuestMemory) {
        if let Some(shared) = &self.shared {
            // A poisoned lock only says that another thread panicked while it replaced the table; there is none.
            shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner).replace(memory.clone());
        }
        self.current = Arc::new(memory);
    }
}

/// Appends the segments of `length` bytes at a guest address, split where regions meet. Says whether all of it lies in
/// guest memory; if not, nothing that was appended may be used.
pub fn translate(memory: &GuestMemory, address: u64, length: u32, segments: &mut Vec<Segment>) -> bool {
    let (mut address, mut left) = (address, u64::from(length));
    while left > 0 {
        let Some(region) = memory.find_region(GuestAddress(address)) else { return false };
        let offset = address - region.guest.0;
        let here = left.min(region.length - offset);
        let (Ok(start), Ok(count)) = (usize::try_from(offset), usize::try_from(here)) else { return false };
        // SAFETY: the range lies within the region; whoever uses the segment holds the snapshot that keeps it mapped.
        segments.push(unsafe { Segment::new(region.host.wrapping_add(start), count) });
        left -= here;
        if left > 0 {
            let Some(next) = address.checked_add(here) else { return false };
            address = next;
        }
    }
    true
}

/// Reads `N` bytes at a guest address, each once. For descriptors and heads: `vm_memory`'s own way costs 40 ns more each,
/// half of what a request costs in all.
#[must_use]
pub fn read<const N: usize>(memory: &GuestMemory, address: GuestAddress) -> Option<[u8; N]> {
    Stretch::new(memory, address)?.read(0)
}

/// Guest memory from an address on, for several reads near each other: their region is looked for once.
#[derive(Clone, Copy, Debug)]
pub struct Stretch<'m> {
    memory: &'m GuestMemory,
    address: GuestAddress,
    region: &'m Region,
}

impl<'m> Stretch<'m> {
    /// What begins at a guest address; `None` if that is outside guest memory.
    #[must_use]
    pub fn new(memory: &'m GuestMemory, address: GuestAddress) -> Option<Self> {
        Some(Self { memory, address, region: memory.find_region(address)? })
    }

    /// Reads `N` bytes, each once, `offset` bytes behind its beginning; `None` if they are outside guest memory. Two bytes at an even
    /// address are of one moment, and so are each eight of several such at a multiple of eight; otherwise each byte may be of another.
    #[must_use]
    pub fn read<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let address = self.address.checked_add(offset)?;
        let offset = address.0 - self.region.guest.0;
        if self.region.length.checked_sub(offset).is_none_or(|left| left < N as u64) {
            // In another region, or across two: rare, and allowed.
            let mut bytes = [0; N];
            return self.memory.read_slice(&mut bytes, address).ok().map(|()| bytes);
        }
        let from = self.region.host.wrapping_add(usize::try_from(offset).ok()?);
        let mut bytes = [0; N];
        let (words, rest) = bytes.as_chunks_mut::<8>();
        if rest.is_empty() && from.addr().is_multiple_of(8) {
            for (at, word) in (0..).zip(words) {
                // SAFETY: the range lies within the region, which stays mapped as long as `memory`, and is aligned; every pattern
                // of bytes is valid, and a volatile read tolerates that the guest writes meanwhile.
                *word = unsafe { from.cast::<u64>().wrapping_add(at).read_volatile() }.to_ne_bytes();
            }
        } else if let ([pair], []) = bytes.as_chunks_mut::<2>()
            && from.addr().is_multiple_of(2)
        {
            // SAFETY: as above.
            *pair = unsafe { from.cast::<u16>().read_volatile() }.to_ne_bytes();
        } else {
            for (at, byte) in (0..).zip(&mut bytes) {
                // SAFETY: as above; bytes need no alignment.
                *byte = unsafe { from.wrapping_add(at).read_volatile() };
            }
        }
        Some(bytes)
    }
}

/// Copies bytes out of guest memory, as far as the segments go; the number copied.
///
/// The guest may write at the same time: each byte is read once, so what was checked is what is used.
pub fn copy_from(segments: &[Segment], bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        let count = segment.length().min(bytes.len() - done);
        // SAFETY: the segment was made by `translate` and its memory is still mapped; a volatile slice tolerates that
        // the guest writes meanwhile.
        let slice = unsafe { VolatileSlice::new(segment.base(), count) };
        slice.copy_to(&mut bytes[done..done + count]);
        done += count;
        if done == bytes.len() {
            break;
        }
    }
    done
}

/// Copies bytes into guest memory, as far as the segments go, and marks them in the dirty log; the number copied.
pub fn copy_to(memory: &GuestMemory, bytes: &[u8], segments: &[Segment]) -> usize {
    let mut done = 0;
    for segment in segments {
        let count = segment.length().min(bytes.len() - done);
        // SAFETY: as in `copy_from`.
        let slice = unsafe { VolatileSlice::new(segment.base(), count) };
        slice.copy_from(&bytes[done..done + count]);
        mark_written(memory, &[segment.part(0, count)]);
        done += count;
        if done == bytes.len() {
            break;
        }
    }
    done
}

/// Marks segments of `memory` in the dirty log. To be called after they were written, by whoever writes past `vm-memory`.
pub fn mark_written(memory: &GuestMemory, segments: &[Segment]) {
    if !dirty_log(memory).is_some_and(DirtyLog::is_active) {
        return;
    }
    for segment in segments {
        // A handful of regions as a rule, and only while the guest is migrated.
        let place = memory.iter().find_map(|region| Some((region, region.offset_of(segment)?)));
        if let Some((region, offset)) = place {
            region.log.mark_dirty(offset, segment.length());
        }
    }
}

/// The log of a table's regions, which is one for all.
#[must_use]
pub fn dirty_log(memory: &GuestMemory) -> Option<&DirtyLog> {
    memory.iter().next().map(|region| region.log.log())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn bytes_are_read_wherever_they_lie_and_nowhere_else() {
        // Two regions that meet, each with bytes of its own that never repeat within it.
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..0x2000u32).map(|at| u8::try_from(at % 251).unwrap()).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let region = |guest_phys_addr, mmap_offset| VhostUserMemoryRegion {
            guest_phys_addr,
            memory_size: 0x1000,
            user_addr: 0,
            mmap_offset,
        };
        let mut table = MemoryTable::default();
        let files = [file.try_clone().unwrap(), file];
        table.replace(&[region(0x4000, 0), region(0x5000, 0x1000)], &files).unwrap();
        let memory = table.snapshot();
        let stretch = Stretch::new(memory, GuestAddress(0x4010)).unwrap();
        let expected = |at: usize, length: usize| Some(&bytes[at - 0x4000..at - 0x4000 + length]);
        // Aligned and not, in its own region, across the border, in the next one, and at the end of that.
        for offset in [0, 1, 3, 8, 0xfe0, 0xfe8, 0xfef, 0xff0, 0xff1, 0x1fe0] {
            let at = 0x4010 + usize::try_from(offset).unwrap();
            assert_eq!(stretch.read::<16>(offset).as_ref().map(|b| &b[..]), expected(at, 16), "{offset:#x}");
            assert_eq!(stretch.read::<2>(offset).as_ref().map(|b| &b[..]), expected(at, 2), "{offset:#x}");
        }
        assert_eq!(stretch.read::<16>(0x1fe1), None, "it ends before");
        assert_eq!(stretch.read::<2>(0x1ff0), None);
        assert_eq!(stretch.read::<1>(u64::MAX), None);
        assert!(Stretch::new(memory, GuestAddress(0x3fff)).is_none());
        assert!(Stretch::new(memory, GuestAddress(0x6000)).is_none());
        assert_eq!(read::<2>(memory, GuestAddress(0x5fff)), None);
    }
}
