//! The engine on real files: in memory, on a disk with direct I/O, on a loop device, and where things go wrong.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use super::*;

const DISK: u64 = 4 << 20;

/// A file of `DISK` bytes in `directory`, gone when the test ends.
fn disk_in(directory: &str) -> (tempfile::NamedTempFile, DiskFile) {
    let file = tempfile::NamedTempFile::new_in(directory).unwrap();
    file.as_file().set_len(DISK).unwrap();
    let disk = DiskFile::new(file.reopen().unwrap(), DISK).unwrap();
    (file, disk)
}

fn engine(choice: EngineChoice) -> DiskEngine {
    DiskEngine::new(EngineOptions { choice, queue_depth: 16, disks: 4 }).unwrap()
}

fn io(disk: DiskId, id: u64, kind: IoKind, offset: u64, length: u64, payload: Payload) -> Io {
    Io { disk, id, kind, offset, length, payload }
}

/// Runs one request to its end.
fn run(engine: &mut DiskEngine, request: Io) -> Completion {
    let mut out = Vec::new();
    engine.submit(request);
    engine.flush_submissions();
    engine.wait_completions(&mut out).unwrap();
    assert_eq!((out.len(), engine.in_flight()), (1, 0));
    out.pop().unwrap()
}

fn bytes_of(payload: &Payload) -> Vec<u8> {
    match payload {
        Payload::Buffer(buffer) => buffer.bytes().to_vec(),
        Payload::Buffers(buffers) => buffers.iter().flat_map(|b| b.bytes().to_vec()).collect(),
        Payload::Page(page) => page.bytes().to_vec(),
        other => panic!("no bytes of {other:?}"),
    }
}

/// 10,000 requests at random, up to 40 in flight on ranges that do not overlap, against a copy in memory.
fn random_requests_agree_with_memory(engine: DiskEngine, file: DiskFile, unit: u64) {
    requests_agree_with_memory(engine, file, unit, 10_000);
}

fn requests_agree_with_memory(mut engine: DiskEngine, file: DiskFile, unit: u64, requests: u64) {
    let pool = BufferPool::new(64 << 20).unwrap();
    engine.register_buffers(&pool);
    let disk = engine.add_disk(file).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let mut random = |below: u64| rng.next_u64() % below;
    let mut oracle = vec![0u8; usize::try_from(DISK).unwrap()];
    let mut out = Vec::new();
    let mut done = 0;
    let mut id = 0;
    while done < requests {
        let mut taken: Vec<(u64, u64)> = Vec::new();
        let mut expected: Vec<(u64, Vec<u8>)> = Vec::new();
        for _ in 0..40 {
            id += 1;
            let longest = if random(8) == 0 { 600 } else { 20 };
            let length = (1 + random(longest)) * unit;
            let length = length.min(DISK / 2);
            let offset = random((DISK - length) / unit + 1) * unit;
            if taken.iter().any(|&(o, l)| offset < o + l && o < offset + length) {
                continue;
            }
            taken.push((offset, length));
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
            let (kind, payload) = match random(100) {
                0..7 => (IoKind::Discard, Payload::None),
                7..10 => (IoKind::EnsureZero, Payload::None),
                10..20 => (IoKind::WriteZeroes { unmap: true }, Payload::None),
                20..30 => (IoKind::WriteZeroes { unmap: false }, Payload::None),
                30 => (IoKind::Flush, Payload::None),
                31 => (IoKind::FlushMetadata, Payload::None),
                n => {
                    let mut list = Vec::new();
                    let pieces = if random(2) == 0 || length < 2 * unit {
                        vec![length]
                    } else {
                        vec![unit, length - unit]
                    };
                    for piece in pieces {
                        assert!(pool.try_acquire_list(usize::try_from(piece).unwrap(), &mut list));
                    }
                    if n < 70 {
                        list.iter_mut().for_each(|b| rng_fill(&mut random, b.bytes_mut()));
                    }
                    let kind = if n < 70 { IoKind::Write } else { IoKind::Read };
                    let payload = if list.len() == 1 {
                        Payload::Buffer(list.remove(0))
                    } else {
                        Payload::Buffers(list)
                    };
                    (kind, payload)
                }
            };
            match kind {
                IoKind::Read => expected.push((id, oracle[range].to_vec())),
                IoKind::Write => oracle[range].copy_from_slice(&bytes_of(&payload)),
                IoKind::Flush | IoKind::FlushMetadata => {}
                IoKind::Discard | IoKind::WriteZeroes { .. } | IoKind::EnsureZero => oracle[range].fill(0),
            }
            engine.submit(io(disk, id, kind, offset, length, payload));
            done += 1;
        }
        engine.flush_submissions();
        out.clear();
        while engine.in_flight() > 0 {
            engine.wait_completions(&mut out).unwrap();
        }
        for completion in &out {
            assert_eq!(completion.result, Ok(()));
            if let Some((_, bytes)) = expected.iter().find(|(id, _)| *id == completion.id) {
                assert!(
                    bytes_of(&completion.payload) == *bytes,
                    "request {} read something else",
                    completion.id
                );
            }
        }
        assert_eq!(out.len(), taken.len());
    }
    out.clear();
    assert_eq!(pool.free_bytes(), pool.total_bytes(), "a buffer was lost");
}

