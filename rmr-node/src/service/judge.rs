//! Which of the stores that were found may be served. Pure functions of what the stores say: the order in which they were
//! found decides nothing.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rmr_common::pool::{Epoch, MemberId, PoolId, StoreId, ViewNumber};

use crate::ctl::advice::Advice;
use crate::store::{Store, StoreError, Superblock};

/// The file or device behind a path, whatever its name is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct FileId {
    is_device: bool,
    device: u64,
    inode: u64,
}

impl FileId {
    /// The file or device at a path, if there is one.
    pub(super) fn at(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|found| Self::of(&found))
    }

    fn of(found: &Metadata) -> Self {
        match found.file_type().is_block_device() {
            true => Self { is_device: true, device: found.rdev(), inode: 0 },
            false => Self { is_device: false, device: found.dev(), inode: found.ino() },
        }
    }
}

/// A store that was found, as it says itself.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) path: PathBuf,
    /// Absent when it is known only by what it was: it blocks others, and is not served.
    pub(super) file: Option<FileId>,
    pub(super) pool: PoolId,
    pub(super) name: String,
    pub(super) member: MemberId,
    pub(super) store: StoreId,
    /// The order of its view.
    pub(super) order: (Epoch, ViewNumber),
    /// A client has used it: what it has may be the only copy of something.
    pub(super) has_served: bool,
}

impl Candidate {
    /// Reads what the store at a path is.
    pub(super) fn read(path: &Path) -> Result<Self, StoreError> {
        let superblock = Store::identify(path)?;
        Ok(Self { file: FileId::at(path), ..Self::of(path, &superblock) })
    }

    fn of(path: &Path, superblock: &Superblock) -> Self {
        let view = &superblock.view;
        Self {
            path: path.to_owned(),
            file: None,
            pool: superblock.spec.id,
            name: superblock.spec.name.clone(),
            member: superblock.member,
            store: superblock.store,
            order: view.order(),
            has_served: superblock.client.is_some()
                || superblock.epoch > Epoch(0)
                || view.number > ViewNumber(1),
        }
    }

    fn words(&self) -> String {
        let served = if self.has_served { "" } else { ", which never joined a pool in use" };
        format!(
            "{} (store {}, member {} of pool '{}' {}, view {} of epoch {}{served})",
            self.path.display(),
            self.store,
            self.member,
            self.name,
            self.pool,
            self.order.1,
            self.order.0
        )
    }
}

/// A store that is served.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) path: PathBuf,
    pub(super) file: Option<FileId>,
    pub(super) pool: PoolId,
    pub(super) name: String,
    pub(super) store: StoreId,
}

/// What becomes of a candidate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// It may be opened.
    Open,
    /// It is another name of a candidate that comes before it, or of a store that is served.
    SameFile,
    /// It may not, for this reason.
    LeaveOut(String),
}

/// What is to be done where chance would decide.
fn no_chance(own: &Candidate) -> String {
    format!(
        "which of them is meant is not known, so none is served: remove the wrong one, or close it, if it is this one with \
         `{}`, and open the right one",
        Advice::close_store_here(&own.path)
    )
}

/// Judges candidates, beside those that are served already; one verdict for each.
///
/// * Two stores of one uuid: one is a copy, and nobody knows which: none is served.
/// * Two stores of one pool: the one with the latest view, where a client has made one; a tie is nobody's.
/// * Two pools of one name: the one that has been used, where only one has been.
pub(super) fn judge(candidates: &[Candidate], served: &[Served]) -> Vec<Verdict> {
    let mut verdicts = vec![Verdict::Open; candidates.len()];
    let mut files: HashMap<FileId, &PathBuf> =
        served.iter().filter_map(|s| Some((s.file?, &s.path))).collect();
    for (verdict, candidate) in verdicts.iter_mut().zip(candidates) {
        if let Some(file) = candidate.file
            && *files.entry(file).or_insert(&candidate.path) != &candidate.path
        {
            *verdict = Verdict::SameFile;
        }
    }
    let real: Vec<usize> = (0..candidates.len()).filter(|i| verdicts[*i] == Verdict::Open).collect();
    for &i in &real {
        let own = &candidates[i];
        let others: Vec<&Candidate> = real.iter().filter(|j| **j != i).map(|j| &candidates[*j]).collect();
        let reason = beside_served(own, served).or_else(|| among(own, &others));
        if let Some(reason) = reason {
            verdicts[i] = Verdict::LeaveOut(reason);
        }
    }
    verdicts
}

