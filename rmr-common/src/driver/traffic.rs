//! What a client's connections carried, by what it was for: the figure behind "the hypervisor carries no resync".

use std::fmt;

use crate::wire::{HEADER_SIZE, MessageHeader};

/// Bytes in both directions.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Bytes {
    /// To nodes.
    pub sent: u64,
    /// From nodes.
    pub received: u64,
}

impl Bytes {
    /// Both together.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.sent + self.received
    }
}

/// Bytes of messages since the driver began. Frame headers, which belong to no message, are not counted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Traffic {
    /// Data of the user's own reads and writes, once for each leg that it went to.
    pub data: Bytes,
    /// Headers of all messages, and everything that is said besides: views, reports, pings.
    pub control: Bytes,
    /// Data of resync, maps and blocks. Nodes send it to each other, so this stays 0.
    pub resync: Bytes,
}

impl Traffic {
    pub(super) const fn sent(&mut self, header: &MessageHeader) {
        let payload = self.payload_of(header);
        payload.sent += header.payload as u64;
        self.control.sent += HEADER_SIZE as u64;
    }

    pub(super) const fn received(&mut self, header: &MessageHeader) {
        let payload = self.payload_of(header);
        payload.received += header.payload as u64;
        self.control.received += HEADER_SIZE as u64;
    }

    const fn payload_of(&mut self, header: &MessageHeader) -> &mut Bytes {
        if header.kind.is_resync() {
            &mut self.resync
        } else if header.kind.carries_data() {
            &mut self.data
        } else {
            &mut self.control
        }
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, control, resync } = self;
        write!(
            f,
            "bytes sent and received: data {} and {}, control {} and {}, resync {} and {}",
            data.sent, data.received, control.sent, control.received, resync.sent, resync.received
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::PoolId;
    use crate::wire::Kind;

    #[test]
    fn every_byte_of_a_message_is_counted_once_and_pulled_data_is_told_apart() {
        let mut traffic = Traffic::default();
        for (kind, payload) in [(Kind::Write, 4096), (Kind::SetView, 100), (Kind::PullData, 5000)] {
            let header = MessageHeader { payload, ..MessageHeader::new(kind, PoolId::random()) };
            traffic.sent(&header);
            traffic.received(&header);
        }
        let each = Bytes { sent: 3 * 80 + 100, received: 3 * 80 + 100 };
        assert_eq!(traffic.control, each);
        assert_eq!((traffic.data.total(), traffic.resync.total()), (2 * 4096, 2 * 5000));
        assert!(traffic.to_string().ends_with("resync 5000 and 5000"), "{traffic}");
    }
}