fn rng_fill(random: &mut impl FnMut(u64) -> u64, bytes: &mut [u8]) {
    for word in bytes.chunks_mut(8) {
        let value = random(u64::MAX).to_le_bytes();
        word.copy_from_slice(&value[..word.len()]);
    }
}

#[test]
fn requests_in_memory_agree_with_an_oracle_inline_and_on_the_ring() {
    for choice in [EngineChoice::Auto, EngineChoice::Uring] {
        let (_file, disk) = disk_in("/dev/shm");
        assert_eq!((disk.medium(), disk.is_direct()), (Medium::Memory, false));
        random_requests_agree_with_memory(engine(choice), disk, 512);
    }
}

#[test]
fn requests_on_a_disk_agree_with_an_oracle_on_the_ring_and_inline() {
    for choice in [EngineChoice::Auto, EngineChoice::Inline] {
        let (_file, disk) = disk_in("/tmp");
        if disk.medium() == Medium::Memory {
            eprintln!("NOT RUN: /tmp is in memory here, there is no disk to test direct I/O on");
            return;
        }
        assert!(disk.is_direct(), "/tmp has no direct I/O");
        let unit = u64::from(disk.alignment());
        random_requests_agree_with_memory(engine(choice), disk, unit);
    }
}

/// Engines and places that differ in how zeroes are made, as far as this machine has them.
fn places() -> Vec<(EngineChoice, &'static str)> {
    let all = [
        (EngineChoice::Uring, "/tmp"),
        (EngineChoice::Inline, "/tmp"),
        (EngineChoice::Uring, "/dev/shm"),
        (EngineChoice::Inline, "/dev/shm"),
    ];
    all.into_iter().filter(|(_, directory)| disk_in(directory).1.punches_holes()).collect()
}

/// What of `fallocate` a disk is to do without: punching, making ranges zero.
const WITHOUT: [(bool, bool); 3] = [(false, false), (true, false), (true, true)];

#[test]
fn requests_agree_with_an_oracle_where_the_disk_cannot_punch_or_zero_ranges() {
    for (choice, directory) in places() {
        for (punch, zero_range) in [(true, false), (true, true)] {
            let (_file, disk) = disk_in(directory);
            let disk = disk.without(punch, zero_range);
            let unit = u64::from(disk.alignment()).max(512);
            requests_agree_with_memory(engine(choice), disk, unit, 500);
        }
    }
}

