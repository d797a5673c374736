//! Executes a request at once, on the calling thread. For disks in memory this is the fast way: tmpfs has no non-blocking
//! path, so io_uring hands each request to a worker thread (on Linux 6.18, 4.7 µs per 4 KiB against 0.8 µs).

use std::fs::File;
use std::io;

use rmr_common::buffer::{Segment, gather};

use super::file::DiskFile;
use super::zero::{ZeroCall, Zeroing};
use super::{AlignedPage, DiskError, Io, IoKind, sys};

/// Interrupted or refused attempts in a row before the error is believed.
pub(super) const MAX_ATTEMPTS: u32 = 1000;
/// How many zero pages one vectored write carries.
pub(super) const ZERO_PAGES: usize = 256;

/// Memory that the inline way of execution reuses from request to request.
#[derive(Debug)]
pub(super) struct Inline {
    segments: Vec<Segment>,
    rest: Vec<Segment>,
    zeroes: Box<AlignedPage>,
}

impl Inline {
    pub(super) fn new() -> Self {
        Self { segments: Vec::new(), rest: Vec::new(), zeroes: AlignedPage::zeroed() }
    }

    /// Executes `io`, which has passed [`DiskFile::check`].
    pub(super) fn execute(&mut self, disk: &DiskFile, io: &mut Io) -> Result<(), DiskError> {
        self.segments.clear();
        io.payload.segments(&mut self.segments);
        disk.check_memory(io, &self.segments)?;
        match io.kind {
            IoKind::Read => self.transfer(disk, io, sys::read_at),
            IoKind::Write => self.transfer(disk, io, sys::write_at),
            IoKind::Flush => flush(disk, disk.file()).map_err(|e| to_error(io, &e)),
            IoKind::FlushMetadata => flush(disk, disk.metadata_file()).map_err(|e| to_error(io, &e)),
            IoKind::Discard | IoKind::WriteZeroes { .. } if io.length == 0 => Ok(()),
            IoKind::Discard | IoKind::WriteZeroes { .. } | IoKind::EnsureZero => self.zero(disk, io),
        }
    }

    fn zero(&mut self, disk: &DiskFile, io: &Io) -> Result<(), DiskError> {
        let mut zeroing = Zeroing::new(disk, io);
        while let Some(step) = zeroing.next(disk, io) {
            let (file, offset) = (disk.file(), io.offset + step.at);
            let result = match step.call {
                ZeroCall::Fallocate(mode) => {
                    retry(|| sys::fallocate(file, mode, offset, step.length).map(|()| step.length))
                }
                ZeroCall::Write => {
                    zero_segments(&mut self.zeroes, step.length, &mut self.rest);
                    retry(|| sys::write_at(file, &self.rest, offset)).map(|written| written as u64)
                }
                ZeroCall::Compare => {
                    zeroing.memory(step.length, &mut self.rest);
                    retry(|| sys::read_at(file, &self.rest, offset)).map(|read| read as u64)
                }
            };
            let result = result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
            zeroing.ended(disk, io, step, result)?;
        }
        Ok(())
    }

    fn transfer(
        &mut self,
        disk: &DiskFile,
        io: &Io,
        call: fn(&File, &[Segment], u64) -> io::Result<usize>,
    ) -> Result<(), DiskError> {
        let mut done = 0;
        while done < io.length {
            let list = if done == 0 {
                &self.segments
            } else {
                let skip = usize::try_from(done).expect("below the length of memory");
                self.rest.clear();
                gather(&self.segments, skip, usize::MAX, &mut self.rest);
                &self.rest
            };
            let moved = retry(|| call(disk.file(), list, io.offset + done));
            done += advance(disk, io, done, moved)?;
        }
        Ok(())
    }
}

/// Fills `list` with segments of zeroes that make up `length` bytes, or as many as one call takes.
pub(super) fn zero_segments(zeroes: &mut AlignedPage, length: u64, list: &mut Vec<Segment>) {
    list.clear();
    let mut left = length;
    while left > 0 && list.len() < ZERO_PAGES {
        let here = usize::try_from(left).unwrap_or(usize::MAX);
        list.push(zeroes.segment().part(0, here));
        left -= left.min(4096);
    }
}

/// How far a partial transfer got; nothing at all before the end is an error.
fn advance(disk: &DiskFile, io: &Io, done: u64, moved: io::Result<usize>) -> Result<u64, DiskError> {
    match moved {
        Ok(0) => Err(DiskError::Truncated { offset: io.offset + done, size: disk.size() }),
        Ok(moved) => Ok(moved as u64),
        Err(error) => Err(to_error(io, &error)),
    }
}

fn to_error(io: &Io, error: &io::Error) -> DiskError {
    io.errno(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Flushes once, whatever the error: one that is reported again is not what was lost.
fn flush(disk: &DiskFile, file: &File) -> io::Result<()> {
    file.sync_data().inspect_err(|_| disk.forget_unwritten())
}

/// Calls again while the kernel says that it was interrupted or busy, a bounded number of times.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..MAX_ATTEMPTS {
        match call() {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
            result => return result,
        }
    }
    call()
}
