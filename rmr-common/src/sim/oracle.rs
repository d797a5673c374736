//! What a disk may answer: for each sector the values that it may hold now, and the rules by which that set shrinks.
//!
//! A value becomes possible when its write is submitted. It stops to be possible when a write that was submitted after
//! its own had completed is acknowledged, or when a completed read has shown that something newer is in its place.

/// Bytes of a sector: the unit in which values are told apart.
pub(super) const SECTOR: u64 = 512;

/// Index of a write in the oracle's list; zero is the disk as it was made, all zeroes.
pub(super) type WriteId = u32;

/// The event counter of a run, which orders everything that happens in it.
pub(super) type Step = u64;

const NEVER: Step = Step::MAX;

struct Write {
    start: Step,
    end: Step,
    failed: bool,
}

#[derive(Clone, Copy)]
struct Candidate {
    write: WriteId,
    value: u64,
    /// When a read that returned the value first completed.
    observed: Step,
    /// When the value stopped to be possible.
    removed: Step,
    /// The write in flight whose value a read found in its place. If that ends with an error, another member may have this value
    /// still, and be the only one that is left. Zero for none.
    doubt: WriteId,
}

/// The values that the sectors of a pool may have.
pub(super) struct Oracle {
    writes: Vec<Write>,
    sectors: Vec<Vec<Candidate>>,
}

impl Oracle {
    pub(super) fn new(sectors: usize) -> Self {
        let genesis = Candidate { write: 0, value: 0, observed: NEVER, removed: NEVER, doubt: 0 };
        Self {
            writes: vec![Write { start: 0, end: 0, failed: false }],
            sectors: vec![vec![genesis]; sectors],
        }
    }

    /// The pool has so many sectors from now on. The new ones read as zeroes.
    pub(super) fn grow(&mut self, sectors: usize) {
        let genesis = Candidate { write: 0, value: 0, observed: NEVER, removed: NEVER, doubt: 0 };
        self.sectors.resize(sectors, vec![genesis]);
    }

    /// The value that write `id` gives to the `index`-th sector of its range.
    pub(super) fn stamp(id: WriteId, index: usize) -> u64 {
        u64::from(id) << 24 | index as u64
    }

    /// A write whose values may be seen from now on. `zero` for one that makes its range read as zeroes.
    pub(super) fn begin(&mut self, first: usize, count: usize, zero: bool, now: Step) -> WriteId {
        let id = self.reserve(now);
        for i in 0..count {
            let value = if zero { 0 } else { Self::stamp(id, i) };
            self.sectors[first + i].push(Candidate {
                write: id,
                value,
                observed: NEVER,
                removed: NEVER,
                doubt: 0,
            });
        }
        id
    }

    /// A write whose values must never be seen: its client is fenced.
    pub(super) fn reserve(&mut self, now: Step) -> WriteId {
        self.writes.push(Write { start: now, end: NEVER, failed: false });
        u32::try_from(self.writes.len() - 1).unwrap_or(u32::MAX)
    }

    /// The write was acknowledged.
    pub(super) fn acknowledge(&mut self, id: WriteId, first: usize, count: usize, now: Step, oldest: Step) {
        let write = &mut self.writes[id as usize];
        write.failed = false;
        write.end = write.end.min(now);
        let start = write.start;
        for sector in &mut self.sectors[first..first + count] {
            for candidate in sector.iter_mut() {
                if candidate.write != id && self.writes[candidate.write as usize].end < start {
                    candidate.removed = candidate.removed.min(now);
                    candidate.doubt = 0;
                }
            }
            let writes = &self.writes;
            sector.retain(|c| c.removed > oldest || (c.doubt != 0 && writes[c.doubt as usize].end == NEVER));
        }
    }

    /// The write ended with an error, or its client is gone: it may have happened or not.
    pub(super) fn fail(&mut self, id: WriteId, now: Step) {
        let write = &mut self.writes[id as usize];
        if write.end == NEVER {
            write.end = now;
            write.failed = true;
        }
    }

