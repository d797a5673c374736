//! What every whole-system test ends with: the data areas of all stores of a pool, compared byte for byte.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::programs;

/// Unit of comparison and of the report: the project's block.
const BLOCK: usize = 4096;
/// How much of each store is read at once.
const WINDOW: usize = 1 << 20;
/// How many different blocks a report names.
const NAMED_DIFFERENCES: usize = 8;

/// The data area of one store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Area {
    /// The store's file or device.
    pub path: PathBuf,
    /// Where the data begins.
    pub offset: u64,
    /// How much there is: the size of the pool.
    pub length: u64,
}

/// What `rmr-node store inspect` says about a store.
///
/// # Errors
/// When the file is no store or the answer is no JSON.
pub fn inspect(path: &Path) -> Result<Value> {
    let mut command = Command::new(programs::own("rmr-node")?);
    let text = programs::output_of(command.args(["store", "inspect", "--json"]).arg(path))?;
    serde_json::from_str(&text)
        .with_context(|| format!("expected JSON about {}, found '{text}'", path.display()))
}

impl Area {
    /// The data area of the store at `path`, as its own superblock places it.
    ///
    /// # Errors
    /// When the file is no store or its description lacks `superblock.layout.data_offset` or `superblock.spec.size`.
    pub fn of(path: &Path) -> Result<Self> {
        Self::from_description(path, &inspect(path)?)
    }

    pub(super) fn from_description(path: &Path, description: &Value) -> Result<Self> {
        let number = |pointer: &str| {
            let value = description.pointer(pointer).and_then(Value::as_u64);
            value.with_context(|| format!("store inspect of {} has no number at {pointer}", path.display()))
        };
        Ok(Self {
            path: path.to_owned(),
            offset: number("/superblock/layout/data_offset")?,
            length: number("/superblock/spec/size")?,
        })
    }

    /// Reads `length` bytes of data at `offset`.
    ///
    /// # Errors
    /// When the store cannot be read there.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        File::open(&self.path)
            .and_then(|file| file.read_exact_at(&mut bytes, self.offset + offset))
            .with_context(|| format!("reading {length} bytes at {offset} of {}", self.path.display()))?;
        Ok(bytes)
    }
}

impl Area {
    /// Changes the byte at `offset` of the data, behind the back of whoever has the store open.
    ///
    /// # Errors
    /// When the store cannot be read or written there.
    pub fn flip_byte(&self, offset: u64) -> Result<()> {
        let mut byte = self.read(offset, 1)?;
        byte[0] ^= 0x10;
        File::options()
            .write(true)
            .open(&self.path)
            .and_then(|file| file.write_all_at(&byte, self.offset + offset))
            .with_context(|| format!("writing to byte {offset} of {}", self.path.display()))
    }
}

/// Compares data areas byte for byte; all must have the same length and contents.
///
/// # Errors
/// When they differ: the error counts the different blocks and shows the first ones.
pub fn assert_identical(areas: &[Area]) -> Result<()> {
    let Some((first, others)) = areas.split_first() else { bail!("no stores to compare") };
    if others.is_empty() {
        bail!("one store alone proves nothing: {}", first.path.display());
    }
    for other in others {
        if other.length != first.length {
            let (a, b) = (first.path.display(), other.path.display());
            bail!("{a} holds {} bytes of data, {b} holds {}", first.length, other.length);
        }
        let differences = compare(first, other)?;
        if differences.count > 0 {
            bail!("{} and {} differ in {differences}", first.path.display(), other.path.display());
        }
    }
    Ok(())
}

/// How many blocks of two areas of the same length are different.
///
/// # Errors
/// When one of them cannot be read.
pub fn different_blocks(left: &Area, right: &Area) -> Result<usize> {
    Ok(compare(left, right)?.count)
}

/// Demands that `length` bytes at `offset` read as zeroes in every area.
///
/// # Errors
/// When one does not.
pub fn assert_zero(areas: &[Area], offset: u64, length: usize) -> Result<()> {
    for area in areas {
        let bytes = area.read(offset, length)?;
        if let Some(place) = bytes.iter().position(|byte| *byte != 0) {
            bail!(
                "{}: byte {} of the data is {:#04x}, expected 0",
                area.path.display(),
                offset + place as u64,
                bytes[place]
            );
        }
    }
    Ok(())
}

#[derive(Default)]
struct Differences {
    count: usize,
    named: Vec<String>,
}