/// Bytes that a file has allocated.
fn allocated(file: &File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

/// Writes `byte` to a range, in one request.
fn fill(engine: &mut DiskEngine, disk: DiskId, offset: u64, length: u64, byte: u8) {
    let pool = BufferPool::new(usize::try_from(length).unwrap()).unwrap();
    let mut list = Vec::new();
    assert!(pool.try_acquire_list(usize::try_from(length).unwrap(), &mut list));
    list.iter_mut().for_each(|buffer| buffer.bytes_mut().fill(byte));
    let end = run(engine, io(disk, 1, IoKind::Write, offset, length, Payload::Buffers(list)));
    assert_eq!(end.result, Ok(()));
}

#[test]
fn what_is_to_read_as_zeroes_and_does_already_is_left_alone_and_other_content_becomes_a_hole() {
    const STEP: u64 = super::zero::COMPARED;
    for (choice, directory) in places() {
        for (punch, zero_range) in WITHOUT {
            let case = format!("{choice:?} in {directory} without {punch} {zero_range}");
            let (file, disk) = disk_in(directory);
            let mut engine = engine(choice);
            let disk = engine.add_disk(disk.without(punch, zero_range)).unwrap();
            for kind in [IoKind::EnsureZero, IoKind::Discard, IoKind::WriteZeroes { unmap: true }] {
                let end = run(&mut engine, io(disk, 1, kind, 0, DISK, Payload::None));
                assert_eq!(
                    (end.result, allocated(file.as_file())),
                    (Ok(()), 0),
                    "{case}: {kind:?} of a hole"
                );
            }
            // Old data in the middle of what must become zeroes, and on both sides of it.
            fill(&mut engine, disk, STEP, 4 * STEP, 0xab);
            let end = run(
                &mut engine,
                io(disk, 1, IoKind::EnsureZero, 2 * STEP - 4096, STEP + 8192, Payload::None),
            );
            assert_eq!(end.result, Ok(()), "{case}");
            let bytes = std::fs::read(file.path()).unwrap();
            let is_data = |at: usize| {
                let at = at as u64;
                (STEP..2 * STEP - 4096).contains(&at) || (3 * STEP + 4096..5 * STEP).contains(&at)
            };
            for (at, byte) in bytes.iter().enumerate() {
                assert_eq!(*byte, if is_data(at) { 0xab } else { 0 }, "{case}: byte {at}");
            }
            if !punch {
                assert_eq!(allocated(file.as_file()), 3 * STEP - 8192, "{case}");
            }
            let end = run(&mut engine, io(disk, 1, IoKind::EnsureZero, 0, DISK, Payload::None));
            assert_eq!(end.result, Ok(()), "{case}");
            assert!(std::fs::read(file.path()).unwrap().iter().all(|&byte| byte == 0), "{case}");
            let most = if punch { 4 * STEP } else { 0 };
            assert!(allocated(file.as_file()) <= most, "{case}: {} bytes", allocated(file.as_file()));
        }
    }
}

#[test]
fn zeroes_that_must_stay_allocated_are() {
    for (choice, directory) in places() {
        for (punch, zero_range) in WITHOUT {
            let (file, disk) = disk_in(directory);
            let mut engine = engine(choice);
            let disk = engine.add_disk(disk.without(punch, zero_range)).unwrap();
            let kind = IoKind::WriteZeroes { unmap: false };
            let end = run(&mut engine, io(disk, 1, kind, 0, DISK, Payload::None));
            assert_eq!(end.result, Ok(()));
            assert!(allocated(file.as_file()) >= DISK, "{choice:?} in {directory}");
        }
    }
}

#[test]
fn a_block_device_reads_as_zeroes_afterwards_and_its_thin_file_stays_thin() {
    for (choice, (punch, zero_range)) in
        [EngineChoice::Uring, EngineChoice::Inline].into_iter().flat_map(|c| WITHOUT.map(|w| (c, w)))
    {
        let Some(device) = LoopDevice::new(DISK) else { return };
        let file =
            File::options().read(true).write(true).custom_flags(libc::O_EXCL).open(&device.path).unwrap();
        let mut engine = engine(choice);
        let disk = DiskFile::new(file, DISK).unwrap().without(punch, zero_range);
        let disk = engine.add_disk(disk).unwrap();
        let whole = |kind| io(disk, 1, kind, 0, DISK, Payload::None);
        assert_eq!(run(&mut engine, whole(IoKind::EnsureZero)).result, Ok(()));
        assert_eq!(device.allocated(), 0, "{choice:?} without {punch} {zero_range}");
        fill(&mut engine, disk, 1 << 20, 1 << 20, 0xcd);
        assert_eq!(run(&mut engine, whole(IoKind::EnsureZero)).result, Ok(()));
        let page = || Payload::Buffer(BufferPool::new(1 << 20).unwrap().try_acquire(1 << 20).unwrap());
        for at in 0..DISK >> 20 {
            let end = run(&mut engine, io(disk, 1, IoKind::Read, at << 20, 1 << 20, page()));
            assert!(end.result.is_ok() && bytes_of(&end.payload).iter().all(|&byte| byte == 0));
        }
        assert!(device.allocated() <= 1 << 20, "{choice:?} without {punch} {zero_range}");
    }
}

#[test]
fn memory_is_served_inline_and_disks_on_the_ring_unless_told_otherwise() {
    let inline = |choice, directory| {
        let (_file, disk) = disk_in(directory);
        let mut engine = engine(choice);
        let id = engine.add_disk(disk).unwrap();
        engine.is_inline(id)
    };
    assert!(inline(EngineChoice::Auto, "/dev/shm") && inline(EngineChoice::Inline, "/tmp"));
    assert!(!inline(EngineChoice::Auto, "/tmp") && !inline(EngineChoice::Uring, "/dev/shm"));
}

#[test]
fn the_descriptor_is_readable_when_something_completed_and_not_before() {
    let (_file, disk) = disk_in("/tmp");
    let mut engine = engine(EngineChoice::Uring);
    let disk = engine.add_disk(disk).unwrap();
    let fd = engine.fd().unwrap();
    let pool = BufferPool::new(1 << 20).unwrap();
    let soon = std::time::Duration::from_secs(10);
    let mut out = Vec::new();
    for round in 0..100 {
        assert!(!sys::wait_readable(fd, std::time::Duration::ZERO), "readable while idle");
        let kinds = [IoKind::Write, IoKind::Flush, IoKind::Read];
        let kind = kinds[round % 3];
        let payload = if kind == IoKind::Flush {
            Payload::None
        } else {
            Payload::Buffer(pool.try_acquire(4096).unwrap())
        };
        engine.submit(io(disk, round as u64, kind, 8192, 4096, payload));
        engine.flush_submissions();
        while out.is_empty() {
            assert!(sys::wait_readable(fd, soon), "not readable though {kind:?} must have completed");
            engine.completions(&mut out);
        }
        assert_eq!(out.pop().unwrap().result, Ok(()));
    }
}

#[test]
fn more_requests_than_the_queue_is_deep_wait_and_all_complete() {
    let (_file, disk) = disk_in("/tmp");
    let mut engine = engine(EngineChoice::Uring);
    let disk = engine.add_disk(disk).unwrap();
    for id in 0..500u64 {
        let mut page = AlignedPage::zeroed();
        page.bytes_mut()[..8].copy_from_slice(&id.to_le_bytes()[..8]);
        engine.submit(io(disk, id, IoKind::Write, id * 4096, 4096, Payload::Page(page)));
    }
    assert_eq!(engine.in_flight(), 500);
    let mut out = Vec::new();
    while engine.in_flight() > 0 {
        engine.wait_completions(&mut out).unwrap();
    }
    let mut ids: Vec<u64> = out.iter().map(|c| c.id).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..500) && out.iter().all(|c| c.result.is_ok()));
    let last =
        run(&mut engine, io(disk, 0, IoKind::Read, 499 * 4096, 4096, Payload::Page(AlignedPage::zeroed())));
    assert_eq!(bytes_of(&last.payload)[..8], 499u64.to_le_bytes());
}

