//! A disk in memory on a vhost-user socket, on request a dishonest one: what the load generator's own tests run on.
//! It uses `vhost-user-backend` and `virtio-queue`, so that the ring is checked against code that is not ours.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_driver::{VirtioBlkFeatureFlags, VirtioFeatureFlags};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// How the disk misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// Every so many writes, one is answered and not done.
    ForgetWrite {
        every: u64,
    },
    /// Every so many requests, one ends with an I/O error, after its work was done.
    FailRequest {
        every: u64,
    },
    /// Nothing is answered after so many requests.
    SilentAfter {
        requests: u64,
    },
}

/// A disk that serves one front end.
pub(super) struct RamDisk {
    socket: PathBuf,
    _directory: TempDir,
}

impl RamDisk {
    /// Listens and returns; the first front end that comes is served until it leaves.
    pub(super) fn serve(bytes: u64, queues: u16, indirect: bool, fault: Fault) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("disk.sock");
        let mut listener = vhost::vhost_user::Listener::new(&socket, true).unwrap();
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let size = usize::try_from(bytes).unwrap();
        let backend = Backend {
            bytes: vec![0; size],
            queues,
            indirect,
            fault,
            memory: memory.clone(),
            event_idx: false,
            requests: 0,
            writes: 0,
            exit: new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap(),
        };
        thread::spawn(move || {
            let backend = std::sync::Arc::new(std::sync::RwLock::new(backend));
            let mut daemon = VhostUserDaemon::new("ram-disk".into(), backend, memory).unwrap();
            if daemon.start(&mut listener).is_ok() {
                // The front end leaving is the ordinary end.
                let _ = daemon.wait();
            }
        });
        Self { socket, _directory: directory }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }
}

struct Backend {
    bytes: Vec<u8>,
    queues: u16,
    indirect: bool,
    fault: Fault,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    event_idx: bool,
    requests: u64,
    writes: u64,
    exit: (EventConsumer, EventNotifier),
}

type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

impl Backend {
    /// Does one request and returns how many bytes were written to the guest.
    fn serve(&mut self, chain: &Chain) -> u32 {
        let memory = chain.memory();
        let mut descriptors: Vec<_> = chain.clone().collect();
        let status = descriptors.pop().unwrap();
        let header = descriptors.remove(0);
        assert_eq!((header.len(), status.len(), status.is_write_only()), (16, 1, true));
        let kind: u32 = memory.read_obj(header.addr()).unwrap();
        let sector: u64 =
            memory.read_obj(header.addr().0.checked_add(8).map(vm_memory::GuestAddress).unwrap()).unwrap();
        let mut at = usize::try_from(sector * 512).unwrap();
        let mut written = 1;
        self.requests += 1;
        if kind == 1 {
            self.writes += 1;
        }
        for descriptor in descriptors {
            let length = usize::try_from(descriptor.len()).unwrap();
            let place = &mut self.bytes[at..at + length];
            assert_eq!(descriptor.is_write_only(), kind == 0, "direction of the data");
            match (kind, self.fault) {
                (0, _) => {
                    memory.write_slice(place, descriptor.addr()).unwrap();
                    written += descriptor.len();
                }
                (_, Fault::ForgetWrite { every }) if self.writes.is_multiple_of(every) => {}
                _ => memory.read_slice(place, descriptor.addr()).unwrap(),
            }
            at += length;
        }
        let fails = matches!(self.fault, Fault::FailRequest { every } if self.requests.is_multiple_of(every));
        memory.write_obj(u8::from(fails), status.addr()).unwrap();
        written
    }

    fn serve_queue(&mut self, vring: &VringRwLock) -> bool {
        let memory = self.memory.memory();
        let chains: Vec<Chain> = vring.get_mut().get_queue_mut().iter(memory).unwrap().collect();
        for chain in &chains {
            if matches!(self.fault, Fault::SilentAfter { requests } if self.requests >= requests) {
                continue;
            }
            let written = self.serve(chain);
            vring.add_used(chain.head_index(), written).unwrap();
        }
        if vring.needs_notification().unwrap() {
            vring.signal_used_queue().unwrap();
        }
        !chains.is_empty()
    }
}

impl VhostUserBackendMut for Backend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        let mut virtio = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        virtio.set(VirtioFeatureFlags::RING_INDIRECT_DESC, self.indirect);
        let block = VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::MQ | VirtioBlkFeatureFlags::SEG_MAX;
        virtio.bits() | block.bits() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    /// Capacity in sectors, then from byte 12 `seg_max`, and from byte 34 `num_queues` (virtio 1.3 §5.2.4).
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; 60];
        let sectors = u64::try_from(self.bytes.len()).unwrap() / 512;
        config[..8].copy_from_slice(&sectors.to_le_bytes());
        config[12..16].copy_from_slice(&126_u32.to_le_bytes());
        config[34..36].copy_from_slice(&self.queues.to_le_bytes());
        let start = usize::try_from(offset).unwrap();
        config[start..start + usize::try_from(size).unwrap()].to_vec()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().ok()?, self.exit.1.try_clone().ok()?))
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let vring = &vrings[usize::from(event)];
        loop {
            vring.disable_notification().unwrap();
            self.serve_queue(vring);
            // Without EVENT_IDX every request kicks; with it, one may have slipped in before the wish was visible.
            if !self.event_idx || !vring.enable_notification().unwrap() {
                return Ok(());
            }
        }
    }
}
