//! The engine of a shard: one io_uring for all its disks, and inline execution for those that lie in memory.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::file::{DiskFile, Medium};
use super::inline::Inline;
use super::uring::{Ring, RingDisk};
use super::{BufferPool, Completion, DiskError, DiskId, Engine, Io, IoKind, Limits};

/// Most requests that a ring can be asked to hold.
const MAX_DEPTH: u32 = 4096;

/// How I/O on a disk is executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// Inline for disks in memory, io_uring for all others.
    #[default]
    Auto,
    /// io_uring always; an error where there is none.
    Uring,
    /// Inline always: a slow disk then stops the whole shard while it works.
    Inline,
}

impl FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "inline" => Ok(Self::Inline),
            _ => Err(format!("'{text}' is no disk engine: expected auto, uring or inline")),
        }
    }
}

/// Settings of a [`DiskEngine`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EngineOptions {
    /// How I/O is executed.
    pub choice: EngineChoice,
    /// Requests that the kernel gets at a time over all disks: 1 to 4096. Each costs about 300 bytes.
    pub queue_depth: u32,
    /// Most disks at a time. What a disk costs, it costs when it is added.
    pub disks: u16,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { choice: EngineChoice::Auto, queue_depth: 256, disks: u16::MAX }
    }
}

#[derive(Debug)]
enum Disk {
    Ring(RingDisk),
    Inline(DiskFile),
}

/// See the module's comment. To be made, used and dropped on the thread of its shard.
pub struct DiskEngine {
    options: EngineOptions,
    ring: Option<Ring>,
    inline: Inline,
    disks: Vec<Option<Disk>>,
    /// Requests for the ring that found it full.
    waiting: VecDeque<Io>,
    ready: Vec<Completion>,
}

impl DiskEngine {
    /// An engine without disks.
    ///
    /// # Errors
    /// When the options are out of range, or io_uring was asked for and is not to be had. With [`EngineChoice::Auto`]
    /// its absence is a warning, and all disks are executed inline.
    pub fn new(options: EngineOptions) -> io::Result<Self> {
        if !(1..=MAX_DEPTH).contains(&options.queue_depth) || options.disks == 0 {
            let text = format!(
                "queue depth {} and {} disks: expected a depth of 1 to {MAX_DEPTH} and at least one disk",
                options.queue_depth, options.disks
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let ring = match options.choice {
            EngineChoice::Inline => None,
            EngineChoice::Uring => Some(Ring::new(options.queue_depth, options.disks)?),
            EngineChoice::Auto => Ring::new(options.queue_depth, options.disks)
                .inspect_err(|error| {
                    tracing::warn!(
                        "no io_uring here ({error}); the shard will stand still while a disk works"
                    );
                })
                .ok(),
        };
        let (inline, waiting) = (Inline::new(), VecDeque::with_capacity(options.queue_depth as usize));
        Ok(Self { options, ring, inline, disks: Vec::new(), waiting, ready: Vec::new() })
    }

    /// Registers the memory of `pool` with the ring, which saves pinning pages on each request. That it cannot be done,
    /// for the limit on locked memory as a rule, is a warning: each request then pins its pages.
    pub fn register_buffers(&mut self, pool: &BufferPool) {
        let Some(ring) = &mut self.ring else { return };
        if let Err(error) = ring.register_buffers(pool) {
            tracing::warn!(
                "{} bytes of buffers are not registered with io_uring: {error}; raise the limit on locked memory (ulimit -l, LimitMEMLOCK=)",
                pool.total_bytes()
            );
        }
    }

    /// Whether the ring has the memory of a pool registered.
    #[must_use]
    pub fn has_registered_buffers(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::has_registered_buffers)
    }

    /// Takes a disk.
    ///
    /// # Errors
    /// When the engine has as many disks as it may have.
    pub fn add_disk(&mut self, file: DiskFile) -> io::Result<DiskId> {
        let index = self.disks.iter().position(Option::is_none).unwrap_or(self.disks.len());
        let id = u16::try_from(index).ok().filter(|&id| id < self.options.disks).ok_or_else(|| {
            io::Error::other(format!("the engine has {} disks, as many as it may have", self.options.disks))
        })?;
        let inline = match self.options.choice {
            EngineChoice::Auto => file.medium() == Medium::Memory,
            EngineChoice::Uring => false,
            EngineChoice::Inline => true,
        };
        let disk = match &mut self.ring {
            Some(ring) if !inline => Disk::Ring(ring.add_disk(id, file)),
            _ => Disk::Inline(file),
        };
        if index == self.disks.len() {
            self.disks.push(None);
        }
        self.disks[index] = Some(disk);
        Ok(DiskId(id))
    }

    /// Lets go of a disk.
    ///
    /// # Errors
    /// When the engine has no such disk, or I/O on it is still in flight: the caller drains it first. Other disks may be
    /// as busy as they like.
    pub fn remove_disk(&mut self, id: DiskId) -> io::Result<()> {
        let waits = self.waiting.iter().any(|io| io.disk == id) || self.ready.iter().any(|c| c.disk == id);
        if waits || self.ring.as_ref().is_some_and(|ring| ring.uses(id)) {
            return Err(io::Error::other(format!("requests on disk {} are still in flight", id.0)));
        }
        let disk = self.disks.get_mut(usize::from(id.0)).and_then(Option::take);
        match (disk, &mut self.ring) {
            (None, _) => Err(io::Error::other(DiskError::NoSuchDisk(id))),
            (Some(Disk::Ring(disk)), Some(ring)) => {
                ring.remove_disk(id.0, &disk);
                Ok(())
            }
            (Some(_), _) => Ok(()),
        }
    }

    /// The disk with this id.
    #[must_use]
    pub fn disk(&self, id: DiskId) -> Option<&DiskFile> {
        match self.disks.get(usize::from(id.0))?.as_ref()? {
            Disk::Ring(disk) => Some(&disk.file),
            Disk::Inline(file) => Some(file),
        }
    }

    /// A disk has become larger: requests may go as far as `size` from now on.
    pub fn resize_disk(&mut self, id: DiskId, size: u64) {
        match self.disks.get_mut(usize::from(id.0)).and_then(Option::as_mut) {
            Some(Disk::Ring(disk)) => disk.file.set_size(size),
            Some(Disk::Inline(file)) => file.set_size(size),
            None => {}
        }
    }

    /// Whether requests on this disk complete within [`Engine::submit`].
    #[must_use]
    pub fn is_inline(&self, id: DiskId) -> bool {
        matches!(self.disks.get(usize::from(id.0)), Some(Some(Disk::Inline(_))))
    }

    /// Whether there is an io_uring; all disks are executed inline where there is none.
    #[must_use]
    pub const fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// As [`Engine::completions`], but waits for at least one when any request is in flight. For opening and closing,
    /// not for the loop of a shard.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub fn wait_completions(&mut self, out: &mut Vec<Completion>) -> io::Result<()> {
        let before = out.len();
        self.completions(out);
        while out.len() == before && self.in_flight() > 0 {
            if let Some(ring) = &mut self.ring {
                ring.wait()?;
            }
            self.completions(out);
        }
        Ok(())
    }