#[test]
fn what_reaches_past_the_end_or_is_misaligned_is_refused_and_changes_nothing() {
    for (choice, directory) in [(EngineChoice::Uring, "/tmp"), (EngineChoice::Inline, "/dev/shm")] {
        let (file, disk) = disk_in(directory);
        let direct = disk.is_direct();
        let mut engine = engine(choice);
        let disk = engine.add_disk(disk).unwrap();
        let page = || Payload::Page(AlignedPage::zeroed());
        let mut error = |kind, offset, length, payload| {
            run(&mut engine, io(disk, 1, kind, offset, length, payload)).result.unwrap_err()
        };
        assert!(matches!(error(IoKind::Read, DISK, 4096, page()), DiskError::OutOfRange { .. }));
        assert!(matches!(error(IoKind::Write, DISK - 512, 4096, page()), DiskError::OutOfRange { .. }));
        assert!(matches!(error(IoKind::Write, u64::MAX - 100, 4096, page()), DiskError::OutOfRange { .. }));
        assert!(matches!(error(IoKind::Discard, DISK, 4096, Payload::None), DiskError::OutOfRange { .. }));
        let wrong = error(IoKind::Write, 0, 8192, page());
        assert_eq!(wrong, DiskError::PayloadLength { expected: 8192, found: 4096 });
        if direct {
            assert!(matches!(error(IoKind::Read, 100, 4096, page()), DiskError::Misaligned { .. }));
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), DISK);
    }
}

