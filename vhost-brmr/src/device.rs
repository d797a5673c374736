//! The virtio-blk device as the guest sees it: features, configuration space, and what was negotiated. It does no I/O
//! and knows neither rings nor the disk.

use std::fmt;

use thiserror::Error;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::disk::{Geometry, RangeLimits, SECTOR_SIZE};
use crate::request::{ID_LENGTH, Limits};

/// Length of the configuration space that this device fills; what is asked for beyond it reads as zeroes.
const CONFIG_LENGTH: usize = 60;
/// Where the only writable byte of the configuration space is: `writeback`.
const CONFIG_WRITEBACK: usize = 32;

/// Every virtio feature that the device may offer, with the words for the log.
const FEATURE_NAMES: &[(u32, &str)] = &[
    (VIRTIO_BLK_F_SIZE_MAX, "size-max"),
    (VIRTIO_BLK_F_SEG_MAX, "seg-max"),
    (VIRTIO_BLK_F_RO, "read-only"),
    (VIRTIO_BLK_F_BLK_SIZE, "block-size"),
    (VIRTIO_BLK_F_FLUSH, "flush"),
    (VIRTIO_BLK_F_TOPOLOGY, "topology"),
    (VIRTIO_BLK_F_CONFIG_WCE, "config-wce"),
    (VIRTIO_BLK_F_MQ, "multi-queue"),
    (VIRTIO_BLK_F_DISCARD, "discard"),
    (VIRTIO_BLK_F_WRITE_ZEROES, "write-zeroes"),
    (VIRTIO_RING_F_INDIRECT_DESC, "indirect-descriptors"),
    (VIRTIO_RING_F_EVENT_IDX, "event-idx"),
    (VIRTIO_F_VERSION_1, "version-1"),
];

/// What the operator decides about the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// How many queues there are.
    pub queues: u16,
    /// Largest size of a queue, a power of two.
    pub queue_size: u16,
    /// What the guest reads as the serial number: at most 20 bytes.
    pub serial: String,
    /// Refuse every change.
    pub read_only: bool,
}

/// Why the front end may not do what it asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// Features that were not offered.
    #[error("features {found:#x} acknowledged, expected only bits of the {offered:#x} offered")]
    Features {
        /// What was acknowledged.
        found: u64,
        /// What was offered.
        offered: u64,
    },
    /// A change of a byte that is not writable.
    #[error(
        "write of {length} bytes at {offset} of the configuration space, expected only byte 32, writeback"
    )]
    Config {
        /// Where.
        offset: u32,
        /// How many bytes.
        length: usize,
    },
}

/// The device: what it offers, and what the guest took.
///
/// `CONFIG_WCE` is not offered. With it a guest turns the cache off by writing one byte of the configuration space, and never flushes
/// from then on. No place that this daemon can read again keeps that byte: front ends do not repeat the message after a
/// restart of the daemon, QEMU carries it over neither a reset of the guest nor a migration, and the inflight region is new after
/// each of them. A daemon that took the cache for on would then lose acknowledged writes. A guest that negotiated the feature with
/// an earlier daemon may acknowledge it all the same, and gets write-through until it says in this session that it flushes.
#[derive(Debug)]
pub struct Device {
    options: DeviceOptions,
    geometry: Geometry,
    acknowledged: u64,
    /// The front end wrote in this session that the cache is on.
    writeback: bool,
}

impl Device {
    /// A device over a disk of this geometry.
    #[must_use]
    pub fn new(options: DeviceOptions, geometry: Geometry) -> Self {
        Self { options, geometry, acknowledged: 0, writeback: false }
    }

    /// What the operator decided.
    #[must_use]
    pub fn options(&self) -> &DeviceOptions {
        &self.options
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.geometry.size
    }

    /// The disk has another size now; true if that is new.
    pub fn resize(&mut self, size: u64) -> bool {
        std::mem::replace(&mut self.geometry.size, size) != size
    }

