//! The stores outside the store directory that this node opens besides those of its configuration: they were made, or opened,
//! by command. The list is a small file in the store directory, which is replaced as a whole and flushed.
//!
//! ```json
//! {"version": 1, "stores": [{"path": "/dev/vdb", "made": false}]}
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Name of the file.
pub(crate) const FILE_NAME: &str = "other-stores.json";
/// Version of its format.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    stores: Vec<Entry>,
}

/// A store that is remembered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// Its device or file.
    pub(crate) path: PathBuf,
    /// This node made the file, and removes it with the store.
    pub(crate) made: bool,
}

/// See the module's comment.
pub(crate) struct Remembered {
    file: PathBuf,
    /// What the file says; an error where it cannot be understood. Such a file is left as it is.
    entries: Result<Vec<Entry>, String>,
}

impl Remembered {
    /// Reads the list of a store directory. A file that does not exist is an empty list.
    pub(crate) fn read(directory: &Path) -> Self {
        let file = directory.join(FILE_NAME);
        let entries = match std::fs::read(&file) {
            Ok(bytes) => parse(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.to_string()),
        };
        let entries = entries.map_err(|e| {
            format!("{}: {e}: stores that were made on devices or other paths are not opened; mend the file, or remove it", file.display())
        });
        Self { file, entries }
    }

    /// What is remembered; nothing where the file cannot be understood.
    pub(crate) fn entries(&self) -> &[Entry] {
        self.entries.as_deref().unwrap_or_default()
    }

    /// Why the file cannot be used.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.entries.as_ref().err().map(String::as_str)
    }

    /// Puts a path on the list, durably.
    pub(crate) fn add(&mut self, entry: Entry) -> Result<(), String> {
        let mut next = self.entries.clone()?;
        next.retain(|e| e.path != entry.path);
        next.push(entry);
        self.write(next)
    }

    /// Takes a path off the list, durably.
    pub(crate) fn remove(&mut self, path: &Path) -> Result<(), String> {
        let mut next = self.entries.clone()?;
        let before = next.len();
        next.retain(|e| e.path != path);
        if next.len() == before { Ok(()) } else { self.write(next) }
    }

    fn write(&mut self, next: Vec<Entry>) -> Result<(), String> {
        if self.entries.as_ref() == Ok(&next) {
            return Ok(());
        }
        let new = self.file.with_extension("json.new");
        let contents = Contents { version: VERSION, stores: next };
        let written = (|| {
            let mut bytes = serde_json::to_vec_pretty(&contents).map_err(io::Error::other)?;
            bytes.push(b'\n');
            // What a crash left of an earlier attempt, or somebody put there, is not written through.
            match std::fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = File::options().write(true).create_new(true).open(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&new, &self.file)?;
            let directory = self.file.parent().unwrap_or(Path::new("."));
            File::open(directory)?.sync_all()
        })();
        written.map_err(|e| format!("{}: {e}", self.file.display()))?;
        self.entries = Ok(contents.stores);
        Ok(())
    }
}

fn parse(bytes: &[u8]) -> Result<Vec<Entry>, String> {
    let contents: Contents = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if contents.version != VERSION {
        return Err(format!("version {}: expected {VERSION}", contents.version));
    }
    Ok(contents.stores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_on_the_list_is_there_after_a_restart_and_what_is_taken_off_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let entry = |path: &str, made| Entry { path: path.into(), made };
        let mut list = Remembered::read(directory.path());
        assert!(list.entries().is_empty());
        list.add(entry("/dev/vdb", false)).unwrap();
        list.add(entry("/data/vm-1", true)).unwrap();
        list.add(entry("/dev/vdb", false)).unwrap();
        let read = Remembered::read(directory.path());
        assert_eq!(read.entries(), [entry("/data/vm-1", true), entry("/dev/vdb", false)]);
        list.remove(Path::new("/dev/vdb")).unwrap();
        list.remove(Path::new("/dev/vdc")).unwrap();
        assert_eq!(Remembered::read(directory.path()).entries(), [entry("/data/vm-1", true)]);
        // What a crash left of an attempt is in nobody's way.
        std::fs::write(directory.path().join("other-stores.json.new"), "half").unwrap();
        list.add(entry("/dev/vdd", false)).unwrap();
        assert_eq!(Remembered::read(directory.path()).entries().len(), 2);
    }

    #[test]
    fn a_file_that_is_not_understood_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE_NAME);
        for text in ["", "[]", r#"{"version":2,"stores":[]}"#, r#"{"version":1,"stores":[{"path":"/x"}]}"#] {
            std::fs::write(&file, text).unwrap();
            let mut list = Remembered::read(directory.path());
            assert!(list.problem().unwrap().contains(FILE_NAME), "{text}");
            assert!(list.entries().is_empty());
            assert!(list.add(Entry { path: "/dev/vdb".into(), made: false }).is_err());
            assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
        }
    }
}
