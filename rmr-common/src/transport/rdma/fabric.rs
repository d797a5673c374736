//! Devices, and the memory that is registered with them: one registration for each region and device, made before the
//! memory is used, and ended when its owner lets go of it.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::endpoint::Keys;
use super::verbs::{Domain, MemoryRegion};
use super::{Exposure, RdmaError, ReadMode};
use crate::buffer::Segment;

/// What the RDMA connections of a process have in common. Clones are the same fabric.
#[derive(Clone)]
pub struct Fabric(Arc<Shared>);

struct Shared {
    read_mode: ReadMode,
    state: Mutex<State>,
    /// What connections look into; replaced as a whole with each change.
    table: RwLock<Arc<Table>>,
    /// Counts the changes.
    generation: AtomicU64,
}

#[derive(Default)]
struct State {
    domains: Vec<Arc<Domain>>,
    memory: Vec<Memory>,
    next: u64,
}

/// Registered memory with what keeps it mapped.
struct Memory {
    id: u64,
    segment: Segment,
    exposure: Exposure,
    /// One for each domain, in their order. Before `owner`, though each holds it as well.
    regions: Vec<MemoryRegion>,
    owner: Arc<dyn Any + Send + Sync>,
}

/// Keys of memory by address, ascending, for each domain.
#[derive(Default)]
struct Table(Vec<Entry>);

struct Entry {
    base: usize,
    length: usize,
    keys: Vec<Keys>,
}

impl Fabric {
    /// A fabric without devices; they are opened when connections need them.
    #[must_use]
    pub fn new(read_mode: ReadMode) -> Self {
        Self(Arc::new(Shared {
            read_mode,
            state: Mutex::default(),
            table: RwLock::default(),
            generation: AtomicU64::new(0),
        }))
    }

    /// How reads are done on connections that are opened from here.
    #[must_use]
    pub fn read_mode(&self) -> ReadMode {
        self.0.read_mode
    }

    /// Who may write to memory that reads of connections from here go to.
    #[must_use]
    pub fn exposure(&self) -> Exposure {
        match self.0.read_mode {
            ReadMode::Direct => Exposure::Peers,
            ReadMode::Window => Exposure::Windows,
            ReadMode::Bounce => Exposure::Local,
        }
    }

    /// Registers memory with all devices in use, now and later, until the registration is dropped. `owner` keeps the
    /// memory mapped, and is kept until then.
    ///
    /// # Errors
    /// When a device cannot pin it.
    pub fn register(
        &self,
        segment: Segment,
        owner: Arc<dyn Any + Send + Sync>,
        exposure: Exposure,
    ) -> Result<Registration, RdmaError> {
        let mut state = self.state();
        let regions = state
            .domains
            .iter()
            .map(|domain| domain.register(segment, Arc::clone(&owner), exposure))
            .collect::<Result<_, _>>()?;
        let id = state.next;
        state.next += 1;
        state.memory.push(Memory { id, segment, exposure, regions, owner });
        self.publish(&state);
        Ok(Registration { fabric: self.clone(), id })
    }

    /// The domain of a device, with all memory registered.
    pub(super) fn domain_of(&self, context: *mut rdma_sys::ibv_context) -> Result<Arc<Domain>, RdmaError> {
        let mut state = self.state();
        if let Some(domain) = state.domains.iter().find(|domain| domain.is_of(context)) {
            return Ok(Arc::clone(domain));
        }
        let domain = Arc::new(Domain::new(context)?);
        let mut regions = Vec::with_capacity(state.memory.len());
        for memory in &state.memory {
            regions.push(domain.register(memory.segment, Arc::clone(&memory.owner), memory.exposure)?);
        }
        for (memory, region) in state.memory.iter_mut().zip(regions) {
            memory.regions.push(region);
        }
        tracing::info!(device = %domain.device, limits = ?domain.limits, "RDMA device in use");
        state.domains.push(Arc::clone(&domain));
        self.publish(&state);
        Ok(domain)
    }

    /// The keys of a domain, for a connection.
    pub(super) fn keyring(&self, domain: &Arc<Domain>) -> Result<Keyring, RdmaError> {
        let index =
            self.state().domains.iter().position(|d| Arc::ptr_eq(d, domain)).ok_or(RdmaError::NoDevice)?;
        let mut keyring =
            Keyring { fabric: self.clone(), domain: index, generation: u64::MAX, table: Arc::default() };
        keyring.refresh();
        Ok(keyring)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot have left it half changed: each change is one push or remove.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        let mut entries: Vec<Entry> = state
            .memory
            .iter()
            .map(|m| Entry {
                base: m.segment.base() as usize,
                length: m.segment.length(),
                keys: m.regions.iter().map(MemoryRegion::keys).collect(),
            })
            .collect();
        entries.sort_by_key(|entry| entry.base);
        *self.0.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Table(entries));
        self.0.generation.fetch_add(1, Ordering::Release);
    }
}

