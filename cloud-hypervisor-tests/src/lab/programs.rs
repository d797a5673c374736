//! Where the programs under test and the tools of the machine are found, with words for whoever lacks one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// One of the project's own programs: from `RMR_BIN_DIR`, else from the build directory this test was built in.
///
/// # Errors
/// When it has not been built.
pub fn own(name: &str) -> Result<PathBuf> {
    let directory = match env::var_os("RMR_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => profile_directory()?,
    };
    let path = directory.join(name);
    if !path.is_file() {
        bail!(
            "{} is missing: build it first with `cargo build --workspace --bins` ({}), or set RMR_BIN_DIR",
            path.display(),
            env!("CARGO_MANIFEST_DIR"),
        );
    }
    Ok(path)
}

/// A program of the machine, looked up in PATH and the directories of the superuser.
///
/// # Errors
/// When it is not installed.
pub fn system(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
        .with_context(|| format!("{name} is not installed: run cloud-hypervisor-tests/install-deps.sh"))
}

/// Where the lab caches what costs time or network to get: `vm/` in cargo's target directory, or `RMR_VM_DIR`.
///
/// # Errors
/// When the test runs from outside a target directory and `RMR_VM_DIR` is not set.
pub fn cache_directory() -> Result<PathBuf> {
    if let Some(directory) = env::var_os("RMR_VM_DIR") {
        return Ok(PathBuf::from(directory));
    }
    let profile = profile_directory()?;
    Ok(profile.parent().context("the build directory has no parent")?.join("vm"))
}

/// Runs `command` to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started or does not succeed; the error carries what it printed.
pub fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(text)
}

/// `target/<profile>`: test executables are in `deps/` or `examples/` below it, programs in it.
fn profile_directory() -> Result<PathBuf> {
    let executable = env::current_exe().context("finding the test's own executable")?;
    let directory = executable.parent().context("the test's executable has no directory")?;
    let nested = directory.ends_with("deps") || directory.ends_with("examples");
    let profile = if nested { directory.parent() } else { Some(directory) };
    profile.map(Path::to_path_buf).context("the test's executable is not in a build directory")
}
