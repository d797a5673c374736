//! The "newc" archive format that the kernel unpacks its initramfs from (Documentation/driver-api/early-userspace/
//! buffer-format.rst). Written here so that the image depends on nothing but its contents.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive being written; parent directories are added by themselves.
pub(super) struct Archive<W: Write> {
    output: W,
    entries: u32,
    seen: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(output: W) -> Self {
        Self { output, entries: 0, seen: BTreeSet::new() }
    }

    /// Adds an executable file; a path that is already there stays as it is.
    pub(super) fn add(&mut self, path: &Path, content: &[u8]) -> io::Result<()> {
        let path: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        let parents: Vec<_> =
            path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()).collect();
        for parent in parents.into_iter().rev() {
            if self.seen.insert(parent.to_path_buf()) {
                self.entry(parent, DIRECTORY, &[])?;
            }
        }
        if self.seen.insert(path.clone()) {
            self.entry(&path, PROGRAM, content)?;
        }
        Ok(())
    }

    /// Writes the end mark and gives the output back.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry(Path::new("TRAILER!!!"), 0, &[])?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let name = path.as_os_str().as_encoded_bytes();
        let too_large = |_| io::Error::other(format!("{} does not fit into a newc archive", path.display()));
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.output.write_all(b"070701")?;
        for field in fields {
            write!(self.output, "{field:08X}")?;
        }
        self.output.write_all(name)?;
        self.output.write_all(b"\0")?;
        self.pad(6 + 13 * 8 + name.len() + 1)?;
        self.output.write_all(content)?;
        self.pad(content.len())
    }

    /// Every header and every content starts at a multiple of four.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.output.write_all(&[0; 3][..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_archive_unpacks_with_directories_and_odd_lengths() {
        let mut archive = Archive::new(Vec::new());
        archive.add(Path::new("/a/deep/file"), b"12345").expect("memory");
        archive.add(Path::new("a/other"), b"").expect("memory");
        archive.add(Path::new("a/other"), b"second is ignored").expect("memory");
        let bytes = archive.finish().expect("memory");
        let directory = tempfile::tempdir().expect("temporary directory");
        let mut cpio = Command::new("cpio")
            .args(["-id", "--quiet"])
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("cpio is installed by install-deps.sh");
        cpio.stdin.take().expect("piped").write_all(&bytes).expect("cpio reads");
        assert!(cpio.wait().expect("cpio ends").success());
        assert_eq!(std::fs::read(directory.path().join("a/deep/file")).expect("there"), b"12345");
        assert_eq!(std::fs::read(directory.path().join("a/other")).expect("there"), b"");
    }
}
