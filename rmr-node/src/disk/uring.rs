//! Requests on an io_uring: queued by `start`, handed over in batches, followed until every byte is done. This file holds
//! the `unsafe` of queue entries, which name memory by address.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};
use rmr_common::buffer::{Segment, gather};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::file::DiskFile;
use super::inline::{MAX_ATTEMPTS, zero_segments};
use super::zero::{ZeroCall, ZeroStep, Zeroing};
use super::{AlignedPage, BufferPool, Completion, DiskError, DiskId, Io, IoKind};

/// Most disks whose descriptors are registered, which saves the kernel a look-up for each request. The table has its size from
/// the start, some 64 KiB; disks beyond it are used by plain descriptors.
const REGISTERED_FILES: u16 = 4096;

/// A disk, and whether the ring has its descriptor registered.
#[derive(Debug)]
pub(super) struct RingDisk {
    pub(super) file: DiskFile,
    registered: bool,
}

/// One request in the kernel's hands.
#[derive(Debug, Default)]
struct Request {
    io: Option<Io>,
    /// All of the request's memory.
    segments: Vec<Segment>,
    /// What the entry under way points at, when that is a part or zeroes; must not move until it completed.
    part: Vec<Segment>,
    done: u64,
    attempts: u32,
    /// How far a request for zeroes has come, and the step that is under way. Its memory must not move either.
    zeroing: Zeroing,
    zero_step: Option<ZeroStep>,
}

/// A ring with its requests. Made, used and dropped on one thread.
pub(super) struct Ring {
    ring: IoUring,
    requests: Vec<Request>,
    free: Vec<u32>,
    /// Entries queued that the kernel has not seen.
    queued: usize,
    /// Written by the kernel when there is something to reap. The ring's own descriptor is no substitute: with deferred
    /// task work, polling it misses completions of worker threads until the worker ends, 5 s later (seen on 6.18).
    wakeup: EventFd,
    /// The kernel may have written `wakeup` since it was last read.
    maybe_woken: bool,
    /// First address and length of the registered buffers, in regions of 1 GiB.
    fixed: Option<(usize, usize)>,
    file_slots: u16,
    zeroes: Box<AlignedPage>,
}

impl Ring {
    /// A ring for `depth` requests at a time on up to `disks` disks.
    pub(super) fn new(depth: u32, disks: u16) -> io::Result<Self> {
        let ring = build(depth)?;
        let wakeup = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(wakeup.as_raw_fd())?;
        let file_slots = disks.min(REGISTERED_FILES);
        let file_slots = match ring.submitter().register_files_sparse(u32::from(file_slots)) {
            Ok(()) => file_slots,
            Err(error) => {
                tracing::debug!(
                    "the kernel registers no sparse file table ({error}); plain descriptors are used"
                );
                0
            }
        };
        Ok(Self {
            ring,
            requests: (0..depth).map(|_| Request::default()).collect(),
            free: (0..depth).rev().collect(),
            queued: 0,
            wakeup,
            maybe_woken: false,
            fixed: None,
            file_slots,
            zeroes: AlignedPage::zeroed(),
        })
    }

    /// Registers the pool's memory, so that the kernel need not pin pages for each request.
    pub(super) fn register_buffers(&mut self, pool: &BufferPool) -> io::Result<()> {
        let regions = pool.regions();
        let vectors: Vec<libc::iovec> =
            regions.iter().map(|r| libc::iovec { iov_base: r.base().cast(), iov_len: r.length() }).collect();
        // SAFETY: a pool's memory stays mapped for the life of the process.
        unsafe { self.ring.submitter().register_buffers(&vectors) }?;
        self.fixed = regions.first().map(|first| (first.base() as usize, pool.total_bytes()));
        Ok(())
    }

    pub(super) const fn has_registered_buffers(&self) -> bool {
        self.fixed.is_some()
    }

    pub(super) fn add_disk(&mut self, index: u16, file: DiskFile) -> RingDisk {
        let registered = index < self.file_slots
            && self.ring.submitter().register_files_update(u32::from(index), &[file.fd()]).is_ok();
        RingDisk { file, registered }
    }