    /// Moves waiting requests into the ring while it has room.
    fn refill(&mut self) {
        while self.ring.as_ref().is_some_and(Ring::has_room) {
            let Some(io) = self.waiting.pop_front() else { return };
            self.start(io);
        }
    }

    fn start(&mut self, io: Io) {
        let disk = self.disks.get(usize::from(io.disk.0)).and_then(Option::as_ref);
        let (Some(Disk::Ring(disk)), Some(ring)) = (disk, &mut self.ring) else {
            let error = DiskError::NoSuchDisk(io.disk);
            return self.ready.push(io.failed(error));
        };
        self.ready.extend(ring.start(disk, io));
    }
}

impl Engine for DiskEngine {
    fn submit(&mut self, mut io: Io) {
        let checked = match self.disk(io.disk) {
            Some(file) => file.check(&io),
            None => Err(DiskError::NoSuchDisk(io.disk)),
        };
        if let Err(error) = checked {
            return self.ready.push(io.failed(error));
        }
        if io.kind == IoKind::Flush && super::faults::take_flush() {
            let error = io.errno(libc::EIO);
            return self.ready.push(io.failed(error));
        }
        if let Some(Some(Disk::Inline(file))) = self.disks.get(usize::from(io.disk.0)) {
            let result = self.inline.execute(file, &mut io);
            return self.ready.push(io.complete(result));
        }
        // Waiting requests go first, or one of them could wait for ever.
        if self.waiting.is_empty() && self.ring.as_ref().is_some_and(Ring::has_room) {
            self.start(io);
        } else {
            self.waiting.push_back(io);
        }
    }

    fn flush_submissions(&mut self) {
        if let Some(ring) = &mut self.ring
            && ring.wants_enter()
        {
            ring.enter();
        }
    }

    fn completions(&mut self, out: &mut Vec<Completion>) {
        self.flush_submissions();
        if let Some(ring) = &mut self.ring {
            ring.quench();
        }
        while let Some(ring) = &mut self.ring {
            let disks = &self.disks;
            let disk_of = |io: &Io| match disks.get(usize::from(io.disk.0)) {
                Some(Some(Disk::Ring(disk))) => Some(disk),
                _ => None,
            };
            let before = self.ready.len();
            ring.reap(disk_of, &mut self.ready);
            let progress = self.ready.len() > before;
            self.refill();
            if !self.ring.as_mut().is_some_and(Ring::wants_enter) {
                break;
            }
            self.flush_submissions();
            // What the kernel does not take now, it takes when something completed.
            if !progress && !self.ring.as_mut().is_some_and(Ring::has_completions) {
                break;
            }
        }
        out.append(&mut self.ready);
    }

    fn fd(&self) -> Option<RawFd> {
        self.ring.as_ref().map(Ring::fd)
    }

    fn in_flight(&self) -> usize {
        self.ring.as_ref().map_or(0, Ring::in_flight) + self.waiting.len() + self.ready.len()
    }

    fn limits(&self) -> Limits {
        Limits { queue_depth: self.options.queue_depth, disks: self.options.disks }
    }
}
