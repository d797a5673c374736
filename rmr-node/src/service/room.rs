//! Room in stores for a pool that grows. A device may take long to zero itself, so the work has a thread of its own; a
//! replica asks for one piece of it at a time.

use rmr_common::pool::StoreId;
use rmr_common::replica::Event;

use super::shard::{Command, Shard};
use crate::store::StoreError;

impl Shard {
    /// A replica wants room for a pool of `to` bytes; what lies beyond `from` is nobody's yet.
    pub(super) fn make_room(&mut self, index: usize, from: u64, to: u64) {
        let handle = self.handle();
        let Some(member) = self.member_mut(index) else { return };
        let (store, chunk_size) = (member.store.superblock().store, member.replica.spec().chunk_size);
        tracing::info!(pool = %member.replica.spec().name, member = %member.replica.member(), from, to, "making room");
        let growth = match member.store.growth(chunk_size, from, to) {
            Ok(growth) => growth,
            Err(error) => return self.room_made(store, Err(error)),
        };
        member.makes_room = true;
        let work = move || handle.send(Command::RoomMade(store, growth.run()));
        if let Err(error) = std::thread::Builder::new().name("make-room".into()).spawn(work) {
            let path = member.store.path().to_owned();
            let what = "starting a thread to make room";
            self.room_made(store, Err(StoreError::Io { path, what, source: error }));
        }
    }

    /// The work on a store has ended: its size, or why it is as it was.
    pub(super) fn room_made(&mut self, store: StoreId, result: Result<u64, StoreError>) {
        let withheld =
            if result.is_err() { self.may_log(|throttles| &mut throttles.room) } else { Some(None) };
        let Some((index, member)) = self.member_of_store(store) else { return };
        let (disk, pool) = (member.disk, member.replica.spec().name.clone());
        member.makes_room = false;
        match &result {
            Ok(size) => {
                member.store.set_size(*size);
                tracing::info!(%pool, member = %member.replica.member(), size, "room is made");
            }
            Err(error) => {
                if let Some(withheld) = withheld {
                    tracing::error!(%pool, member = %member.replica.member(), withheld, "no room: {error}");
                }
            }
        }
        if let Ok(size) = &result {
            self.resize_disk(disk, *size);
        }
        let text = result.err().map(|error| error.to_string());
        let result = text.as_deref().map_or(Ok(()), Err);
        self.tell_replica(index, Event::Grown(result));
    }
}
