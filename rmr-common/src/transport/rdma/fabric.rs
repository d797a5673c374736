//! Devices, and the memory that is registered with them: one registration for each region and device, made before the
//! memory is used, and ended when its owner lets go of it.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::endpoint::Keys;
use super::verbs::{self, Domain, MemoryRegion, Place};
use super::{Exposure, RdmaError, ReadMode};
use crate::buffer::Segment;

/// What the RDMA connections of a process have in common. Clones are the same fabric.
#[derive(Clone)]
pub struct Fabric(Arc<Shared>);

struct Shared {
    read_mode: ReadMode,
    /// A device without memory windows is used all the same, by copying.
    may_copy: bool,
    state: Mutex<State>,
    /// What connections look into; replaced as a whole with each change.
    table: RwLock<Arc<Table>>,
    /// Counts the changes.
    generation: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Those whose device was removed leave their place empty: connections know theirs by number.
    domains: Vec<Option<Arc<Domain>>>,
    memory: Vec<Memory>,
    next: u64,
}

impl State {
    fn domain_of(&self, place: &Place) -> Option<Arc<Domain>> {
        self.domains.iter().flatten().find(|domain| domain.is_of(place)).map(Arc::clone)
    }

    /// Memory that has no entry in `pinned`, by its identity.
    fn missing<T>(&self, pinned: &HashMap<u64, T>) -> Vec<Unpinned> {
        let missing = self.memory.iter().filter(|memory| !pinned.contains_key(&memory.id));
        missing.map(|m| (m.id, m.segment, m.exposure, Arc::clone(&m.owner))).collect()
    }
}

/// Memory that a new device has to pin: its identity, where it is, who may write to it, and what keeps it mapped.
type Unpinned = (u64, Segment, Exposure, Arc<dyn Any + Send + Sync>);

/// Registered memory with what keeps it mapped.
struct Memory {
    id: u64,
    segment: Segment,
    exposure: Exposure,
    /// One for each domain, in their order. Before `owner`, though each holds it as well.
    regions: Vec<Option<MemoryRegion>>,
    owner: Arc<dyn Any + Send + Sync>,
}

/// Keys of memory by address, ascending, for each domain.
#[derive(Default)]
struct Table(Vec<Entry>);

struct Entry {
    base: usize,
    length: usize,
    keys: Vec<Option<Keys>>,
}

impl Fabric {
    /// A fabric without devices; they are opened when connections need them.
    #[must_use]
    pub fn new(read_mode: ReadMode) -> Self {
        Self::with(read_mode, false)
    }

    /// The fabric of a node: no peer is ever told a key that reaches more than what it is to write. On a device without
    /// memory windows, data that the node pulls is copied for that.
    #[must_use]
    pub fn for_nodes() -> Self {
        Self::with(ReadMode::Window, true)
    }

