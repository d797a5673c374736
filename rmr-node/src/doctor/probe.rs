//! What is found by trying: io_uring with its operations, the directory of stores by a small file that is written, read, emptied
//! and removed, and the devices of stores by opening them for reading.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use io_uring::{IoUring, Probe, opcode};
use serde::Serialize;

use super::machine::BlockQueue;
use crate::disk::{
    BufferPool, Completion, DiskEngine, DiskFile, DiskId, Engine as _, EngineChoice, EngineOptions, Io,
    IoKind, Medium, Payload,
};

/// Memory that is registered with io_uring in order to see whether that can be done.
const TRIAL_BUFFERS: usize = 1 << 20;
/// Size of the file that is tried.
const TRIAL_FILE: u64 = 1 << 20;
/// Length of the requests on it.
const TRIAL_IO: usize = 64 << 10;

/// Disk I/O of this kernel.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Engine {
    /// Why there is no io_uring.
    pub problem: Option<String>,
    /// Operations that this program uses and this kernel lacks.
    pub missing_operations: Vec<String>,
    /// Whether completions are processed on the thread that asks for them.
    pub deferred_work: bool,
    /// Whether a little memory could be registered.
    pub registered_buffers: bool,
}

impl Engine {
    /// Tries it.
    #[must_use]
    pub fn probe() -> Self {
        let mut found = Self {
            problem: None,
            missing_operations: Vec::new(),
            deferred_work: false,
            registered_buffers: false,
        };
        let ring = match IoUring::new(8) {
            Ok(ring) => ring,
            Err(error) => {
                found.problem = Some(error.to_string());
                return found;
            }
        };
        let used = [
            ("READV", opcode::Readv::CODE),
            ("WRITEV", opcode::Writev::CODE),
            ("READ_FIXED", opcode::ReadFixed::CODE),
            ("WRITE_FIXED", opcode::WriteFixed::CODE),
            ("FSYNC", opcode::Fsync::CODE),
            ("FALLOCATE", opcode::Fallocate::CODE),
        ];
        let mut probe = Probe::new();
        if ring.submitter().register_probe(&mut probe).is_ok() {
            let missing = used.into_iter().filter(|(_, code)| !probe.is_supported(*code));
            found.missing_operations = missing.map(|(name, _)| name.to_owned()).collect();
        } else {
            found.missing_operations.push("PROBE".to_owned());
        }
        let deferring: std::io::Result<IoUring> =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(8);
        found.deferred_work = deferring.is_ok();
        let options = EngineOptions { choice: EngineChoice::Uring, queue_depth: 8, disks: 1 };
        if let (Ok(mut engine), Ok(pool)) = (DiskEngine::new(options), BufferPool::new(TRIAL_BUFFERS)) {
            engine.register_buffers(&pool);
            found.registered_buffers = engine.has_registered_buffers();
        }
        found
    }
}

/// The directory of file stores.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StoreDirectory {
    /// Where.
    pub path: PathBuf,
    /// Why no store can be kept there.
    pub problem: Option<String>,
    /// What was found.
    pub facts: Option<DirectoryFacts>,
}

/// What files in a directory can do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DirectoryFacts {
    /// What they lie on.
    pub medium: Medium,
    /// Whether I/O bypasses the page cache.
    pub direct: bool,
    /// What offsets are multiples of.
    pub alignment: u32,
    /// Whether a discard gives space back.
    pub punches_holes: bool,
    /// Whether ranges are made zero without writing zeroes.
    pub zeroes_ranges: bool,
}

impl StoreDirectory {
    /// Tries it with a file, which is removed again.
    #[must_use]
    pub fn probe(path: &Path) -> Self {
        let (problem, facts) = match try_directory(path) {
            Ok(facts) => (None, Some(facts)),
            Err(problem) => (Some(problem), None),
        };
        Self { path: path.to_owned(), problem, facts }
    }
}

/// The device or file of a store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StorePath {
    /// Where.
    pub path: PathBuf,
    /// Why it cannot be opened.
    pub problem: Option<String>,
    /// What was found.
    pub facts: Option<StoreFacts>,
}

/// What a device or file is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StoreFacts {
    /// What it is made of.
    pub medium: Medium,
    /// Whether I/O bypasses the page cache.
    pub direct: bool,
    /// What offsets are multiples of.
    pub alignment: u32,
    /// Its size in bytes.
    pub size: u64,
    /// What a block device says of itself.
    pub queue: Option<BlockQueue>,
}

impl StorePath {
    /// Opens it for reading, and asks the kernel whose tree is below `root` what it is.
    #[must_use]
    pub fn probe(root: &Path, path: &Path) -> Self {
        let (problem, facts) = match look_at(root, path) {
            Ok(facts) => (None, Some(facts)),
            Err(error) => (Some(error.to_string()), None),
        };
        Self { path: path.to_owned(), problem, facts }
    }
}

fn look_at(root: &Path, path: &Path) -> std::io::Result<StoreFacts> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    let is_device = metadata.file_type().is_block_device();
    let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let size = file.seek(SeekFrom::End(0))?;
    let disk = DiskFile::new(file, size)?;
    Ok(StoreFacts {
        medium: disk.medium(),
        direct: disk.is_direct(),
        alignment: disk.alignment(),
        size,
        queue: is_device.then(|| BlockQueue::of(root, major, minor)),
    })
}

/// A file that goes when its owner does.
struct Trial(PathBuf);