    pub(super) fn remove_disk(&mut self, index: u16, disk: &RingDisk) {
        if disk.registered
            && let Err(error) = self.ring.submitter().register_files_update(u32::from(index), &[-1])
        {
            tracing::warn!("disk {index} stays open in the ring: {error}");
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.wakeup.as_raw_fd()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    /// Whether a request on this disk is under way.
    pub(super) fn uses(&self, disk: DiskId) -> bool {
        self.requests.iter().flat_map(|r| &r.io).any(|io| io.disk == disk)
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Queues a request that has passed [`DiskFile::check`]; there must be room. A request that fails or is done at once
    /// comes back as its completion.
    pub(super) fn start(&mut self, disk: &RingDisk, mut io: Io) -> Option<Completion> {
        let slot = self.free.pop().expect("the caller asked has_room");
        let request = &mut self.requests[slot as usize];
        request.segments.clear();
        io.payload.segments(&mut request.segments);
        (request.done, request.attempts, request.zero_step) = (0, 0, None);
        let at_once = match disk.file.check_memory(&io, &request.segments) {
            Ok(()) if io.length == 0 && io.kind != IoKind::Flush => Some(Ok(())),
            Ok(()) if io.kind.makes_zeroes() => {
                request.zeroing = Zeroing::new(&disk.file, &io);
                request.zero_step = request.zeroing.next(&disk.file, &io);
                request.zero_step.is_none().then_some(Ok(()))
            }
            Ok(()) => None,
            Err(error) => Some(Err(error)),
        };
        if let Some(result) = at_once {
            self.free.push(slot);
            return Some(io.complete(result));
        }
        request.io = Some(io);
        self.queue(slot, disk);
        None
    }

    /// Hands the queued entries to the kernel, and lets it do its deferred work.
    pub(super) fn enter(&mut self) {
        self.maybe_woken = true;
        for _ in 0..MAX_ATTEMPTS {
            // A short submission leaves the rest in the queue, which `submit` then goes on with.
            match self.ring.submit() {
                Ok(taken) => self.queued -= taken.min(self.queued),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    // Completions must be taken out first; they make the descriptor readable, so this is called again.
                    Some(libc::EAGAIN | libc::EBUSY) if self.in_flight() > self.queued => return,
                    Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => {
                        tracing::error!("io_uring does not take requests: {error}");
                        return;
                    }
                },
            }
            if self.queued == 0 {
                return;
            }
        }
    }

    /// Makes `wakeup` unreadable again. To be called before completions are taken and before `wants_enter` is asked, so
    /// that what comes later makes it readable anew.
    pub(super) fn quench(&mut self) {
        if std::mem::take(&mut self.maybe_woken) || self.in_flight() > 0 {
            // That there was nothing to read is as good.
            let _ = self.wakeup.read();
            self.maybe_woken = self.in_flight() > 0;
        }
    }

    /// Waits until at least one request completed, if any is under way.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        if self.in_flight() == 0 {
            return Ok(());
        }
        match self.ring.submit_and_wait(1) {
            Ok(taken) => {
                self.queued -= taken.min(self.queued);
                Ok(())
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the kernel has work that only `enter` lets it do, or there are entries that it has not seen.
    pub(super) fn wants_enter(&mut self) -> bool {
        self.queued > 0 || self.ring.submission().taskrun() || self.ring.submission().cq_overflow()
    }

    /// Whether there is something to take.
    pub(super) fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Takes what completed; a request of which a part is left is queued again.
    pub(super) fn reap<'a>(
        &mut self,
        disk_of: impl Fn(&Io) -> Option<&'a RingDisk>,
        out: &mut Vec<Completion>,
    ) {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else { return };
            let slot = u32::try_from(entry.user_data()).expect("written by `queue` from a u32");
            let request = &mut self.requests[slot as usize];
            let io = request.io.as_ref().expect("an entry completes once");
            let Some(disk) = disk_of(io) else {
                // Disks are removed only when nothing is in flight on them.
                let error = DiskError::NoSuchDisk(io.disk);
                self.finish(slot, Err(error), out);
                continue;
            };
            match request.after(&disk.file, entry.result()) {
                Some(result) => self.finish(slot, result, out),
                None => self.queue(slot, disk),
            }
        }
    }

    fn finish(&mut self, slot: u32, result: Result<(), DiskError>, out: &mut Vec<Completion>) {
        let request = &mut self.requests[slot as usize];
        if let Some(io) = request.io.take() {
            out.push(io.complete(result));
        }
        request.zeroing = Zeroing::default();
        self.free.push(slot);
    }

    fn queue(&mut self, slot: u32, disk: &RingDisk) {
        let request = &mut self.requests[slot as usize];
        let entry = request.entry(disk, self.fixed, &mut self.zeroes).user_data(u64::from(slot));
        // SAFETY: the entry's memory is that of the request's payload, of its comparison, its list of parts, or the ring's
        // zero page; all are held unmoved until the completion, also by `drop`, which waits.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue has an entry for each request, and a request has one entry at a time");
        self.queued += 1;
    }
}

impl Drop for Ring {
    /// Waits for what is under way: the kernel writes into memory that is about to be freed.
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if let Err(error) = self.wait() {
                tracing::error!("waiting for disk I/O under way: {error}; its memory is kept");
                // Whatever the kernel still points at must outlive the process's use of it.
                std::mem::forget(std::mem::take(&mut self.requests));
                return;
            }
            for entry in self.ring.completion() {
                if let Ok(slot) = u32::try_from(entry.user_data()) {
                    self.requests[slot as usize].io = None;
                    self.free.push(slot);
                }
            }
        }
        // The kernel tears a ring down some time after it is closed; a device must be free for others before that.
        if self.file_slots > 0
            && let Err(error) = self.ring.submitter().unregister_files()
        {
            tracing::warn!("io_uring keeps its files until it is gone: {error}");
        }
    }
}