    fn with(read_mode: ReadMode, may_copy: bool) -> Self {
        Self(Arc::new(Shared {
            read_mode,
            may_copy,
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

    /// How reads are done on connections over a device.
    pub(super) fn mode_on(&self, domain: &Domain) -> Result<ReadMode, RdmaError> {
        match self.0.read_mode {
            ReadMode::Window if domain.limits.has_windows => Ok(ReadMode::Window),
            ReadMode::Window if self.0.may_copy => Ok(ReadMode::Bounce),
            ReadMode::Window => Err(RdmaError::NoWindows { device: domain.device.clone() }),
            mode => Ok(mode),
        }
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
            .map(|domain| {
                domain.as_ref().map(|d| d.register(segment, Arc::clone(&owner), exposure)).transpose()
            })
            .collect::<Result<_, _>>()?;
        let id = state.next;
        state.next += 1;
        state.memory.push(Memory { id, segment, exposure, regions, owner });
        self.publish(&state);
        Ok(Registration { fabric: self.clone(), id })
    }

    /// The domain of a device, with all memory registered.
    pub(super) fn domain_of(&self, place: &Place) -> Result<Arc<Domain>, RdmaError> {
        self.let_go();
        if let Some(domain) = self.state().domain_of(place) {
            return Ok(domain);
        }
        let domain = Arc::new(Domain::new(place)?);
        let mut pinned: HashMap<u64, MemoryRegion> = HashMap::new();
        loop {
            let missing = self.state().missing(&pinned);
            // Pinning a guest takes seconds, in which the thread that serves it may want to register memory too.
            for (id, segment, exposure, owner) in missing {
                pinned.insert(id, domain.register(segment, owner, exposure)?);
            }
            let mut state = self.state();
            if let Some(other) = state.domain_of(place) {
                // Another thread was faster. What this one pinned goes after the lock.
                drop(state);
                return Ok(other);
            }
            if !state.missing(&pinned).is_empty() {
                continue;
            }
            for memory in &mut state.memory {
                memory.regions.push(pinned.remove(&memory.id));
            }
            tracing::info!(device = %domain.device, "RDMA device in use");
            tracing::debug!(device = %domain.device, limits = ?domain.limits, "limits of the RDMA device");
            state.domains.push(Some(Arc::clone(&domain)));
            self.publish(&state);
            // Before what was pinned, and deregistered by its owner meanwhile.
            drop(state);
            return Ok(domain);
        }
    }

    /// Whether devices are open. Whoever has no connections then has to call [`Fabric::let_go`] now and then.
    #[must_use]
    pub fn has_devices(&self) -> bool {
        self.state().domains.iter().any(Option::is_some)
    }

    /// Lets go of devices that were removed. Their connections hear of it themselves; what they hold goes with them.
    pub fn let_go(&self) {
        let mut state = self.state();
        let gone = |domain: &Option<Arc<Domain>>| domain.as_ref().is_some_and(|domain| domain.is_gone());
        let gone: Vec<usize> = (0..state.domains.len()).filter(|n| gone(&state.domains[*n])).collect();
        if gone.is_empty() {
            drop(state);
            return verbs::forget_unused_devices();
        }
        let (mut domains, mut regions) = (Vec::new(), Vec::new());
        for number in gone {
            domains.extend(state.domains[number].take());
            regions.extend(state.memory.iter_mut().filter_map(|memory| memory.regions[number].take()));
        }
        self.publish(&state);
        drop(state);
        // Unpinning takes its time; nobody waits for the lock meanwhile.
        drop(regions);
        for domain in domains {
            tracing::warn!(device = %domain.device, "the RDMA device was removed, and its memory is not pinned any more");
        }
    }

    /// The keys of a domain, for a connection.
    pub(super) fn keyring(&self, domain: &Arc<Domain>) -> Result<Keyring, RdmaError> {
        let is_it = |other: &Option<Arc<Domain>>| other.as_ref().is_some_and(|o| Arc::ptr_eq(o, domain));
        let index = self.state().domains.iter().position(is_it).ok_or(RdmaError::Removed)?;
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
                keys: m.regions.iter().map(|region| region.as_ref().map(MemoryRegion::keys)).collect(),
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
        entry.keys.get(self.domain).copied().flatten().filter(|_| within)
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
            .map(|(s, keys)| Entry { base: s.base() as usize, length: s.length(), keys: vec![Some(*keys)] })
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
    fn memory_that_was_registered_while_others_were_pinned_is_still_missing() {
        let fabric = Fabric::new(ReadMode::Direct);
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(());
        let register =
            |base| fabric.register(segment(base, 0x1000), Arc::clone(&owner), Exposure::Peers).unwrap();
        let first = register(0x1000);
        let mut pinned = HashMap::new();
        pinned.extend(fabric.state().missing(&pinned).into_iter().map(|(id, ..)| (id, ())));
        assert!(fabric.state().missing(&pinned).is_empty());
        let _second = register(0x2000);
        drop(first);
        let missing = fabric.state().missing(&pinned);
        assert_eq!(
            missing.iter().map(|(_, segment, ..)| segment.base() as usize).collect::<Vec<_>>(),
            [0x2000]
        );
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
