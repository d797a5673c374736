//! Debian's kernel package, fetched once and unpacked in the cache: the image to boot and its modules in load order.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::lab::{programs, sys};

/// The package whose dependency is the current kernel.
const META_PACKAGE: &str = "linux-image-amd64";

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    /// As `uname -r` says.
    pub(super) version: String,
    root: PathBuf,
}

impl Kernel {
    /// The cached kernel, or the newest of the machine's package sources if none is cached. Needs the network only then.
    pub(super) fn obtain(cache: &Path) -> Result<Self> {
        fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
        let _lock = lock(&cache.join("kernel.lock"))?;
        let stamp = cache.join("kernel.version");
        if let Ok(version) = fs::read_to_string(&stamp) {
            let kernel = Self { root: cache.join(&version), version };
            if kernel.bzimage().is_file() {
                return Ok(kernel);
            }
        }
        let kernel = Self::fetch(cache)?;
        fs::write(&stamp, &kernel.version).with_context(|| format!("writing {}", stamp.display()))?;
        Ok(kernel)
    }

    fn fetch(cache: &Path) -> Result<Self> {
        let depends = programs::output_of(Command::new("apt-cache").args(["depends", META_PACKAGE]))?;
        let package = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|package| package.starts_with("linux-image-"))
            .with_context(|| {
                format!("{META_PACKAGE} names no kernel package; run apt-get update. It said:\n{depends}")
            })?;
        let version = package.trim_start_matches("linux-image-").trim_end_matches("-unsigned").to_owned();
        eprintln!("lab: fetching Debian's kernel {version} into {}", cache.display());
        let work = tempfile::Builder::new().prefix("kernel-").tempdir_in(cache)?;
        let mut download = Command::new("apt-get");
        // Without this, apt complains that its own user cannot write here.
        download.args(["-o", "APT::Sandbox::User=root", "-qq", "download", package]).current_dir(work.path());
        programs::output_of(&mut download)
            .context("fetching the guests' kernel; old lists? run apt-get update")?;
        let archive = fs::read_dir(work.path())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get download {package} left no package"))?;
        let root = work.path().join("root");
        programs::output_of(Command::new("dpkg").arg("-x").args([&archive, &root]))?;
        programs::output_of(Command::new(programs::system("depmod")?).arg("-b").args([&root]).arg(&version))?;
        let target = cache.join(&version);
        if target.exists() {
            fs::remove_dir_all(&target)
                .with_context(|| format!("removing the broken {}", target.display()))?;
        }
        fs::rename(&root, &target).with_context(|| format!("moving the kernel to {}", target.display()))?;
        let kernel = Self { version, root: target };
        if !kernel.bzimage().is_file() {
            bail!("package {package} holds no {}", kernel.bzimage().display());
        }
        Ok(kernel)
    }

    /// The image to boot.
    pub(super) fn bzimage(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// The files of `modules` and of all they depend on, in an order in which they load.
    pub(super) fn module_files(&self, modules: &[String]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for module in modules {
            let mut command = Command::new(programs::system("modprobe")?);
            command.arg("-d").arg(&self.root).args(["-S", &self.version, "--show-depends", module]);
            for line in programs::output_of(&mut command)?.lines() {
                let mut words = line.split_whitespace();
                match (words.next(), words.next().map(PathBuf::from)) {
                    (Some("insmod"), Some(file)) if !files.contains(&file) => files.push(file),
                    // Listed before, by another module, or built into the kernel.
                    (Some("insmod" | "builtin"), _) => {}
                    _ => bail!(
                        "modprobe said '{line}' about module {module}, expected 'insmod FILE' or 'builtin NAME'"
                    ),
                }
            }
        }
        Ok(files)
    }
}

/// Takes the lock at `path`, waiting for other test processes; it is released when the file is dropped.
pub(super) fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    sys::lock_file(&file).with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}
