//! Where the admin API may make stores: below the store directory, and on what the configuration lists.
//!
//! A request names a path as text. What counts is the file that the path leads to, so `..`, symbolic links and file systems
//! that are mounted below a listed directory open no way out of it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

use super::Config;

/// Mount points of this process.
const MOUNTS: &str = "/proc/self/mountinfo";

/// Why no store may be made at a path.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// The path cannot be followed.
    #[error("store path '{}': {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The path does not end in the name of a file.
    #[error("store path '{}': expected an absolute path that ends in the name of a file or device", .0.display())]
    NoName(PathBuf),
    /// It is outside of what the configuration allows.
    #[error(
        "store path '{}'{}: this node makes stores only below its store_dir and on what its configuration lists. Nothing was \
         made. To allow it, add\n  store_places = [{}]\nto the node's configuration and restart the node",
        path.display(),
        leads_to(path, found),
        toml_text(found)
    )]
    NotListed {
        /// The path as it was asked for.
        path: PathBuf,
        /// Where it leads to.
        found: PathBuf,
    },
}

fn leads_to(path: &Path, found: &Path) -> String {
    if path == found { String::new() } else { format!(" leads to '{}'", found.display()) }
}

/// A path as TOML text. Configuration files are UTF-8, and a path that is not cannot be listed.
fn toml_text(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

impl Config {
    /// The name of the file or device that `path` leads to, if a store may be made there.
    ///
    /// # Errors
    /// When the path cannot be followed, or leads to something that the configuration does not list.
    pub fn place_for_store(&self, path: &Path) -> Result<PathBuf, PlaceError> {
        let listed = self.store_places.iter().chain(&self.stores).chain(&self.store_dir);
        let mounts = fs::read(MOUNTS).map_err(|source| PlaceError::Io { path: MOUNTS.into(), source })?;
        check_place(path, listed.map(PathBuf::as_path), &mount_points(&mounts))
    }
}

fn check_place<'a>(
    path: &Path,
    listed: impl Iterator<Item = &'a Path>,
    mounts: &[PathBuf],
) -> Result<PathBuf, PlaceError> {
    let fail = |source| PlaceError::Io { path: path.to_owned(), source };
    let no_name = || PlaceError::NoName(path.to_owned());
    let ends_in_name = matches!(path.components().next_back(), Some(Component::Normal(_)));
    // A trailing slash or dot is dropped by `components`, and would mean a directory.
    let is_literal = path.file_name().is_some_and(|n| path.as_os_str().as_bytes().ends_with(n.as_bytes()));
    if !path.is_absolute() || !ends_in_name || !is_literal {
        return Err(no_name());
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(no_name()) };
    let directory = fs::canonicalize(parent).map_err(fail)?;
    let entry = directory.join(name);
    let found = match fs::symlink_metadata(&entry) {
        Ok(_) => fs::canonicalize(&entry).map_err(fail)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => entry.clone(),
        Err(error) => return Err(fail(error)),
    };
    let device = fs::metadata(&found).ok().filter(|m| m.file_type().is_block_device()).map(|m| m.rdev());
    for listed in listed {
        // A device that is not there now cannot be meant; a directory that is gone has nothing below it.
        let Ok(place) = fs::canonicalize(listed) else { continue };
        let Ok(facts) = fs::metadata(&place) else { continue };
        let is_within = |path: &Path| path.starts_with(&place) && !crosses_mount(path, &place, mounts);
        // Devices keep the name by which they are listed: those of the kernel change with each boot.
        let used = match device {
            Some(device) if facts.file_type().is_block_device() => (facts.rdev() == device).then_some(listed),
            // Names of devices below /dev are made by the system, many of them as links to other places there. Elsewhere a
            // device node is a way out of the directory.
            Some(_) => (facts.is_dir() && place.starts_with("/dev") && is_within(&entry)).then_some(&*entry),
            None if facts.is_dir() => (is_within(&found) && found != place).then_some(&*found),
            None => (found == place).then_some(&*found),
        };
        if let Some(used) = used {
            return Ok(used.to_owned());
        }
    }
    Err(PlaceError::NotListed { path: path.to_owned(), found })
}

/// Whether another file system, or another part of one, is mounted between `place` and `path`.
fn crosses_mount(path: &Path, place: &Path, mounts: &[PathBuf]) -> bool {
    mounts.iter().any(|mount| mount != place && mount.starts_with(place) && path.starts_with(mount))
}

