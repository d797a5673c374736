//! The work of making a range read as zeroes, step by step, for both engines: which system call comes next, and what its
//! result means. It makes no system call that waits for a device.
//!
//! ```text
//!   discard ───────────────▶ punch the rest ──(failed)──▶ compare ──▶ zeroes: next part
//!   ensure zeroes ─▶ compare ─▶ zeroes: next part            │
//!                       └─▶ other ─▶ punch the rest          └─▶ other ─▶ zero this part ─▶ compare
//!   write zeroes ──────────▶ zero the whole range: by the file system or device, else by writing
//! ```
//! To compare is to read: what a disk returns at this moment is proof, and what is thought to lie there is not. So a thin
//! device that cannot be punched stays thin where it reads as zeroes.

use std::fs::File;
use std::io;

use libc::c_int;
use rmr_common::buffer::Segment;

use super::file::{DiskFile, Medium};
use super::inline::ZERO_PAGES;
use super::{AlignedPage, DiskError, Io, IoKind, sys};

/// Bytes that are read and compared at a time. Each request that compares has memory of this size until it ends.
pub(super) const COMPARED: u64 = 64 << 10;

/// What to do with a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ZeroCall {
    /// `fallocate` with this mode.
    Fallocate(c_int),
    /// Write zeroes.
    Write,
    /// Read, and look whether it is zeroes.
    Compare,
}

/// One system call: what, from which byte of the request, and for how many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ZeroStep {
    pub(super) call: ZeroCall,
    pub(super) at: u64,
    pub(super) length: u64,
}

/// How far a request has come. See the module's comment.
#[derive(Debug, Default)]
pub(super) struct Zeroing {
    /// Up to here, from the start of the request, it reads as zeroes.
    done: u64,
    /// Up to here it is known not to.
    differs_to: u64,
    /// A way that failed is not tried again for this request.
    punch_failed: bool,
    zero_range_failed: bool,
    /// What is compared.
    pages: Vec<AlignedPage>,
}

impl Zeroing {
    /// Begins a request, which has passed [`DiskFile::check`].
    pub(super) fn new(disk: &DiskFile, io: &Io) -> Self {
        // A file system in memory answers at once; any other may have to wait for its disk, and with it the whole shard.
        let is_hole = io.kind == IoKind::EnsureZero
            && disk.medium() == Medium::Memory
            && sys::is_hole(disk.file(), io.offset, io.length).unwrap_or(false);
        Self { done: if is_hole { io.length } else { 0 }, ..Self::default() }
    }

    /// The next step, or `None` when the whole range reads as zeroes.
    pub(super) fn next(&self, disk: &DiskFile, io: &Io) -> Option<ZeroStep> {
        let rest = io.length - self.done;
        let keep = io.kind == IoKind::WriteZeroes { unmap: false };
        let differs = self.differs_to > self.done;
        let can_punch = !keep && disk.punches_holes() && !self.punch_failed;
        let step = |call, length| Some(ZeroStep { call, at: self.done, length });
        if rest == 0 {
            return None;
        }
        if can_punch && (differs || io.kind != IoKind::EnsureZero) {
            return step(ZeroCall::Fallocate(sys::PUNCH_HOLE), rest);
        }
        if !keep && !differs {
            return step(ZeroCall::Compare, rest.min(COMPARED));
        }
        let length = if keep { rest } else { self.differs_to - self.done };
        if disk.zeroes_ranges() && !self.zero_range_failed {
            return step(ZeroCall::Fallocate(sys::ZERO_RANGE), length);
        }
        step(ZeroCall::Write, length.min(ZERO_PAGES as u64 * 4096))
    }

    /// Fills `list` with the memory for a comparison. It stays where it is until the request ends.
    pub(super) fn memory(&mut self, length: u64, list: &mut Vec<Segment>) {
        let pages = usize::try_from(length.div_ceil(4096)).expect("at most COMPARED");
        self.pages.resize_with(pages.max(self.pages.len()), AlignedPage::default);
        list.clear();
        let lengths = (0..length).step_by(4096).map(|from| (length - from).min(4096));
        list.extend(
            self.pages.iter_mut().zip(lengths).map(|(page, length)| {
                page.segment().part(0, usize::try_from(length).expect("at most a page"))
            }),
        );
    }

    /// A step ended: with the bytes that it covered, or with an error number.
    ///
    /// # Errors
    /// When no other way is left.
    pub(super) fn ended(
        &mut self,
        disk: &DiskFile,
        io: &Io,
        step: ZeroStep,
        result: Result<u64, i32>,
    ) -> Result<(), DiskError> {
        match (step.call, result) {
            (ZeroCall::Fallocate(_), Ok(_)) => self.done += step.length,
            (ZeroCall::Fallocate(mode), Err(errno)) => {
                disk.note_unsupported(mode, errno);
                let failed = if mode == sys::PUNCH_HOLE {
                    &mut self.punch_failed
                } else {
                    &mut self.zero_range_failed
                };
                *failed = true;
            }
            (ZeroCall::Write | ZeroCall::Compare, Ok(0)) => {
                return Err(DiskError::Truncated { offset: io.offset + self.done, size: disk.size() });
            }
            (ZeroCall::Write, Ok(written)) => self.done += written,
            (ZeroCall::Write, Err(errno)) => return Err(io.errno(errno)),
            (ZeroCall::Compare, Ok(read)) if self.is_zero(read) => self.done += read,
            (ZeroCall::Compare, Ok(read)) => self.differs_to = self.done + read,
            // What cannot be read is not known to be zeroes, and may be mended by writing them.
            (ZeroCall::Compare, Err(_)) => self.differs_to = self.done + step.length,
        }
        Ok(())
    }