impl fmt::Display for Differences {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} blocks, first: {}", self.count, self.named.join("; "))
    }
}

fn compare(left: &Area, right: &Area) -> Result<Differences> {
    let open =
        |area: &Area| File::open(&area.path).with_context(|| format!("opening {}", area.path.display()));
    let (left_file, right_file) = (open(left)?, open(right)?);
    let (mut left_bytes, mut right_bytes) = (vec![0; WINDOW], vec![0; WINDOW]);
    let mut differences = Differences::default();
    let mut done = 0;
    while done < left.length {
        let size = usize::try_from((left.length - done).min(WINDOW as u64)).unwrap_or(WINDOW);
        let (a, b) = (&mut left_bytes[..size], &mut right_bytes[..size]);
        left_file
            .read_exact_at(a, left.offset + done)
            .with_context(|| format!("reading {}", left.path.display()))?;
        right_file
            .read_exact_at(b, right.offset + done)
            .with_context(|| format!("reading {}", right.path.display()))?;
        if a != b {
            note_differences(done / BLOCK as u64, a, b, &mut differences);
        }
        done += size as u64;
    }
    Ok(differences)
}

fn note_differences(first_block: u64, left: &[u8], right: &[u8], differences: &mut Differences) {
    for (number, (a, b)) in (first_block..).zip(left.chunks(BLOCK).zip(right.chunks(BLOCK))) {
        let Some(place) = a.iter().zip(b).position(|(a, b)| a != b) else { continue };
        differences.count += 1;
        if differences.named.len() < NAMED_DIFFERENCES {
            let shown = |bytes: &[u8]| {
                bytes[place..].iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>()
            };
            differences.named.push(format!(
                "block {number} from byte {place}: {} against {}",
                shown(a),
                shown(b)
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab;

    fn area(lab: &lab::Lab, name: &str, offset: u64, data: &[u8]) -> Result<Area> {
        let path = lab.memory_path(name);
        let file = File::create(&path)?;
        file.write_all_at(data, offset)?;
        Ok(Area { path, offset, length: data.len() as u64 })
    }

    #[test]
    fn stores_with_other_metadata_and_the_same_data_are_identical() -> Result<()> {
        lab::run("identical", |lab| {
            let data: Vec<u8> = (0..3 * WINDOW / 2).map(|n| (n % 251).to_le_bytes()[0]).collect();
            let a = area(lab, "a", 1 << 20, &data)?;
            let b = area(lab, "b", 2 << 20, &data)?;
            assert_identical(&[a, b])
        })
    }

    #[test]
    fn the_first_different_blocks_are_named() -> Result<()> {
        lab::run("different", |lab| {
            let mut data = vec![7; 2 * WINDOW];
            let a = area(lab, "a", 0, &data)?;
            data[5 * BLOCK + 17] = 8;
            *data.last_mut().expect("not empty") = 9;
            let b = area(lab, "b", 4096, &data)?;
            let error = assert_identical(&[a.clone(), a.clone(), b]).unwrap_err().to_string();
            assert!(error.contains("2 blocks"), "{error}");
            assert!(
                error.contains("block 5 from byte 17: 0707070707070707 against 0807070707070707"),
                "{error}"
            );
            assert!(error.contains("block 511 from byte 4095: 07 against 09"), "{error}");
            assert!(assert_identical(std::slice::from_ref(&a)).is_err());
            let shorter = Area { length: 4096, ..a.clone() };
            assert!(assert_identical(&[a.clone(), shorter]).is_err());
            assert!(
                assert_zero(&[a], 4096, 4096)
                    .unwrap_err()
                    .to_string()
                    .contains("byte 4096 of the data is 0x07")
            );
            Ok(())
        })
    }

    #[test]
    fn a_description_without_its_numbers_is_refused_by_name() {
        let complete = serde_json::json!({ "superblock": { "layout": { "data_offset": 1048576 }, "spec": { "size": 4096 } } });
        let area = Area::from_description(Path::new("/s"), &complete).expect("complete");
        assert_eq!((area.offset, area.length), (1 << 20, 4096));
        let lacking = serde_json::json!({ "superblock": { "layout": {}, "spec": { "size": 4096 } } });
        let error = Area::from_description(Path::new("/s"), &lacking).unwrap_err().to_string();
        assert!(error.contains("/superblock/layout/data_offset"), "{error}");
    }
}
