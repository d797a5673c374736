//! The initramfs of a guest: busybox, the agent, kernel modules, and programs of this machine with their libraries.
//! Built images are cached under a key made from everything that goes into them.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::kernel::{self, Kernel};
use crate::lab::{Lab, programs};

/// The guest's first program, with the agent in it.
const INIT: &str = include_str!("init.sh");
/// What every guest can do: virtio disks and ports, ext4 with its checksums.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4"];
/// Full-size programs that every guest has besides busybox; the agent itself needs `dash` and `flock`.
const PROGRAMS: [&str; 10] =
    ["fio", "mkfs.ext4", "e2fsck", "blkdiscard", "blockdev", "lsblk", "dd", "cmp", "dash", "flock"];

/// How long images are kept in the cache; one takes 90 MiB.
const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 3600);

/// A kernel and an initramfs, ready to boot.
#[derive(Clone, Debug)]
pub struct Image {
    /// The kernel to boot, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs, uncompressed: emulated processors unpack slowly.
    pub initramfs: PathBuf,
}

impl Image {
    /// The image that most tests want: disks, ext4, fio.
    ///
    /// # Errors
    /// When a tool is missing on this machine, or the kernel is not cached and cannot be fetched.
    pub fn standard() -> Result<Self> {
        ImageBuilder::new().build()
    }

    /// This image with more programs and their libraries in it, as a file of the test `lab` that goes when the test ends.
    /// For programs that every build changes, such as the ones under test: in the cache they would only pile up. They
    /// are stripped of what only a debugger needs, which is most of them.
    ///
    /// # Errors
    /// When a program or a tool is missing, or the file cannot be written.
    pub fn with_programs(&self, lab: &Lab, name: &str, programs: &[PathBuf]) -> Result<Self> {
        let stripped = lab.path(format!("{name}.stripped"));
        fs::create_dir(&stripped).with_context(|| format!("making {}", stripped.display()))?;
        let initramfs = lab.path(format!("{name}.cpio"));
        fs::copy(&self.initramfs, &initramfs).with_context(|| format!("writing {}", initramfs.display()))?;
        // The kernel unpacks one archive after the other; newc archives end at a multiple of four, where the next begins.
        let end = File::options().append(true).open(&initramfs)?;
        let mut archive = Archive::new(BufWriter::new(end));
        for program in programs {
            let path = guest_path(program);
            let small = stripped.join(path.file_name().unwrap_or_default());
            let mut strip = Command::new(programs::system("strip")?);
            programs::output_of(strip.arg("-o").arg(&small).arg(program))?;
            add_file(&mut archive, &small, &path)?;
            for library in libraries_of(program)? {
                add_file(&mut archive, &library, &library)?;
            }
        }
        archive.finish().with_context(|| format!("writing {}", initramfs.display()))?;
        fs::remove_dir_all(&stripped).with_context(|| format!("removing {}", stripped.display()))?;
        Ok(Self { kernel: self.kernel.clone(), initramfs })
    }
}

/// An image with more in it than the standard one.
#[derive(Clone, Debug)]
pub struct ImageBuilder {
    modules: Vec<String>,
    programs: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl ImageBuilder {
    /// The standard image.
    #[must_use]
    pub fn new() -> Self {
        Self {
            modules: MODULES.map(String::from).into(),
            programs: PROGRAMS.map(PathBuf::from).into(),
            files: Vec::new(),
        }
    }

    /// Adds a kernel module, loaded at boot with all it depends on.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// Adds a program with its libraries: a name to look up on this machine, or a path. It keeps its path, or is in
    /// `/usr/bin` of the guest if it comes from elsewhere than the machine's own directories of programs.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.programs.push(program.into());
        self
    }