    fn is_zero(&self, length: u64) -> bool {
        static ZEROES: [u8; 4096] = [0; 4096];
        let lengths = (0..length).step_by(4096).map(|from| (length - from).min(4096));
        self.pages.iter().zip(lengths).all(|(page, length)| {
            let length = usize::try_from(length).expect("at most a page");
            page.bytes()[..length] == ZEROES[..length]
        })
    }
}

/// The first byte of a range, by parts of [`COMPARED`] bytes, from which on it does not read as zeroes, or cannot be read;
/// `None` when all of it reads as zeroes. For a thread that may wait for the disk.
pub(crate) fn first_other(file: &File, from: u64, to: u64) -> Option<u64> {
    let (mut zeroing, mut list) = (Zeroing::default(), Vec::new());
    let mut at = from;
    while at < to {
        zeroing.memory(COMPARED.min(to - at), &mut list);
        match sys::read_at(file, &list, at) {
            Ok(read) if read > 0 && zeroing.is_zero(read as u64) => at += read as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => return Some(at),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::{DiskId, Payload};
    use super::*;

    const LENGTH: u64 = 3 * COMPARED;
    const PUNCH: ZeroCall = ZeroCall::Fallocate(sys::PUNCH_HOLE);
    const ZERO: ZeroCall = ZeroCall::Fallocate(sys::ZERO_RANGE);

    fn disk() -> DiskFile {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LENGTH).unwrap();
        DiskFile::new(file, LENGTH).unwrap()
    }

    fn request(kind: IoKind) -> Io {
        Io { disk: DiskId(0), id: 1, kind, offset: 0, length: LENGTH, payload: Payload::None }
    }

    /// What comes next, after a comparison of memory filled with `byte`.
    fn compared(zeroing: &mut Zeroing, disk: &DiskFile, io: &Io, byte: u8) {
        let step = zeroing.next(disk, io).unwrap();
        assert_eq!(step.call, ZeroCall::Compare);
        zeroing.memory(step.length, &mut Vec::new());
        zeroing.pages.iter_mut().for_each(|page| page.bytes_mut().fill(byte));
        zeroing.ended(disk, io, step, Ok(step.length)).unwrap();
    }

    #[test]
    fn a_punch_that_fails_is_followed_by_a_comparison_and_by_zeroes_where_other_bytes_are() {
        for (errno, stays) in [(libc::ENOSPC, true), (libc::EIO, true), (libc::EOPNOTSUPP, false)] {
            let (disk, io) = (disk(), request(IoKind::Discard));
            let mut zeroing = Zeroing::new(&disk, &io);
            let punch = zeroing.next(&disk, &io).unwrap();
            assert_eq!(punch, ZeroStep { call: PUNCH, at: 0, length: LENGTH });
            zeroing.ended(&disk, &io, punch, Err(errno)).unwrap();
            assert_eq!(disk.punches_holes(), stays, "only what is not known here is not tried again");
            compared(&mut zeroing, &disk, &io, 0);
            compared(&mut zeroing, &disk, &io, 1);
            let zero = zeroing.next(&disk, &io).unwrap();
            assert_eq!(zero, ZeroStep { call: ZERO, at: COMPARED, length: COMPARED });
            zeroing.ended(&disk, &io, zero, Err(errno)).unwrap();
            let write = zeroing.next(&disk, &io).unwrap();
            assert_eq!(write, ZeroStep { call: ZeroCall::Write, at: COMPARED, length: COMPARED });
            zeroing.ended(&disk, &io, write, Ok(4096)).unwrap();
            let rest = zeroing.next(&disk, &io).unwrap();
            assert_eq!(
                (rest.call, rest.at, rest.length),
                (ZeroCall::Write, COMPARED + 4096, COMPARED - 4096)
            );
            zeroing.ended(&disk, &io, rest, Ok(rest.length)).unwrap();
            compared(&mut zeroing, &disk, &io, 0);
            assert_eq!(zeroing.next(&disk, &io), None);
        }
    }

    #[test]
    fn what_cannot_be_read_is_zeroed_and_a_write_that_fails_is_an_error() {
        let (disk, io) = (disk(), request(IoKind::EnsureZero));
        let mut zeroing = Zeroing::new(&disk, &io);
        let compare = zeroing.next(&disk, &io);
        let Some(compare) = compare else { return eprintln!("NOT RUN: temporary files are in memory here") };
        zeroing.ended(&disk, &io, compare, Err(libc::EIO)).unwrap();
        let punch = zeroing.next(&disk, &io).unwrap();
        assert_eq!((punch.call, punch.length), (PUNCH, LENGTH));
        zeroing.ended(&disk, &io, punch, Err(libc::EIO)).unwrap();
        let zero = zeroing.next(&disk, &io).unwrap();
        zeroing.ended(&disk, &io, zero, Err(libc::EIO)).unwrap();
        let write = zeroing.next(&disk, &io).unwrap();
        assert_eq!(write.call, ZeroCall::Write);
        let error = zeroing.ended(&disk, &io, write, Err(libc::ENOSPC)).unwrap_err();
        assert!(error.is_no_space(), "{error}");
        let end = zeroing.ended(&disk, &io, compare, Ok(0)).unwrap_err();
        assert!(matches!(end, DiskError::Truncated { .. }), "{end}");
    }
}