impl Request {
    /// The entry for what is left to do.
    fn entry(
        &mut self,
        disk: &RingDisk,
        fixed: Option<(usize, usize)>,
        zeroes: &mut AlignedPage,
    ) -> squeue::Entry {
        let io = self.io.as_ref().expect("queued requests have one");
        let (kind, mut offset) = (io.kind, io.offset + self.done);
        // The same operation on a registered or a plain descriptor.
        macro_rules! on_disk {
            (|$fd:ident| $entry:expr) => {
                if disk.registered {
                    let $fd = types::Fixed(u32::from(io.disk.0));
                    $entry
                } else {
                    let $fd = types::Fd(disk.file.fd());
                    $entry
                }
            };
        }
        let write = match kind {
            IoKind::Flush => {
                let flags = types::FsyncFlags::DATASYNC;
                return on_disk!(|fd| opcode::Fsync::new(fd).flags(flags).build());
            }
            IoKind::FlushMetadata => {
                let fd = types::Fd(disk.file.metadata_file().as_raw_fd());
                return opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
            }
            IoKind::Read | IoKind::Write => {
                self.part.clear();
                let skip = usize::try_from(self.done).expect("below the length of memory");
                gather(&self.segments, skip, usize::MAX, &mut self.part);
                self.part.truncate(super::sys::MAX_SEGMENTS);
                kind == IoKind::Write
            }
            IoKind::Discard | IoKind::WriteZeroes { .. } | IoKind::EnsureZero => {
                let step = self.zero_step.expect("chosen before the request was queued");
                offset = io.offset + step.at;
                match step.call {
                    ZeroCall::Fallocate(mode) => {
                        return on_disk!(|fd| {
                            opcode::Fallocate::new(fd, step.length).offset(offset).mode(mode).build()
                        });
                    }
                    ZeroCall::Write => zero_segments(zeroes, step.length, &mut self.part),
                    ZeroCall::Compare => self.zeroing.memory(step.length, &mut self.part),
                }
                step.call == ZeroCall::Write
            }
        };
        let count = u32::try_from(self.part.len()).expect("at most 1024");
        let vectors: *const libc::iovec = self.part.as_ptr().cast();
        match (one_region(&self.part, fixed), write) {
            (Some((base, bytes, index)), true) => {
                on_disk!(|fd| opcode::WriteFixed::new(fd, base, bytes, index).offset(offset).build())
            }
            (Some((base, bytes, index)), false) => {
                on_disk!(|fd| opcode::ReadFixed::new(fd, base, bytes, index).offset(offset).build())
            }
            (None, true) => on_disk!(|fd| opcode::Writev::new(fd, vectors, count).offset(offset).build()),
            (None, false) => on_disk!(|fd| opcode::Readv::new(fd, vectors, count).offset(offset).build()),
        }
    }

    /// What the result of an entry means: the request's result, or `None` when there is more to do.
    fn after(&mut self, disk: &DiskFile, result: i32) -> Option<Result<(), DiskError>> {
        let io = self.io.as_ref().expect("an entry completes once");
        let result = u64::try_from(result).map_err(|_| -result);
        if let Err(errno) = result
            && io.kind.is_flush()
        {
            disk.forget_unwritten();
            return Some(Err(io.errno(errno)));
        }
        if matches!(result, Err(libc::EINTR | libc::EAGAIN)) && self.attempts < MAX_ATTEMPTS {
            self.attempts += 1;
            return None;
        }
        if let Some(step) = self.zero_step {
            if let Err(error) = self.zeroing.ended(disk, io, step, result) {
                return Some(Err(error));
            }
            self.attempts = 0;
            self.zero_step = self.zeroing.next(disk, io);
            return self.zero_step.is_none().then_some(Ok(()));
        }
        let moved = match result {
            Ok(moved) => moved,
            Err(errno) => return Some(Err(io.errno(errno))),
        };
        if io.kind.is_flush() {
            return Some(Ok(()));
        }
        if moved == 0 {
            return Some(Err(DiskError::Truncated { offset: io.offset + self.done, size: disk.size() }));
        }
        self.done += moved;
        self.attempts = 0;
        (self.done >= io.length).then_some(Ok(()))
    }
}