#[test]
fn a_file_that_was_truncated_underneath_gives_an_error() {
    for choice in [EngineChoice::Uring, EngineChoice::Inline] {
        let (file, disk) = disk_in("/tmp");
        let mut engine = engine(choice);
        let disk = engine.add_disk(disk).unwrap();
        file.as_file().set_len(8192).unwrap();
        let pool = BufferPool::new(1 << 20).unwrap();
        let payload = Payload::Buffer(pool.try_acquire(8192).unwrap());
        let end = run(&mut engine, io(disk, 1, IoKind::Read, 4096, 8192, payload));
        // Half of it is there: the rest is asked for again, and the end of the file is then certain.
        assert_eq!(end.result, Err(DiskError::Truncated { offset: 8192, size: DISK }));
    }
}

#[test]
fn a_descriptor_that_cannot_do_it_gives_the_kernels_error() {
    for choice in [EngineChoice::Uring, EngineChoice::Inline] {
        let (file, _) = disk_in("/tmp");
        std::fs::write(file.path(), vec![1; usize::try_from(DISK).unwrap()]).unwrap();
        let read_only = DiskFile::new(File::open(file.path()).unwrap(), DISK).unwrap();
        let mut engine = engine(choice);
        let disk = engine.add_disk(read_only).unwrap();
        let page = || Payload::Page(AlignedPage::zeroed());
        for (kind, payload) in [(IoKind::Write, page()), (IoKind::Discard, Payload::None)] {
            let end = run(&mut engine, io(disk, 1, kind, 0, 4096, payload));
            assert_eq!(end.result.unwrap_err().errno(), libc::EBADF, "{kind:?}");
        }
        assert_eq!(run(&mut engine, io(disk, 1, IoKind::Read, 0, 4096, page())).result, Ok(()));
    }
}

#[test]
fn unknown_and_removed_disks_are_refused() {
    let (_file, disk) = disk_in("/tmp");
    let mut engine = engine(EngineChoice::Auto);
    let id = engine.add_disk(disk).unwrap();
    engine.remove_disk(id).unwrap();
    assert!(engine.remove_disk(id).is_err());
    let end = run(&mut engine, io(id, 1, IoKind::Flush, 0, 0, Payload::None));
    assert_eq!(end.result, Err(DiskError::NoSuchDisk(id)));
    for _ in 0..4 {
        engine.add_disk(disk_in("/tmp").1).unwrap();
    }
    assert!(engine.add_disk(disk_in("/tmp").1).is_err());
}

#[test]
fn a_disk_can_be_removed_while_others_work_but_not_while_it_works_itself() {
    let ((_busy_file, busy), (_idle_file, idle)) = (disk_in("/tmp"), disk_in("/tmp"));
    let mut engine = engine(EngineChoice::Uring);
    let (busy, idle) = (engine.add_disk(busy).unwrap(), engine.add_disk(idle).unwrap());
    for id in 0..16 {
        engine.submit(io(busy, id, IoKind::Write, 0, 4096, Payload::Page(AlignedPage::zeroed())));
    }
    assert!(engine.remove_disk(busy).is_err());
    engine.remove_disk(idle).unwrap();
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        engine.wait_completions(&mut done).unwrap();
    }
    engine.remove_disk(busy).unwrap();
}

#[test]
fn an_engine_dropped_with_requests_in_flight_waits_for_them() {
    let (file, disk) = disk_in("/tmp");
    let mut engine = engine(EngineChoice::Uring);
    let disk = engine.add_disk(disk).unwrap();
    for id in 0..16 {
        let page = AlignedPage::from_bytes(&[0xab; 4096]);
        engine.submit(io(disk, id, IoKind::Write, id * 4096, 4096, Payload::Page(page)));
    }
    engine.flush_submissions();
    drop(engine);
    let bytes = std::fs::read(file.path()).unwrap();
    assert!(bytes[..16 * 4096].iter().all(|&b| b == 0xab));
}