    /// The virtio features on offer.
    #[must_use]
    pub fn features(&self) -> u64 {
        let writable = !self.options.read_only;
        let optional = [
            (VIRTIO_BLK_F_RO, self.options.read_only),
            (VIRTIO_BLK_F_MQ, self.options.queues > 1),
            (VIRTIO_BLK_F_DISCARD, writable && self.geometry.discard.is_some()),
            (VIRTIO_BLK_F_WRITE_ZEROES, writable && self.geometry.write_zeroes.is_some()),
        ];
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
        ];
        let optional = optional.into_iter().filter_map(|(bit, offered)| offered.then_some(bit));
        let of_vhost = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        optional.chain(always).fold(of_vhost.bits(), |features, bit| features | 1 << bit)
    }

    /// The vhost-user protocol features on offer.
    #[must_use]
    pub fn protocol_features() -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
    }

    /// Takes what the guest acknowledged.
    ///
    /// # Errors
    /// When a feature was not on offer, now or by an earlier version of this daemon.
    pub fn acknowledge(&mut self, features: u64) -> Result<(), DeviceError> {
        let offered = self.features() | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        if features & !offered != 0 {
            return Err(DeviceError::Features { found: features, offered });
        }
        self.acknowledged = features;
        Ok(())
    }

    /// Whether the guest took this virtio feature.
    #[must_use]
    pub fn has(&self, bit: u32) -> bool {
        self.acknowledged & (1 << bit) != 0
    }

    /// Whether protocol features were negotiated, so that rings begin disabled.
    #[must_use]
    pub fn has_protocol_features(&self) -> bool {
        self.acknowledged & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// Whether the front end wants everything logged that is written to the guest: while it migrates it.
    #[must_use]
    pub fn has_log_all(&self) -> bool {
        self.acknowledged & VhostUserVirtioFeatures::LOG_ALL.bits() != 0
    }

    /// Whether rings suppress notifications by index.
    #[must_use]
    pub fn has_event_idx(&self) -> bool {
        self.has(VIRTIO_RING_F_EVENT_IDX)
    }

    /// Whether a write may complete only after a flush behind it (virtio 1.3 §5.2.6.2): the guest cannot flush, or may have turned
    /// the cache off.
    #[must_use]
    pub fn is_write_through(&self) -> bool {
        !self.has(VIRTIO_BLK_F_FLUSH) || (self.has(VIRTIO_BLK_F_CONFIG_WCE) && !self.writeback)
    }

    /// What requests are checked against.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            size: self.geometry.size,
            read_only: self.options.read_only,
            discard: self.geometry.discard.filter(|_| self.has(VIRTIO_BLK_F_DISCARD)),
            write_zeroes: self.geometry.write_zeroes.filter(|_| self.has(VIRTIO_BLK_F_WRITE_ZEROES)),
        }
    }

    /// What the guest reads as identification, padded with zeroes.
    #[must_use]
    pub fn identification(&self) -> [u8; ID_LENGTH] {
        let mut id = [0; ID_LENGTH];
        for (to, from) in id.iter_mut().zip(self.options.serial.bytes()) {
            *to = from;
        }
        id
    }

    /// Any part of the configuration space; zeroes beyond its end.
    #[must_use]
    pub fn read_config(&self, offset: u32, length: u32) -> Vec<u8> {
        let config = self.config();
        (u64::from(offset)..u64::from(offset) + u64::from(length))
            .map(|at| usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0))
            .collect()
    }

    /// Whether the guest may have turned the cache off in a session with an earlier daemon.
    #[must_use]
    pub fn is_cache_unknown(&self) -> bool {
        self.has(VIRTIO_BLK_F_FLUSH) && self.is_write_through()
    }

    /// Writes a part of the configuration space: `writeback` changes, every other byte must stay as it is.
    ///
    /// # Errors
    /// When another byte would change, or `writeback` is written without its feature.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), DeviceError> {
        let error = DeviceError::Config { offset, length: bytes.len() };
        let length = u32::try_from(bytes.len()).map_err(|_| error)?;
        let now = self.read_config(offset, length);
        let mut writeback = self.writeback;
        for (index, (new, old)) in bytes.iter().zip(now).enumerate() {
            if offset as usize + index == CONFIG_WRITEBACK && self.has(VIRTIO_BLK_F_CONFIG_WCE) {
                writeback = *new != 0;
            } else if *new != old {
                return Err(error);
            }
        }
        self.writeback = writeback;
        Ok(())
    }

    /// Back to the state before any negotiation.
    pub fn reset(&mut self) {
        self.acknowledged = 0;
        self.writeback = false;
    }

    /// `struct virtio_blk_config` (virtio 1.3 §5.2.4), little-endian.
    fn config(&self) -> [u8; CONFIG_LENGTH] {
        let geometry = &self.geometry;
        let logical = geometry.logical_block_size;
        let exponent = (geometry.physical_block_size / logical).trailing_zeros();
        // The driver takes these two in logical blocks.
        let minimum = u16::try_from(geometry.physical_block_size / logical).unwrap_or(1);
        let optimal = geometry.optimal_io_size / logical;
        let none = RangeLimits { max_length: 0, max_ranges: 0, granularity: 512 };
        let discard = geometry.discard.unwrap_or(none);
        let zeroes = geometry.write_zeroes.unwrap_or(none);
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR_SIZE).unwrap_or(u32::MAX);
        let mut config = [0; CONFIG_LENGTH];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(geometry.size / SECTOR_SIZE).to_le_bytes());
        put(8, &geometry.max_segment_size.to_le_bytes());
        put(12, &geometry.max_segments.to_le_bytes());
        put(20, &logical.to_le_bytes());
        put(24, &[u8::try_from(exponent).unwrap_or(0), 0]);
        put(26, &minimum.to_le_bytes());
        put(28, &optimal.to_le_bytes());
        put(CONFIG_WRITEBACK, &[u8::from(!self.is_write_through())]);
        put(34, &self.options.queues.to_le_bytes());
        put(36, &sectors(discard.max_length).to_le_bytes());
        put(40, &discard.max_ranges.to_le_bytes());
        put(44, &(discard.granularity / 512).to_le_bytes());
        put(48, &sectors(zeroes.max_length).to_le_bytes());
        put(52, &zeroes.max_ranges.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl fmt::Display for Device {
    /// What was negotiated, in words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = FEATURE_NAMES.iter().filter(|(bit, _)| self.has(*bit)).map(|(_, name)| *name);
        let names: Vec<_> = names.collect();
        let cache = if self.is_write_through() { "write-through" } else { "write-back" };
        write!(f, "{}; {cache}", if names.is_empty() { "no features".to_owned() } else { names.join(", ") })
    }
}