    /// Adds a file of this machine under its own path: a configuration, or a library that programs load by name, with the
    /// libraries that it needs itself.
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.push(path.into());
        self
    }

    /// The image, from the cache if nothing that goes into it has changed.
    ///
    /// # Errors
    /// When a tool is missing on this machine, or the kernel is not cached and cannot be fetched.
    pub fn build(self) -> Result<Image> {
        // One at a time in this process; the file lock below is for the others.
        static BUILDING: Mutex<()> = Mutex::new(());
        let _building = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let cache = programs::cache_directory()?;
        let kernel = Kernel::obtain(&cache)?;
        let modules = kernel.module_files(&self.modules)?;
        let programs = self.programs.iter().map(|program| locate(program)).collect::<Result<Vec<_>>>()?;
        let busybox = programs::system("busybox")?;
        let mut stamp = DefaultHasher::new();
        (INIT, &kernel.version, &modules).hash(&mut stamp);
        for program in programs.iter().chain(&self.files).chain([&busybox]) {
            let metadata =
                fs::metadata(program).with_context(|| format!("looking at {}", program.display()))?;
            (program, metadata.len(), metadata.mtime(), metadata.mtime_nsec()).hash(&mut stamp);
        }
        let initramfs = cache.join(format!("initramfs-{:016x}.cpio", stamp.finish()));
        let _lock = kernel::lock(&cache.join("initramfs.lock"))?;
        if !initramfs.is_file() {
            remove_outdated(&cache)?;
            write_initramfs(&initramfs, &busybox, &modules, &programs, &self.files)?;
        }
        Ok(Image { kernel: kernel.bzimage(), initramfs })
    }
}

impl Default for ImageBuilder {
    fn default() -> Self {
        Self::new()
    }
}

/// Removes images that were built so long ago that what went into them has most likely changed.
fn remove_outdated(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).with_context(|| format!("listing {}", cache.display()))? {
        let entry = entry?;
        let is_image = entry.file_name().to_string_lossy().starts_with("initramfs-");
        let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
        if is_image && age > KEPT_FOR {
            fs::remove_file(entry.path()).with_context(|| format!("removing {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn write_initramfs(
    target: &Path,
    busybox: &Path,
    modules: &[PathBuf],
    programs: &[PathBuf],
    files: &[PathBuf],
) -> Result<()> {
    let unfinished = target.with_extension("unfinished");
    let mut archive = Archive::new(BufWriter::new(File::create(&unfinished)?));
    archive.add(Path::new("init"), INIT.as_bytes())?;
    add_file(&mut archive, busybox, Path::new("bin/busybox"))?;
    if !libraries_of(busybox)?.is_empty() {
        bail!("{} needs libraries: install the package busybox-static", busybox.display());
    }
    let mut order = String::new();
    for (number, module) in modules.iter().enumerate() {
        let name = format!("{number:02}-{}", module.file_name().unwrap_or_default().display());
        add_file(&mut archive, module, &Path::new("modules").join(&name))?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.add(Path::new("modules/order"), order.as_bytes())?;
    let in_place = files.iter().map(|file| (file, file.clone()));
    for (file, to) in programs.iter().map(|program| (program, guest_path(program))).chain(in_place) {
        add_file(&mut archive, file, &to)?;
        for library in libraries_of(file)? {
            add_file(&mut archive, &library, &library)?;
        }
    }
    archive.finish().with_context(|| format!("writing {}", unfinished.display()))?;
    fs::rename(&unfinished, target).with_context(|| format!("renaming {}", unfinished.display()))
}

fn add_file<W: Write>(archive: &mut Archive<W>, from: &Path, to: &Path) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
    archive.add(to, &content).with_context(|| format!("adding {} to the archive", from.display()))
}

/// Where a program goes inside the guest: its own path if the guest's PATH has it, else `/usr/bin`.
fn guest_path(program: &Path) -> PathBuf {
    const IN_PATH: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    if program.parent().is_some_and(|directory| IN_PATH.iter().any(|known| directory == Path::new(known))) {
        return program.to_path_buf();
    }
    Path::new("/usr/bin").join(program.file_name().unwrap_or_default())
}

fn locate(program: &Path) -> Result<PathBuf> {
    if program.is_absolute() {
        return Ok(program.to_path_buf());
    }
    programs::system(program.to_str().context("the name of a program is not UTF-8")?)
}

/// The shared libraries that `ldd` finds for a program or library; none if it is static, or neither of the two.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("starting ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    if complaint.contains("not a dynamic executable") || text.contains("statically linked") {
        return Ok(Vec::new());
    }
    if !output.status.success() || text.contains("not found") {
        bail!("libraries of {} are missing: {text}{complaint}", program.display());
    }
    let path_of = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path_of).collect())
}