impl fmt::Debug for Fabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fabric({:?})", self.0.read_mode)
    }
}

impl PartialEq for Fabric {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Memory that connections may use; dropping it ends that, and then lets go of the memory.
pub struct Registration {
    fabric: Fabric,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut state = self.fabric.state();
        let index = state.memory.iter().position(|m| m.id == self.id);
        let memory = index.map(|index| state.memory.swap_remove(index));
        self.fabric.publish(&state);
        drop(state);
        // Unpinning takes its time; nobody waits for the lock meanwhile.
        drop(memory);
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registration({})", self.id)
    }
}

/// Finds the keys of memory, for a connection.
pub(super) struct Keyring {
    fabric: Fabric,
    domain: usize,
    generation: u64,
    table: Arc<Table>,
}

impl Keyring {
    /// The keys of memory that lies within one registration.
    pub(super) fn find(&mut self, segment: &Segment) -> Option<Keys> {
        if self.fabric.0.generation.load(Ordering::Acquire) != self.generation {
            self.refresh();
        }
        let (base, length) = (segment.base() as usize, segment.length());
        let entries = &self.table.0;
        let entry = entries[..entries.partition_point(|entry| entry.base <= base)].last()?;
        let within = base - entry.base <= entry.length && length <= entry.length - (base - entry.base);
        entry.keys.get(self.domain).copied().filter(|_| within)
    }

    fn refresh(&mut self) {
        self.generation = self.fabric.0.generation.load(Ordering::Acquire);
        self.table = Arc::clone(&self.fabric.0.table.read().unwrap_or_else(PoisonError::into_inner));
    }

    /// A keyring of memory with given keys, without any device.
    #[cfg(test)]
    pub(super) fn fixed(memory: &[(Segment, Keys)]) -> Self {
        let fabric = Fabric::new(ReadMode::Direct);
        let mut entries: Vec<Entry> = memory
            .iter()
            .map(|(s, keys)| Entry { base: s.base() as usize, length: s.length(), keys: vec![*keys] })
            .collect();
        entries.sort_by_key(|entry| entry.base);
        *fabric.0.table.write().unwrap() = Arc::new(Table(entries));
        let mut keyring = Self { fabric, domain: 0, generation: u64::MAX, table: Arc::default() };
        keyring.refresh();
        keyring
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(base: usize, length: usize) -> Segment {
        // SAFETY is not at stake: the addresses are only compared.
        crate::buffer::for_tests(base, length)
    }

    #[test]
    fn keys_are_found_for_memory_within_one_registration_and_for_no_other() {
        let keys = |n| Keys { local: n, remote: n };
        let mut keyring =
            Keyring::fixed(&[(segment(0x20_000, 0x1000), keys(2)), (segment(0x10_000, 0x1000), keys(1))]);
        assert_eq!(keyring.find(&segment(0x10_000, 0x1000)), Some(keys(1)));
        assert_eq!(keyring.find(&segment(0x10_fff, 1)), Some(keys(1)));
        assert_eq!(keyring.find(&segment(0x20_010, 0x10)), Some(keys(2)));
        assert_eq!(keyring.find(&segment(0x10_fff, 2)), None);
        assert_eq!(keyring.find(&segment(0xf_fff, 2)), None);
        assert_eq!(keyring.find(&segment(0x21_000, 1)), None);
        assert_eq!(keyring.find(&segment(0x1000, usize::MAX - 0x1000)), None);
    }

    #[test]
    fn memory_is_kept_by_its_registration_and_let_go_with_it() {
        let fabric = Fabric::new(ReadMode::Direct);
        let owner = Arc::new(7u8);
        let kept: Arc<dyn Any + Send + Sync> = owner.clone();
        let registration = fabric.register(segment(0x1000, 0x1000), kept, Exposure::Peers).unwrap();
        assert_eq!(Arc::strong_count(&owner), 2);
        drop(registration);
        assert_eq!(Arc::strong_count(&owner), 1);
        assert!(fabric.0.table.read().unwrap().0.is_empty());
    }
}