impl Drop for Trial {
    fn drop(&mut self) {
        // Nothing is lost if it stays: its name says what it is, and it begins with a dot.
        let _ = fs::remove_file(&self.0);
    }
}

fn try_directory(path: &Path) -> Result<DirectoryFacts, String> {
    let words = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let trial = Trial(path.join(format!(".rmr-doctor-{}", std::process::id())));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&trial.0)
        .map_err(|error| words("no file can be made in it", &error))?;
    file.set_len(TRIAL_FILE).map_err(|error| words("a file cannot be made larger", &error))?;
    let disk = DiskFile::new(file, TRIAL_FILE).map_err(|error| words("its kind is unknown", &error))?;
    let (medium, direct, alignment) = (disk.medium(), disk.is_direct(), disk.alignment());
    let options = EngineOptions { queue_depth: 8, disks: 1, ..EngineOptions::default() };
    let mut engine = DiskEngine::new(options).map_err(|error| words("no disk engine", &error))?;
    let pool = BufferPool::new(TRIAL_BUFFERS).map_err(|error| words("no memory", &error))?;
    let id = engine.add_disk(disk).map_err(|error| words("no disk engine", &error))?;

    let pattern: Vec<u8> = (0..TRIAL_IO).map(|at| (at % 251).to_le_bytes()[0]).collect();
    let written = run(&mut engine, &pool, id, IoKind::Write, &pattern)?;
    drop(written);
    run(&mut engine, &pool, id, IoKind::Flush, &[])?;
    expect(&run(&mut engine, &pool, id, IoKind::Read, &pattern)?, |at| pattern[at], "what was written")?;
    run(&mut engine, &pool, id, IoKind::WriteZeroes { unmap: false }, &pattern)?;
    expect(&run(&mut engine, &pool, id, IoKind::Read, &pattern)?, |_| 0, "zeroes")?;
    run(&mut engine, &pool, id, IoKind::Write, &pattern)?;
    run(&mut engine, &pool, id, IoKind::Discard, &pattern)?;
    expect(&run(&mut engine, &pool, id, IoKind::Read, &pattern)?, |_| 0, "zeroes after a discard")?;
    let disk = engine.disk(id).ok_or("the disk engine lost the file")?;
    Ok(DirectoryFacts {
        medium,
        direct,
        alignment,
        punches_holes: disk.punches_holes(),
        zeroes_ranges: disk.zeroes_ranges(),
    })
}

/// One request on the first bytes of the trial file, as many as `pattern` has, and the memory that it ended with.
fn run(
    engine: &mut DiskEngine,
    pool: &BufferPool,
    disk: DiskId,
    kind: IoKind,
    pattern: &[u8],
) -> Result<Payload, String> {
    let payload = if matches!(kind, IoKind::Read | IoKind::Write) {
        let mut buffer = pool.try_acquire(pattern.len()).ok_or("no buffer is free")?;
        if kind == IoKind::Write {
            buffer.bytes_mut()[..pattern.len()].copy_from_slice(pattern);
        }
        Payload::Buffer(buffer)
    } else {
        Payload::None
    };
    engine.submit(Io { disk, id: 0, kind, offset: 0, length: pattern.len() as u64, payload });
    let mut ended: Vec<Completion> = Vec::new();
    engine.wait_completions(&mut ended).map_err(|error| format!("waiting for a request: {error}"))?;
    let completion = ended.pop().ok_or("a request never ended")?;
    completion.result.map_err(|error| error.to_string())?;
    Ok(completion.payload)
}

fn expect(read: &Payload, wanted: impl Fn(usize) -> u8, what: &str) -> Result<(), String> {
    let Payload::Buffer(buffer) = read else { return Err("a read came back without its memory".to_owned()) };
    match buffer.bytes().iter().enumerate().position(|(at, byte)| *byte != wanted(at)) {
        None => Ok(()),
        Some(at) => Err(format!("it does not read back {what}: byte {at} is {:#04x}", buffer.bytes()[at])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_tried_and_left_as_it_was() {
        for base in ["/tmp", "/dev/shm"] {
            let directory = tempfile::tempdir_in(base).unwrap();
            let found = StoreDirectory::probe(directory.path());
            let facts = found.facts.unwrap_or_else(|| panic!("{:?}", found.problem));
            assert_eq!(facts.medium == Medium::Memory, base == "/dev/shm", "{facts:?}");
            assert!(facts.punches_holes, "{facts:?}");
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_directory_that_is_none_and_a_store_that_is_missing_are_problems_in_words() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing");
        let found = StoreDirectory::probe(&missing);
        assert!(found.problem.unwrap().contains("no file can be made in it: No such file"));
        let found = StorePath::probe(directory.path(), &missing);
        assert!(found.problem.unwrap().contains("No such file") && found.facts.is_none());
    }

    #[test]
    fn the_file_of_a_store_is_looked_at_without_a_change() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.store");
        fs::write(&path, vec![7; 8192]).unwrap();
        let facts = StorePath::probe(directory.path(), &path).facts.unwrap();
        assert_eq!((facts.size, facts.queue), (8192, None));
        assert_eq!(fs::read(&path).unwrap(), vec![7; 8192]);
    }

    #[test]
    fn this_machine_has_the_operations_that_the_engine_uses() {
        let engine = Engine::probe();
        assert!(engine.problem.is_some() || engine.missing_operations.is_empty(), "{engine:?}");
    }
}
