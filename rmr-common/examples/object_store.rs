//! Stores objects on a pool without any virtual machine: put, get, list and remove, each object on every member.
//!
//! ```text
//! object_store --pool NAME --node HOST:PORT [--node HOST:PORT …] format
//! object_store … put KEY FILE | get KEY FILE | list | remove KEY
//! ```
//! The pool begins with a table of 4 KiB entries, one for each object; objects lie behind it, each in one extent. An
//! entry is written and flushed after the object's data, so an object is there as a whole or not at all.

use std::error::Error;
use std::time::Duration;

use rmr_common::client::{Config, PoolSelector};
use rmr_common::driver::{BlockingPool, Pool};
use rmr_common::pool::{Address, ClientId};

const BLOCK: u64 = 4096;
const ENTRIES: u64 = 256;
const MAGIC: &[u8; 8] = b"RMROBJ01";
const LONGEST_KEY: usize = 255;

type Outcome<T> = Result<T, Box<dyn Error>>;

struct Entry {
    key: String,
    offset: u64,
    length: u64,
}

impl Entry {
    fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK.try_into().unwrap_or(4096)];
        block[..8].copy_from_slice(MAGIC);
        block[8..16].copy_from_slice(&self.offset.to_le_bytes());
        block[16..24].copy_from_slice(&self.length.to_le_bytes());
        block[24] = u8::try_from(self.key.len()).unwrap_or(u8::MAX);
        block[25..25 + self.key.len()].copy_from_slice(self.key.as_bytes());
        block
    }

    fn decode(block: &[u8]) -> Option<Self> {
        if block.get(..8)? != MAGIC {
            return None;
        }
        let number = |at: usize| Some(u64::from_le_bytes(*block.get(at..)?.first_chunk()?));
        let key = block.get(25..25 + usize::from(*block.get(24)?))?;
        Some(Self { key: String::from_utf8(key.to_vec()).ok()?, offset: number(8)?, length: number(16)? })
    }

    const fn end(&self) -> u64 {
        self.offset + self.length.next_multiple_of(BLOCK)
    }
}

struct Objects<'a> {
    pool: BlockingPool<'a>,
    size: u64,
}

impl Objects<'_> {
    fn entries(&self) -> Outcome<Vec<(u64, Entry)>> {
        let mut table = vec![0; usize::try_from(ENTRIES * BLOCK)?];
        self.pool.read_at(&mut table, 0)?;
        let blocks = table.chunks(usize::try_from(BLOCK)?);
        Ok((0..).zip(blocks).filter_map(|(i, block)| Some((i, Entry::decode(block)?))).collect())
    }

    fn find(&self, key: &str) -> Outcome<(u64, Entry)> {
        let found = self.entries()?.into_iter().find(|(_, e)| e.key == key);
        found.ok_or_else(|| format!("there is no object '{key}'").into())
    }

    fn put(&self, key: &str, mut data: Vec<u8>) -> Outcome<()> {
        if key.is_empty() || key.len() > LONGEST_KEY {
            return Err(format!("key of {} bytes: expected 1 to {LONGEST_KEY}", key.len()).into());
        }
        let mut entries = self.entries()?;
        if entries.iter().any(|(_, e)| e.key == key) {
            return Err(format!("object '{key}' is there already").into());
        }
        let index = (0..ENTRIES).find(|i| !entries.iter().any(|(used, _)| used == i));
        let index = index.ok_or("the table is full: 256 objects are there")?;
        let length = data.len() as u64;
        data.resize(usize::try_from(length.next_multiple_of(BLOCK))?, 0);
        entries.sort_by_key(|(_, e)| e.offset);
        let mut offset = ENTRIES * BLOCK;
        for (_, entry) in &entries {
            if entry.offset - offset >= data.len() as u64 {
                break;
            }
            offset = entry.end();
        }
        if offset + data.len() as u64 > self.size {
            return Err(format!("no free extent of {} bytes", data.len()).into());
        }
        if !data.is_empty() {
            self.pool.write_at(&data, offset)?;
        }
        self.pool.flush()?;
        let entry = Entry { key: key.to_owned(), offset, length };
        self.pool.write_at(&entry.encode(), index * BLOCK)?;
        self.pool.flush()?;
        Ok(())
    }

    fn get(&self, key: &str) -> Outcome<Vec<u8>> {
        let (_, entry) = self.find(key)?;
        let mut data = vec![0; usize::try_from(entry.length.next_multiple_of(BLOCK))?];
        if !data.is_empty() {
            self.pool.read_at(&mut data, entry.offset)?;
        }
        data.truncate(usize::try_from(entry.length)?);
        Ok(data)
    }

    fn remove(&self, key: &str) -> Outcome<()> {
        let (index, entry) = self.find(key)?;
        self.pool.write_zeroes(index * BLOCK, BLOCK)?;
        self.pool.flush()?;
        if entry.end() > entry.offset {
            self.pool.discard(entry.offset, entry.end() - entry.offset)?;
        }
        Ok(())
    }
}

fn run(arguments: &[String]) -> Outcome<()> {
    let usage = "usage: object_store --pool NAME --node HOST:PORT … format | put KEY FILE | get KEY FILE | list | remove KEY";
    let (mut pool, mut nodes, mut words) = (None, Vec::new(), Vec::new());
    let mut rest = arguments.iter();
    while let Some(word) = rest.next() {
        match word.as_str() {
            "--pool" => pool = Some(rest.next().ok_or(usage)?.parse::<PoolSelector>()?),
            "--node" => nodes.push(rest.next().ok_or(usage)?.parse::<Address>()?),
            _ => words.push(word.as_str()),
        }
    }
    let selector = pool.ok_or(usage)?;
    let config = Config::new(ClientId::random(), "the object store example");
    let pool = Pool::connect(config, selector, &nodes, Duration::from_secs(10))?;
    let objects = Objects { pool: pool.blocking(), size: pool.spec().size };
    match words[..] {
        ["format"] => Ok(objects.pool.write_zeroes(0, ENTRIES * BLOCK)?),
        ["put", key, file] => objects.put(key, std::fs::read(file)?),
        ["get", key, file] => Ok(std::fs::write(file, objects.get(key)?)?),
        ["remove", key] => objects.remove(key),
        ["list"] => {
            for (_, entry) in objects.entries()? {
                println!("{:>12}  {}", entry.length, entry.key);
            }
            Ok(())
        }
        _ => Err(usage.into()),
    }
}

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("object_store: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