    /// The client said that the write failed: it promises nothing about it, not even what reads have shown before.
    pub(super) fn refuse(&mut self, id: WriteId, first: usize, count: usize, now: Step) {
        if self.writes[id as usize].end != NEVER {
            return;
        }
        self.fail(id, now);
        for candidate in self.sectors[first..first + count].iter_mut().flatten().filter(|c| c.doubt == id) {
            candidate.removed = NEVER;
            candidate.doubt = 0;
        }
    }

    /// Every member has lost what was written to the sector last, or may have: this value is back, or one of those that were
    /// possible.
    pub(super) fn lose(&mut self, sector: usize, value: u64) {
        let candidates = &mut self.sectors[sector];
        for candidate in candidates.iter().filter(|c| c.removed == NEVER) {
            self.writes[candidate.write as usize].failed = true;
        }
        if let Some(back) = candidates.iter_mut().find(|c| c.value == value) {
            (back.removed, back.observed) = (NEVER, NEVER);
            return;
        }
        let write = u32::try_from(value >> 24).unwrap_or(0);
        candidates.push(Candidate { write, value, observed: NEVER, removed: NEVER, doubt: 0 });
    }

    /// The guest has changed what a write that is in flight writes to a sector: it may become either.
    pub(super) fn vary(&mut self, id: WriteId, sector: usize, value: u64) {
        // What a client that is fenced writes is never seen.
        if self.sectors[sector].iter().any(|c| c.write == id) {
            let (observed, removed) = (NEVER, NEVER);
            self.sectors[sector].push(Candidate { write: id, value, observed, removed, doubt: 0 });
        }
    }

    /// Checks what a read that began at `start` returned for a sector, and learns from it.
    pub(super) fn read(&mut self, sector: usize, value: u64, start: Step, now: Step) -> Result<(), String> {
        let writes = &self.writes;
        let candidates = &mut self.sectors[sector];
        let matching = |c: &Candidate| c.value == value && c.removed > start;
        let matches = candidates.iter().filter(|c| matching(c)).count();
        if matches == 0 {
            return Err(format!(
                "sector {sector} was read as {}, possible since the read began at step {start}: {}",
                Self::name(value),
                Self::list(writes, candidates, start)
            ));
        }
        let oldest = candidates.iter().filter(|c| matching(c)).map(|c| writes[c.write as usize].start).min();
        let in_flight = |c: &&Candidate| matching(c) && writes[c.write as usize].end == NEVER;
        let doubt = candidates.iter().find(in_flight).map_or(0, |c| c.write);
        for candidate in candidates.iter_mut() {
            if candidate.value == value {
                if matches == 1 && matching(candidate) {
                    candidate.observed = candidate.observed.min(now);
                }
            } else if candidate.observed < start
                || oldest.is_some_and(|oldest| writes[candidate.write as usize].end < oldest)
            {
                if candidate.removed == NEVER {
                    candidate.doubt = doubt;
                }
                candidate.removed = candidate.removed.min(now);
            }
        }
        Ok(())
    }

    /// Whether a Clean member may hold the value now.
    pub(super) fn is_current(&self, sector: usize, value: u64) -> bool {
        self.sectors[sector].iter().any(|c| c.value == value && c.removed == NEVER)
    }

    /// Whether the sector's value may change without a further request: a write of it is in flight or undecided.
    pub(super) fn is_open(&self, sector: usize) -> bool {
        self.is_in_flight(sector) || self.is_undecided(sector)
    }

    /// Whether a write of the sector is in flight.
    pub(super) fn is_in_flight(&self, sector: usize) -> bool {
        self.sectors[sector].iter().any(|c| self.writes[c.write as usize].end == NEVER)
    }

    /// Whether the sector's value hangs on a write that failed or whose client died.
    pub(super) fn is_undecided(&self, sector: usize) -> bool {
        self.sectors[sector].iter().any(|c| c.removed == NEVER && self.writes[c.write as usize].failed)
    }