/// A tmpfs of 1 MiB, unmounted when the test ends; `None` (said loudly) where mounting is not allowed.
struct TinyFileSystem(tempfile::TempDir);

impl TinyFileSystem {
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(directory.path())
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            eprintln!("NOT RUN: no tmpfs can be mounted here, so 'no space' is not tested");
            return None;
        }
        Some(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for TinyFileSystem {
    fn drop(&mut self) {
        // Lazily: the kernel tears a closed ring down in its own time, and with it the last use of a file.
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn no_space_is_told_apart_from_a_broken_disk() {
    let Some(tiny) = TinyFileSystem::mount() else { return };
    for choice in [EngineChoice::Uring, EngineChoice::Inline] {
        let path = tiny.path().join("disk");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(DISK).unwrap();
        let mut engine = engine(choice);
        let disk = engine.add_disk(DiskFile::new(file, DISK).unwrap()).unwrap();
        let pool = BufferPool::new(2 << 20).unwrap();
        let mut list = Vec::new();
        assert!(pool.try_acquire_list(2 << 20, &mut list));
        let end = run(&mut engine, io(disk, 1, IoKind::Write, 0, 2 << 20, Payload::Buffers(list)));
        let error = end.result.unwrap_err();
        assert!(error.is_no_space(), "{error}");
        std::fs::remove_file(path).unwrap();
    }
}

/// A loop device over a file; `None` (said loudly) where there is none to be had.
pub(crate) struct LoopDevice {
    pub(crate) path: PathBuf,
    file: tempfile::NamedTempFile,
}

impl LoopDevice {
    pub(crate) fn new(size: u64) -> Option<Self> {
        let file = tempfile::NamedTempFile::new_in("/tmp").unwrap();
        file.as_file().set_len(size).unwrap();
        let output =
            Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file.path()).output();
        match output {
            Ok(output) if output.status.success() => {
                let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
                Some(Self { path, file })
            }
            other => {
                eprintln!("NOT RUN: no loop device here, so block devices are not tested: {other:?}");
                None
            }
        }
    }
}

impl LoopDevice {
    /// Bytes that the file below it has allocated.
    pub(crate) fn allocated(&self) -> u64 {
        allocated(self.file.as_file())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

#[test]
fn requests_on_a_block_device_agree_with_an_oracle() {
    let Some(device) = LoopDevice::new(DISK) else { return };
    for choice in [EngineChoice::Auto, EngineChoice::Inline] {
        let file =
            File::options().read(true).write(true).custom_flags(libc::O_EXCL).open(&device.path).unwrap();
        sys::fallocate(&file, sys::ZERO_RANGE, 0, DISK).unwrap();
        let disk = DiskFile::new(file, DISK).unwrap();
        assert!(disk.medium() == Medium::BlockDevice && disk.is_direct());
        let unit = u64::from(disk.alignment());
        random_requests_agree_with_memory(engine(choice), disk, unit);
    }
}

#[test]
fn registered_and_foreign_memory_carry_the_same_bytes() {
    let (_file, disk) = disk_in("/tmp");
    let mut engine = engine(EngineChoice::Uring);
    let (pool, foreign) = (BufferPool::new(4 << 20).unwrap(), BufferPool::new(4 << 20).unwrap());
    engine.register_buffers(&pool);
    if !engine.has_registered_buffers() {
        eprintln!("NOT RUN: the limit on locked memory is too low here to register buffers");
        return;
    }
    let disk = engine.add_disk(disk).unwrap();
    for (from, to) in [(&pool, &foreign), (&foreign, &pool), (&pool, &pool)] {
        for length in [4096usize, 1 << 20] {
            let mut buffer = from.try_acquire(length).unwrap();
            rng_fill(&mut |below| below ^ length as u64, buffer.bytes_mut());
            let expected = buffer.bytes().to_vec();
            let write = io(disk, 1, IoKind::Write, 8192, length as u64, Payload::Buffer(buffer));
            assert_eq!(run(&mut engine, write).result, Ok(()));
            let mut buffer = to.try_acquire(length).unwrap();
            buffer.bytes_mut().fill(0);
            let read =
                run(&mut engine, io(disk, 2, IoKind::Read, 8192, length as u64, Payload::Buffer(buffer)));
            assert!(read.result.is_ok() && bytes_of(&read.payload) == expected);
        }
    }
}