fn beside_served(own: &Candidate, served: &[Served]) -> Option<String> {
    let by = |same: &dyn Fn(&Served) -> bool| served.iter().find(|s| same(s));
    if let Some(other) = by(&|s| s.store == own.store) {
        return Some(format!(
            "store {} is served from {}: this is a copy of it, and is not what it was a copy of any more",
            own.store,
            other.path.display()
        ));
    }
    if let Some(other) = by(&|s| s.pool == own.pool) {
        return Some(format!(
            "a node serves one store of a pool, and serves {} of pool '{}' from {}",
            other.store,
            other.name,
            other.path.display()
        ));
    }
    by(&|s| s.name == own.name).map(|other| {
        format!(
            "pool '{}' has the uuid {}, and another pool of that name, {}, is served from {}",
            own.name,
            own.pool,
            other.pool,
            other.path.display()
        )
    })
}

fn among(own: &Candidate, others: &[&Candidate]) -> Option<String> {
    let list = |rivals: &[&Candidate]| rivals.iter().map(|r| r.words()).collect::<Vec<_>>().join(" and ");
    let rivals = |same: &dyn Fn(&Candidate) -> bool| -> Vec<&Candidate> {
        others.iter().copied().filter(|other| same(other)).collect()
    };
    let copies = rivals(&|o| o.store == own.store);
    if !copies.is_empty() {
        return Some(format!("{} is the same store as {}: {}", own.words(), list(&copies), no_chance(own)));
    }
    let of_pool = rivals(&|o| o.pool == own.pool);
    let newest = of_pool.iter().map(|o| o.order).max();
    if let Some(newest) = newest.filter(|newest| own.order <= *newest) {
        let what = format!("{} is of the same pool as {}", own.words(), list(&of_pool));
        return Some(match own.order == newest {
            true => format!("{what}: {}", no_chance(own)),
            false => format!("{what}, and is older"),
        });
    }
    if newest.is_some() && !own.has_served {
        return Some(format!(
            "{} is of the same pool as {}: {}",
            own.words(),
            list(&of_pool),
            no_chance(own)
        ));
    }
    let of_name = rivals(&|o| o.name == own.name && o.pool != own.pool);
    if of_name.is_empty() {
        return None;
    }
    let is_used = |o: &&Candidate| o.has_served;
    let what = format!("{} has the pool name of {}", own.words(), list(&of_name));
    match (own.has_served, of_name.iter().any(is_used)) {
        (true, false) => None,
        (false, true) => Some(format!(
            "{what}, and never joined a pool in use: delete it with `{}`",
            Advice::delete_store_here(&own.path)
        )),
        (true, true) | (false, false) => Some(format!("{what}: {}", no_chance(own))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(path: &str, pool: u8, name: &str, store: u8, view: u64) -> Candidate {
        Candidate {
            path: path.into(),
            file: Some(FileId { is_device: false, device: 1, inode: u64::from(path.as_bytes()[0]) }),
            pool: PoolId::from_bytes([pool; 16]),
            name: name.into(),
            member: MemberId::new(0).unwrap(),
            store: StoreId::from_bytes([store; 16]),
            order: (Epoch(u64::from(view > 1)), ViewNumber(view)),
            has_served: view > 1,
        }
    }

    /// The paths that are opened, in whatever order the stores are found.
    fn opened(candidates: &[Candidate], served: &[Served]) -> Vec<String> {
        let once = |list: &[Candidate]| {
            let mut paths: Vec<String> = judge(list, served)
                .iter()
                .zip(list)
                .filter(|(verdict, _)| **verdict == Verdict::Open)
                .map(|(_, c)| c.path.display().to_string())
                .collect();
            paths.sort();
            paths
        };
        let forward = once(candidates);
        let backward: Vec<_> = candidates.iter().rev().cloned().collect();
        assert_eq!(once(&backward), forward, "the order decides");
        forward
    }

    #[test]
    fn stores_that_are_in_nobodys_way_are_all_opened() {
        let stores = [candidate("a", 1, "vm-1", 1, 5), candidate("b", 2, "vm-2", 2, 1)];
        assert_eq!(opened(&stores, &[]), ["a", "b"]);
    }

    #[test]
    fn of_two_stores_of_one_uuid_none_is_opened_and_each_names_the_other() {
        // Also where one is newer: the newer one may be what went on from a copy.
        for view in [5, 6] {
            let stores = [candidate("a", 1, "vm-1", 1, 5), candidate("b", 1, "vm-1", 1, view)];
            assert_eq!(opened(&stores, &[]), Vec::<String>::new());
            for (verdict, other) in judge(&stores, &[]).iter().zip(["b", "a"]) {
                let Verdict::LeaveOut(reason) = verdict else { panic!("{verdict:?}") };
                assert!(reason.contains(&format!("same store as {other} ")), "{reason}");
            }
        }
    }

    #[test]
    fn of_two_stores_of_one_pool_the_later_one_that_was_used_is_opened_or_none() {
        let used = candidate("a", 1, "vm-1", 1, 9);
        for (view, expected) in [(5, &["a"][..]), (0, &["a"]), (1, &["a"]), (9, &[]), (12, &["b"])] {
            let stores = [used.clone(), candidate("b", 1, "vm-1", 2, view)];
            assert_eq!(opened(&stores, &[]), expected, "view {view}");
        }
        // Neither was ever used: which of the two the pool knows is not to be seen here.
        let made = [candidate("a", 1, "vm-1", 1, 1), candidate("b", 1, "vm-1", 2, 1)];
        assert_eq!(opened(&made, &[]), Vec::<String>::new());
        let prepared = [candidate("a", 1, "vm-1", 1, 1), candidate("b", 1, "vm-1", 2, 0)];
        assert_eq!(opened(&prepared, &[]), Vec::<String>::new());
    }

    #[test]
    fn a_store_that_was_never_used_does_not_displace_one_of_the_same_name_that_was() {
        let (ghost, real) = (candidate("a", 1, "vm-1", 1, 1), candidate("b", 2, "vm-1", 2, 5));
        assert_eq!(opened(&[ghost.clone(), real.clone()], &[]), ["b"]);
        let other = candidate("c", 3, "vm-1", 3, 7);
        assert_eq!(opened(&[ghost.clone(), real.clone(), other], &[]), Vec::<String>::new());
        let ghosts = [ghost.clone(), candidate("c", 3, "vm-1", 3, 1)];
        assert_eq!(opened(&ghosts, &[]), Vec::<String>::new());
        // A pool that is served cannot be opened because of a copy, and yet its ghost does not take its name.
        let copy = Candidate { path: "d".into(), file: None, ..real.clone() };
        assert_eq!(opened(&[ghost, real, copy], &[]), Vec::<String>::new());
    }

    #[test]
    fn what_is_served_stays_and_what_comes_into_its_way_is_left_out() {
        let served = Served {
            path: "z".into(),
            file: None,
            pool: PoolId::from_bytes([1; 16]),
            name: "vm-1".into(),
            store: StoreId::from_bytes([1; 16]),
        };
        for (late, words) in [
            (candidate("a", 1, "vm-1", 1, 99), "a copy of it"),
            (candidate("a", 1, "vm-1", 2, 99), "one store of a pool"),
            (candidate("a", 2, "vm-1", 2, 99), "another pool of that name"),
        ] {
            let verdicts = judge(&[late], std::slice::from_ref(&served));
            let Verdict::LeaveOut(reason) = &verdicts[0] else { panic!("{verdicts:?}") };
            assert!(reason.contains(words) && reason.contains("from z"), "{reason}");
        }
        assert_eq!(opened(&[candidate("a", 2, "vm-2", 2, 1)], &[served]), ["a"]);
    }

    #[test]
    fn one_file_under_two_names_is_one_store() {
        let one = candidate("a", 1, "vm-1", 1, 5);
        let verdicts = judge(&[one.clone(), Candidate { path: "by-id".into(), ..one }], &[]);
        assert_eq!(verdicts, [Verdict::Open, Verdict::SameFile]);
        let served = Served {
            path: "z".into(),
            file: candidate("a", 1, "vm-1", 1, 5).file,
            pool: PoolId::from_bytes([1; 16]),
            name: "vm-1".into(),
            store: StoreId::from_bytes([1; 16]),
        };
        assert_eq!(judge(&[candidate("a", 1, "vm-1", 1, 5)], &[served]), [Verdict::SameFile]);
    }

    #[test]
    fn a_device_that_does_not_answer_and_is_known_blocks_its_copies() {
        let known = Candidate { file: None, ..candidate("a", 1, "vm-1", 1, 5) };
        assert_eq!(judge(&[known, candidate("b", 1, "vm-1", 1, 5)], &[]).len(), 2);
        let known = Candidate { file: None, ..candidate("a", 1, "vm-1", 1, 5) };
        let verdicts = judge(&[known, candidate("b", 1, "vm-1", 1, 5)], &[]);
        assert!(matches!(verdicts[1], Verdict::LeaveOut(_)));
    }
}
