//! Disk requests of replicas: begun, and what follows from their end.

use rmr_common::pool::Cause;
use rmr_common::replica::{DiskOperation, DiskResult, Event, IoId};
use rmr_common::wire::block_digests;

use super::super::member::{IoTag, WaitingRead};
use super::{Shard, Turn, Waiter};
use crate::disk::Engine as _;
use crate::disk::{Completion, Io, IoKind, Payload};

impl Shard {
    /// Hands pulled data to the disk, from where it lies.
    pub(super) fn write_pulled(
        &mut self,
        index: usize,
        io: IoId,
        data: Option<Payload>,
        (offset, length): (u64, u32),
    ) {
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let Some(payload) = data else {
            // What was answered is kept until the replica has dealt with it.
            debug_assert!(false, "pulled data is there while it is written");
            return member.replica.apply(Event::Disk(io, DiskResult::Failed), self.now);
        };
        self.engine.submit(Io {
            disk: member.disk,
            id: IoTag::Replica(u16::try_from(index).unwrap_or(u16::MAX), io).encode(),
            kind: IoKind::Write,
            offset: member.store.superblock().layout.data_offset + offset,
            length: length.into(),
            payload,
        });
    }

    pub(super) fn start_disk(
        &mut self,
        index: usize,
        io: IoId,
        operation: DiskOperation,
        offset: u64,
        length: u32,
    ) {
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let data_offset = member.store.superblock().layout.data_offset;
        let own = u16::try_from(index).unwrap_or(u16::MAX);
        let tag = IoTag::Replica(own, io);
        let (kind, payload) = match operation {
            DiskOperation::Read | DiskOperation::Digest => {
                let digests = operation == DiskOperation::Digest;
                member.waiting_reads.push_back(WaitingRead { io, offset, length, digests });
                // At once, if it is the first and there is no need to stand in line.
                if !member.in_line && (self.short || !matches!(self.feed_reads(index), Turn::Served)) {
                    self.stand_in_line(Waiter::Reads(index));
                }
                return;
            }
            DiskOperation::Write(token) => match self.writes.take(token) {
                Some(data) => (IoKind::Write, data),
                None => (IoKind::Write, Payload::None),
            },
            // Its data is named by `Output::WritePulled`.
            DiskOperation::WritePulled => return,
            DiskOperation::Flush => (IoKind::Flush, Payload::None),
            DiskOperation::Discard => (IoKind::Discard, Payload::None),
            DiskOperation::WriteZeroes => (IoKind::WriteZeroes { unmap: false }, Payload::None),
            DiskOperation::ZeroPulled => (IoKind::EnsureZero, Payload::None),
        };
        self.engine.submit(Io {
            disk: member.disk,
            id: tag.encode(),
            kind,
            offset: data_offset + offset,
            length: length.into(),
            payload,
        });
    }

    pub(super) fn disk_done(&mut self, completion: Completion) {
        let Completion { id, result, payload, .. } = completion;
        let tag = IoTag::decode(id);
        match tag {
            IoTag::Read(index, io) | IoTag::Digest(index, io) | IoTag::Replica(index, io) => {
                let index = usize::from(index);
                let Some(Some(member)) = self.members.get_mut(index) else { return };
                let is_read = matches!(tag, IoTag::Read(..) | IoTag::Digest(..));
                match &result {
                    Ok(()) if is_read => member.troubles.succeeded(&[Cause::ReadErrors]),
                    Ok(()) => {
                        member.troubles.succeeded(&[Cause::WriteErrors, Cause::FlushErrors, Cause::DiskFull]);
                    }
                    Err(error) => {
                        let (pool, id) = (&member.replica.spec().name, member.replica.member());
                        let cause = match error {
                            error if error.is_no_space() => Cause::DiskFull,
                            error if error.is_of_flush() => Cause::FlushErrors,
                            _ if is_read => Cause::ReadErrors,
                            _ => Cause::WriteErrors,
                        };
                        member.logs.log(cause.name(), |withheld| {
                            tracing::error!(%pool, member = %id, withheld, "disk error: {error}");
                        });
                        member.troubles.failed(cause, error.to_string());
                    }
                }
                match (tag, payload) {
                    (IoTag::Read(..), Payload::Buffer(buffer)) => {
                        member.reading_bytes -= buffer.length();
                        if result.is_ok() {
                            member.keep_read(io, buffer);
                        }
                    }
                    (IoTag::Digest(..), Payload::Buffer(buffer)) => {
                        member.reading_bytes -= buffer.length();
                        if result.is_ok() {
                            // A few microseconds: a range is short.
                            let digests = block_digests(buffer.bytes());
                            member.replica.apply(Event::Digested(io, &digests), self.now);
                            return self.activate(index);
                        }
                    }
                    _ => {} // What was written; the engine has freed it.
                }
                let result = match result {
                    Ok(()) => DiskResult::Done,
                    Err(error) if error.is_no_space() => DiskResult::NoSpace,
                    Err(_) => DiskResult::Failed,
                };
                member.replica.apply(Event::Disk(io, result), self.now);
                self.activate(index);
            }
            IoTag::Metadata(index, id) => {
                let index = usize::from(index);
                let Some(Some(member)) = self.members.get_mut(index) else { return };
                member.metadata_done(id, result.map_err(|e| e.to_string()), self.now);
                self.activate(index);
            }
        }
    }
}