/// The segment and its buffer index, when the list is one segment within registered memory.
fn one_region(part: &[Segment], fixed: Option<(usize, usize)>) -> Option<(*mut u8, u32, u16)> {
    let (&[segment], Some((first, total))) = (part, fixed) else { return None };
    let from = (segment.base() as usize).checked_sub(first)?;
    let end = from.checked_add(segment.length())?;
    let region = from >> 30;
    if end > total || (end - 1) >> 30 != region {
        return None;
    }
    Some((segment.base(), u32::try_from(segment.length()).ok()?, u16::try_from(region).ok()?))
}

/// The ring with as many of the useful flags as this kernel knows: completions are then processed on this thread, when
/// it asks for them, without interrupting it.
fn build(depth: u32) -> io::Result<IoUring> {
    let refused = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    let best = IoUring::builder()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(depth);
    match best {
        Err(error) if refused(&error) => {}
        result => return result,
    }
    match IoUring::builder().setup_coop_taskrun().setup_taskrun_flag().build(depth) {
        Err(error) if refused(&error) => IoUring::builder().build(depth),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::Payload;
    use super::*;

    /// What the kernel is taken to have moved before it stopped: within a page, and within the second segment.
    const MOVED: usize = 4096 + 512;
    const LENGTH: usize = 3 * 4096;

    fn pattern() -> Vec<u8> {
        (0u32..).flat_map(u32::to_le_bytes).take(LENGTH).collect()
    }

    /// Lets a transfer stop after `MOVED` bytes, and the ring carry out what is left of it.
    fn continue_short(ring: &mut Ring, disk: &RingDisk, kind: IoKind, memory: Payload) -> Payload {
        let (id, length) = (DiskId(0), LENGTH as u64);
        let mut request = Request {
            io: Some(Io { disk: id, id: 1, kind, offset: 4096, length, payload: memory }),
            ..Request::default()
        };
        request.io.as_mut().unwrap().payload.segments(&mut request.segments);
        request.entry(disk, ring.fixed, &mut ring.zeroes);
        assert_eq!(request.after(&disk.file, i32::try_from(MOVED).unwrap()), None, "more is to be done");
        let rest = request.entry(disk, ring.fixed, &mut ring.zeroes);
        // SAFETY: `request` holds the memory and outlives the wait below.
        unsafe { ring.ring.submission().push(&rest) }.unwrap();
        ring.ring.submit_and_wait(1).unwrap();
        let moved = ring.ring.completion().next().unwrap().result();
        assert_eq!(moved, i32::try_from(LENGTH - MOVED).unwrap());
        assert_eq!(request.after(&disk.file, moved), Some(Ok(())));
        request.io.take().unwrap().payload
    }

    fn bytes(payload: &Payload) -> Vec<u8> {
        match payload {
            Payload::Buffer(buffer) => buffer.bytes().to_vec(),
            Payload::Buffers(buffers) => buffers.iter().flat_map(|b| b.bytes().to_vec()).collect(),
            other => panic!("no bytes of {other:?}"),
        }
    }

    #[test]
    fn a_transfer_that_stopped_short_goes_on_where_it_stopped_in_memory_and_on_disk() {
        for (is_registered, is_list) in [(false, false), (false, true), (true, false), (true, true)] {
            let case = format!("registered {is_registered}, list {is_list}");
            let pool = BufferPool::new(1 << 20).unwrap();
            let mut ring = Ring::new(8, 1).unwrap();
            if is_registered {
                ring.register_buffers(&pool).unwrap();
            }
            // In memory, where any byte may begin a transfer.
            let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
            file.as_file().set_len(8 * 4096).unwrap();
            let disk = ring.add_disk(0, DiskFile::new(file.reopen().unwrap(), 8 * 4096).unwrap());
            let memory = |content: &[u8]| {
                let lengths = if is_list { &[4096, 4096, 4096][..] } else { &[LENGTH][..] };
                let mut buffers: Vec<_> = lengths.iter().map(|l| pool.try_acquire(*l).unwrap()).collect();
                let mut at = 0;
                for buffer in &mut buffers {
                    let length = buffer.length();
                    buffer.bytes_mut().copy_from_slice(&content[at..at + length]);
                    at += length;
                }
                if is_list { Payload::Buffers(buffers) } else { Payload::Buffer(buffers.remove(0)) }
            };
            // The first part counts as moved, and was not.
            let mut expected = vec![0; LENGTH];
            expected[MOVED..].copy_from_slice(&pattern()[MOVED..]);

            continue_short(&mut ring, &disk, IoKind::Write, memory(&pattern()));
            let mut found = vec![9; LENGTH];
            file.as_file().read_exact_at(&mut found, 4096).unwrap();
            assert!(found == expected, "{case}: the disk has something else");

            file.as_file().write_all_at(&pattern(), 4096).unwrap();
            let read = continue_short(&mut ring, &disk, IoKind::Read, memory(&[0; LENGTH]));
            assert!(bytes(&read) == expected, "{case}: the memory has something else");
        }
    }
}