    /// Whether the value is of a write that failed or whose client died. Zeroes are not, because they can not be told
    /// apart.
    pub(super) fn has_failed(&self, value: u64) -> bool {
        let write = usize::try_from(value >> 24).unwrap_or(0);
        self.writes.get(write).is_some_and(|w| w.failed)
    }

    /// Whether the value may be of a write that is in flight or has failed.
    pub(super) fn may_be_unfinished(&self, sector: usize, value: u64) -> bool {
        let unfinished = |c: &Candidate| {
            let write = &self.writes[c.write as usize];
            c.value == value && (write.end == NEVER || write.failed)
        };
        self.sectors[sector].iter().any(unfinished)
    }

    /// The state of a sector in words.
    pub(super) fn describe(&self, sector: usize) -> String {
        Self::list(&self.writes, &self.sectors[sector], NEVER - 1)
    }

    pub(super) fn name(value: u64) -> String {
        if value == 0 {
            "zeroes".into()
        } else {
            format!("write {} sector {}", value >> 24, value & 0xff_ffff)
        }
    }

    fn list(writes: &[Write], candidates: &[Candidate], start: Step) -> String {
        let text = |c: &Candidate| {
            let write = &writes[c.write as usize];
            let end = match (write.end, write.failed) {
                (NEVER, _) => "in flight".to_owned(),
                (end, true) => format!("failed at {end}"),
                (end, false) => format!("acknowledged at {end}"),
            };
            format!("{} (of write {} begun at {}, {end})", Self::name(c.value), c.write, write.start)
        };
        let list: Vec<_> = candidates.iter().filter(|c| c.removed > start).map(text).collect();
        list.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_returns_the_last_acknowledged_value_or_one_in_flight() {
        let mut oracle = Oracle::new(1);
        let a = oracle.begin(0, 1, false, 1);
        assert!(oracle.read(0, 0, 2, 3).is_ok());
        oracle.acknowledge(a, 0, 1, 4, 0);
        assert!(oracle.read(0, 0, 3, 5).is_ok(), "the read began before the write was acknowledged");
        assert!(oracle.read(0, 0, 5, 6).is_err());
        assert!(oracle.read(0, Oracle::stamp(a, 0), 5, 6).is_ok());
    }

    #[test]
    fn a_read_never_goes_back_in_time() {
        let mut oracle = Oracle::new(1);
        let a = oracle.begin(0, 1, false, 1);
        assert!(oracle.read(0, Oracle::stamp(a, 0), 2, 3).is_ok());
        assert!(oracle.read(0, 0, 2, 4).is_ok(), "it began before the other completed");
        assert!(oracle.read(0, 0, 4, 5).is_err());
    }

    #[test]
    fn the_order_of_concurrent_writes_is_known_once_it_was_read() {
        let mut oracle = Oracle::new(1);
        let (a, b) = (oracle.begin(0, 1, false, 1), oracle.begin(0, 1, false, 2));
        oracle.acknowledge(a, 0, 1, 3, 0);
        oracle.acknowledge(b, 0, 1, 4, 0);
        assert!(oracle.read(0, Oracle::stamp(a, 0), 5, 6).is_ok());
        assert!(oracle.read(0, Oracle::stamp(b, 0), 7, 8).is_ok());
        assert!(oracle.read(0, Oracle::stamp(a, 0), 9, 10).is_err());
    }

    #[test]
    fn a_write_of_a_dead_client_is_what_it_was_first_read_as() {
        let mut oracle = Oracle::new(1);
        let a = oracle.begin(0, 1, false, 1);
        oracle.fail(a, 2);
        assert!(oracle.is_undecided(0) && oracle.is_current(0, 0));
        assert!(oracle.read(0, Oracle::stamp(a, 0), 3, 4).is_ok());
        assert!(oracle.read(0, 0, 5, 6).is_err(), "it was there before");
        let b = oracle.begin(0, 1, true, 7);
        oracle.acknowledge(b, 0, 1, 8, 0);
        assert!(!oracle.is_undecided(0));
        assert!(oracle.read(0, Oracle::stamp(a, 0), 9, 10).is_err());
    }
}
