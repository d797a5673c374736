//! What differs from run to run: sizes, times and likelihoods, all drawn from the seed.

use std::time::Duration;

use super::aim::Aim;
use super::rng::Rng;
use super::world::MILLISECOND;
use crate::client;
use crate::pool::ClientId;
use crate::replica;
use crate::wire::Limits;

/// What differs from run to run.
pub(super) struct Profile {
    pub(super) limits: Limits,
    pub(super) client: client::Config,
    pub(super) intent_idle: Duration,
    pub(super) resync: replica::ResyncLimits,
    pub(super) network_delay: u64,
    pub(super) disk_delay: u64,
    pub(super) metadata_delay: u64,
    /// Requests go anywhere, and not to few places.
    pub(super) spread: bool,
    pub(super) requests: u64,
    /// Per cent of the requests that read, of those that are neither flush, discard nor zeroes.
    pub(super) reads: u64,
    pub(super) burst: u64,
    pub(super) pause: u64,
    pub(super) faults: u64,
    pub(super) fault_pause: u64,
    /// Whether clients may die with writes in flight.
    pub(super) client_crashes: bool,
    /// How often the pool is verified while the run goes on.
    pub(super) audits: u64,
    /// Whether disks rot.
    pub(super) rot: bool,
    /// Per cent of the transfers before which the guest changes the memory that is sent.
    pub(super) restless: u64,
    /// Per mille of the transfers with a digest whose data arrives damaged.
    pub(super) damage: u64,
    /// Per cent of the flushes that fail and lose what they covered.
    pub(super) lost_flushes: u64,
}

impl Profile {
    pub(super) fn draw(rng: &mut Rng, aim: Aim) -> Self {
        let mut client = client::Config::new(ClientId::from_bytes([0; 16]), "");
        let milliseconds = |rng: &mut Rng, list: &[u64]| Duration::from_millis(rng.pick(list));
        client.leg_timeout = milliseconds(rng, &[200, 500, 2000]);
        client.suspend_timeout = milliseconds(rng, &[600, 3000, 60_000]);
        client.attach_grace = milliseconds(rng, &[0, 50, 500]);
        client.reconnect_interval = milliseconds(rng, &[10, 50, 300]);
        client.ping_interval = milliseconds(rng, &[50, 200, 1000]);
        client.mark_interval = milliseconds(rng, &[20, 200, 5000]);
        client.verify_hold = milliseconds(rng, &[5, 20, 200]);
        client.rejoin_backoff_max = milliseconds(rng, &[2000, 8000, 30_000]);
        client.rejoin_hold =
            rng.pick(&[client.leg_timeout / 4, client.leg_timeout, Duration::from_millis(500)]);
        client.data_digest = rng.pick(&[
            client::DataDigest::Off,
            client::DataDigest::Off,
            client::DataDigest::Detect,
            client::DataDigest::Bounce,
        ]);
        client.bounce_memory = rng.pick(&[8192, 1 << 18, 32 << 20]);
        client.read_error_limit = u32::try_from(rng.pick(&[0, 1, 16])).unwrap_or(1);
        let max_io = rng.pick(&[4096, 16384, 65536, 262_144, 1 << 20]);
        let limits =
            Limits { max_io, slots: rng.pick(&[2, 8, 32, 256]), max_bytes: max_io * rng.pick(&[1, 2, 8]) };
        let faults = if rng.percent(15) { 0 } else { rng.range(1, 20) };
        let is_scattered = aim == Aim::Scattered;
        let disk_delay = rng.pick(&[20_000, 500_000, 10 * MILLISECOND]);
        // Slow, and no leg is lost for it alone.
        let longest =
            u64::try_from(client.leg_timeout.as_nanos() / 4).unwrap_or(u64::MAX).min(disk_delay * 20);
        if is_scattered && client.data_digest == client::DataDigest::Off {
            client.data_digest = client::DataDigest::Detect;
        }
        Self {
            limits,
            client,
            intent_idle: milliseconds(rng, &[0, 1000, 3000]),
            resync: replica::ResyncLimits {
                max_inflight: rng.pick(&[1, 2, 4, 16]),
                bytes_per_s: rng.pick(&[None, None, Some(1 << 18), Some(1 << 20), Some(16 << 20)]),
            },
            network_delay: rng.pick(&[20_000, 500_000, 5 * MILLISECOND]),
            disk_delay,
            metadata_delay: if is_scattered { longest } else { 0 },
            spread: is_scattered,
            requests: rng.range(10, 250),
            reads: rng.pick(&[40, 80]),
            burst: rng.pick(&[1, 4, 16]),
            pause: rng.pick(&[MILLISECOND, 10 * MILLISECOND, 100 * MILLISECOND, 300 * MILLISECOND]),
            faults,
            fault_pause: rng.pick(&[
                2 * MILLISECOND,
                30 * MILLISECOND,
                400 * MILLISECOND,
                1000 * MILLISECOND,
            ]),
            client_crashes: rng.percent(40) || aim != Aim::Chance,
            audits: if rng.percent(35) { rng.range(1, 8) } else { 0 },
            rot: rng.percent(60),
            restless: rng.pick(&[0, 10, 50]),
            damage: if is_scattered { 60 } else { rng.pick(&[0, 0, 5]) },
            lost_flushes: if aim == Aim::Flushes { 15 } else { rng.pick(&[0, 0, 0, 2, 8]) },
        }
    }
}