/// The mount points in a `mountinfo`: the fifth field of each line, with `\ooo` for blanks and backslashes.
fn mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|&b| b == b'\n');
    let fields = lines.filter_map(|line| line.split(|&b| b == b' ').nth(4));
    fields.map(|field| PathBuf::from(OsString::from_vec(unescape(field)))).collect()
}

/// Bytes with octal escapes resolved.
fn unescape(field: &[u8]) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::with_capacity(field.len()), field);
    while let Some((&first, tail)) = rest.split_first() {
        let octal = |digits: &[u8]| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        };
        match tail.get(..3).filter(|_| first == b'\\').and_then(octal) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A directory that may be used, one that may not, and a file in each.
    struct Tree {
        _root: tempfile::TempDir,
        good: PathBuf,
        bad: PathBuf,
    }

    fn tree() -> Tree {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().canonicalize().unwrap();
        let (good, bad) = (base.join("good"), base.join("good-but-other"));
        for directory in [&good, &bad] {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join("file"), "data").unwrap();
        }
        Tree { _root: root, good, bad }
    }

    fn check(path: &Path, listed: &[&Path]) -> Result<PathBuf, PlaceError> {
        check_place(path, listed.iter().copied(), &[])
    }

    #[test]
    fn stores_may_be_made_in_listed_directories_and_on_listed_files() {
        let Tree { _root, good, bad } = tree();
        let new = good.join("new.store");
        assert_eq!(check(&new, &[&good]).unwrap(), new);
        assert_eq!(check(&good.join("file"), &[&good]).unwrap(), good.join("file"));
        assert_eq!(check(&bad.join("file"), &[&bad.join("file")]).unwrap(), bad.join("file"));
        fs::create_dir(good.join("deeper")).unwrap();
        assert!(check(&good.join("deeper/new"), &[&good]).is_ok());
        // The directory may be named by another way.
        symlink(&good, bad.join("way")).unwrap();
        assert_eq!(check(&bad.join("way/new.store"), &[&good]).unwrap(), new);
        assert_eq!(check(&new, &[&bad.join("way")]).unwrap(), new);
    }

    #[test]
    fn no_way_leads_out_of_what_is_listed() {
        let Tree { _root, good, bad } = tree();
        symlink(bad.join("file"), good.join("link")).unwrap();
        symlink(bad.join("not-yet"), good.join("dangling")).unwrap();
        symlink(&bad, good.join("directory")).unwrap();
        for path in [
            // A name that begins like a listed one.
            bad.join("new"),
            bad.join("file"),
            good.join("../good-but-other/new"),
            good.join("link"),
            good.join("directory/new"),
            good.join("directory/../new"),
            PathBuf::from("/etc/passwd"),
            PathBuf::from("/dev/null"),
        ] {
            let error = check(&path, &[&good]).expect_err(&path.display().to_string());
            assert!(matches!(error, PlaceError::NotListed { .. }), "{}: {error}", path.display());
            let words = error.to_string();
            assert!(words.contains("store_places = [\"/"), "{words}");
        }
        let error = check(&good.join("dangling"), &[&good]).unwrap_err();
        assert!(matches!(error, PlaceError::Io { .. }), "{error}");
        for path in ["relative", "/", "/..", "/tmp/..", "/tmp/x/", "/tmp/x/."] {
            let error = check(Path::new(path), &[Path::new("/")]).expect_err(path);
            assert!(matches!(error, PlaceError::NoName(_)), "{path}: {error}");
        }
        // Nothing is listed.
        assert!(check(&good.join("new"), &[]).is_err());
    }

    #[test]
    fn what_is_mounted_below_a_listed_directory_is_another_place() {
        let Tree { _root, good, .. } = tree();
        fs::create_dir(good.join("mnt")).unwrap();
        let mounts = [PathBuf::from("/"), good.clone(), good.join("mnt")];
        let check = |path: &Path, listed: &Path| check_place(path, [listed].into_iter(), &mounts);
        assert!(check(&good.join("mnt/new"), &good).is_err());
        assert!(check(&good.join("new"), &good).is_ok());
        assert!(check(&good.join("mnt/new"), &good.join("mnt")).is_ok());
    }

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        let text = b"36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw\n\
                     37 35 98:0 /a /mnt/with\\040blank\\134 rw - ext3 /dev/root rw\n";
        assert_eq!(mount_points(text), [PathBuf::from("/mnt"), PathBuf::from("/mnt/with blank\\")]);
        assert!(mount_points(&fs::read(MOUNTS).unwrap()).contains(&PathBuf::from("/")));
    }
}
