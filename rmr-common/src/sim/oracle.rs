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

/// No write has this value.
const NO_VALUE: u64 = u64::MAX;

struct Write {
    /// Its client was fenced when it was submitted.
    is_fenced: bool,
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

/// Writes of one branch of the pool have indices below this times its number plus one.
const WRITES_PER_BRANCH: WriteId = 1 << 20;

/// The values that the sectors of a pool may have, in one of its branches.
pub(super) struct Oracle {
    /// The index of the first of `writes`, which stands for everything before this branch.
    base: WriteId,
    writes: Vec<Write>,
    sectors: Vec<Vec<Candidate>>,
    /// When an attachment last made the members agree.
    agreed: Step,
    /// For each sector the newest of the values that it may hold now, so that most questions are one comparison.
    present: Vec<u64>,
}

impl Oracle {
    pub(super) fn new(sectors: usize) -> Self {
        let genesis = Candidate { write: 0, value: 0, observed: NEVER, removed: NEVER, doubt: 0 };
        Self {
            base: 0,
            writes: vec![Write { is_fenced: false, start: 0, end: 0, failed: false }],
            sectors: vec![vec![genesis]; sectors],
            agreed: 0,
            present: vec![0; sectors],
        }
    }

    /// The pool as the operator has decided that it is: these values, whatever was promised before.
    pub(super) fn branch(number: usize, values: impl Iterator<Item = u64>, now: Step) -> Self {
        let base = u32::try_from(number).unwrap_or(0) * WRITES_PER_BRANCH;
        let decided =
            |&value: &u64| vec![Candidate { write: base, value, observed: NEVER, removed: NEVER, doubt: 0 }];
        let present: Vec<_> = values.collect();
        Self {
            base,
            writes: vec![Write { is_fenced: false, start: now, end: now, failed: false }],
            sectors: present.iter().map(decided).collect(),
            agreed: now,
            present,
        }
    }

    /// The place of a write in the list. Those of other branches count as what was before this one.
    fn place(&self, id: WriteId) -> usize {
        let place = id.checked_sub(self.base).map_or(0, |place| place as usize);
        if place < self.writes.len() { place } else { 0 }
    }

    fn of(&self, id: WriteId) -> &Write {
        &self.writes[self.place(id)]
    }

    /// How many sectors the branch has.
    pub(super) const fn len(&self) -> usize {
        self.sectors.len()
    }

    /// The pool has so many sectors from now on. The new ones read as zeroes.
    pub(super) fn grow(&mut self, sectors: usize) {
        let genesis = Candidate { write: 0, value: 0, observed: NEVER, removed: NEVER, doubt: 0 };
        self.sectors.resize(sectors, vec![genesis]);
        self.present.resize(sectors, 0);
    }

    /// The candidates of a sector have changed.
    fn renew(&mut self, sector: usize) {
        let present = self.sectors[sector].iter().rev().find(|c| c.removed == NEVER);
        self.present[sector] = present.map_or(NO_VALUE, |c| c.value);
    }

    /// The value that write `id` gives to the `index`-th sector of its range.
    pub(super) fn stamp(id: WriteId, index: usize) -> u64 {
        u64::from(id) << 24 | index as u64
    }

    /// Whether a write gave a sector this value, and the guest has not changed it meanwhile.
    pub(super) fn is_of(id: WriteId, value: u64) -> bool {
        value >> 24 == u64::from(id)
    }

    /// A write whose values may be seen from now on. `zero` for one that makes its range read as zeroes.
    pub(super) fn begin(&mut self, first: usize, count: usize, zero: bool, now: Step) -> WriteId {
        let id = self.reserve(now);
        let place = self.place(id);
        self.writes[place].is_fenced = false;
        for i in 0..count {
            let value = if zero { 0 } else { Self::stamp(id, i) };
            self.sectors[first + i].push(Candidate {
                write: id,
                value,
                observed: NEVER,
                removed: NEVER,
                doubt: 0,
            });
            self.present[first + i] = value;
        }
        id
    }

    /// A write whose values must never be seen: its client is fenced.
    pub(super) fn reserve(&mut self, now: Step) -> WriteId {
        self.writes.push(Write { is_fenced: true, start: now, end: NEVER, failed: false });
        self.base + u32::try_from(self.writes.len() - 1).unwrap_or(u32::MAX)
    }

    /// Whether a client that was fenced wrote this.
    pub(super) fn is_of_fenced(&self, value: u64) -> bool {
        let id = u32::try_from((value >> 24) & u64::from(u32::MAX)).unwrap_or(0);
        value != NO_VALUE && id > self.base && self.of(id).is_fenced
    }

    /// A write that was begun in another branch, by a client that attaches to this one. Only what is within the pool here counts.
    pub(super) fn adopt(&mut self, first: usize, values: &[u64], now: Step) -> WriteId {
        let id = self.reserve(now);
        for (sector, &value) in (first..self.len()).zip(values) {
            self.sectors[sector].push(Candidate {
                write: id,
                value,
                observed: NEVER,
                removed: NEVER,
                doubt: 0,
            });
            self.present[sector] = value;
        }
        id
    }

    /// A write whose client has attached to another branch: it is not seen in this one.
    pub(super) fn disown(&mut self, id: WriteId, now: Step) {
        self.sectors.iter_mut().for_each(|s| s.retain(|c| c.write != id));
        (0..self.len()).for_each(|sector| self.renew(sector));
        let place = self.place(id);
        self.writes[place].end = self.writes[place].end.min(now);
    }

    /// In an older branch, where a client attaches: a sector has one of these values from now on, or one that is in flight. A
    /// read of that client which began before may have found what was there then.
    pub(super) fn settle(&mut self, sector: usize, values: &[u64], now: Step) {
        let mut candidates = std::mem::take(&mut self.sectors[sector]);
        for candidate in candidates.iter_mut().filter(|c| self.of(c.write).end != NEVER) {
            candidate.removed = candidate.removed.min(now);
            candidate.doubt = 0;
        }
        let write = self.base;
        let settled = |&value: &u64| Candidate { write, value, observed: NEVER, removed: NEVER, doubt: 0 };
        candidates.extend(values.iter().map(settled));
        self.sectors[sector] = candidates;
        self.renew(sector);
    }

    /// The write was acknowledged.
    pub(super) fn acknowledge(&mut self, id: WriteId, first: usize, count: usize, now: Step, oldest: Step) {
        let place = self.place(id);
        let write = &mut self.writes[place];
        write.failed = false;
        write.end = write.end.min(now);
        let start = write.start;
        let mut sectors = std::mem::take(&mut self.sectors);
        for sector in &mut sectors[first..first + count] {
            for candidate in sector.iter_mut() {
                if candidate.write != id && self.of(candidate.write).end < start {
                    candidate.removed = candidate.removed.min(now);
                    candidate.doubt = 0;
                }
            }
            sector.retain(|c| c.removed > oldest || (c.doubt != 0 && self.of(c.doubt).end == NEVER));
        }
        self.sectors = sectors;
        (first..first + count).for_each(|sector| self.renew(sector));
    }

    /// The write ended with an error, or its client is gone: it may have happened or not.
    pub(super) fn fail(&mut self, id: WriteId, now: Step) {
        let place = self.place(id);
        let write = &mut self.writes[place];
        if write.end == NEVER {
            write.end = now;
            write.failed = true;
        }
    }

    /// The client said that the write failed: it promises nothing about it, not even what reads have shown before.
    pub(super) fn refuse(&mut self, id: WriteId, first: usize, count: usize, now: Step) {
        if self.of(id).end != NEVER {
            return;
        }
        self.fail(id, now);
        let range = first.min(self.len())..(first + count).min(self.len());
        for candidate in self.sectors[range.clone()].iter_mut().flatten().filter(|c| c.doubt == id) {
            candidate.removed = NEVER;
            candidate.doubt = 0;
        }
        range.for_each(|sector| self.renew(sector));
    }

    /// Every member has lost what was written to the sector last, or may have: this value is back, or one of those that were
    /// possible.
    pub(super) fn lose(&mut self, sector: usize, value: u64) {
        let current = self.sectors[sector].iter().filter(|c| c.removed == NEVER).map(|c| c.write);
        for write in current.collect::<Vec<_>>() {
            // What was there before this branch was decided on, and not promised by it.
            let place = self.place(write);
            self.writes[place].failed |= place > 0 || self.base == 0;
        }
        // A write in flight may bring the same zeroes, and did not bring these.
        let is_back = |c: &Candidate| c.value == value && self.of(c.write).end != NEVER;
        let back = self.sectors[sector].iter().position(is_back);
        let candidates = &mut self.sectors[sector];
        if let Some(back) = back.and_then(|index| candidates.get_mut(index)) {
            (back.removed, back.observed) = (NEVER, NEVER);
        } else {
            let write = u32::try_from(value >> 24).unwrap_or(0);
            candidates.push(Candidate { write, value, observed: NEVER, removed: NEVER, doubt: 0 });
        }
        self.renew(sector);
    }

    /// Accepts `value`, which a disk that lost its cache has in this sector, if only failed writes stand against it. Reads may have shown
    /// such a write before: it promises nothing. Acknowledged writes stay promised.
    pub(super) fn undo_failed(&mut self, sector: usize, value: u64) {
        let mut current = self.sectors[sector].iter().filter(|c| c.removed == NEVER && c.value != value);
        if !self.is_current(sector, value) && current.all(|c| self.of(c.write).failed) {
            self.lose(sector, value);
        }
    }

    /// The guest has changed what a write that is in flight writes to a sector: it may become either.
    pub(super) fn vary(&mut self, id: WriteId, sector: usize, value: u64) {
        // What a client that is fenced writes is never seen.
        if self.sectors[sector].iter().any(|c| c.write == id) {
            let (observed, removed) = (NEVER, NEVER);
            self.sectors[sector].push(Candidate { write: id, value, observed, removed, doubt: 0 });
            self.present[sector] = value;
        }
    }

    /// Checks what a read that began at `start` returned for a sector, and learns from it.
    pub(super) fn read(&mut self, sector: usize, value: u64, start: Step, now: Step) -> Result<(), String> {
        if let [only] = &mut self.sectors[sector][..]
            && only.value == value
            && only.removed > start
        {
            only.observed = only.observed.min(now);
            return Ok(());
        }
        let mut candidates = std::mem::take(&mut self.sectors[sector]);
        let found = self.read_among(sector, &mut candidates, value, start, now);
        self.sectors[sector] = candidates;
        self.renew(sector);
        found
    }

    fn read_among(
        &self,
        sector: usize,
        candidates: &mut [Candidate],
        value: u64,
        start: Step,
        now: Step,
    ) -> Result<(), String> {
        let matching = |c: &Candidate| c.value == value && c.removed > start;
        let matches = candidates.iter().filter(|c| matching(c)).count();
        if matches == 0 {
            return Err(format!(
                "sector {sector} was read as {}, possible since the read began at step {start}: {}",
                Self::name(value),
                self.list(candidates, start)
            ));
        }
        let oldest = candidates.iter().filter(|c| matching(c)).map(|c| self.of(c.write).start).min();
        let in_flight = |c: &&Candidate| matching(c) && self.of(c.write).end == NEVER;
        let doubt = candidates.iter().find(in_flight).map_or(0, |c| c.write);
        for candidate in candidates.iter_mut() {
            if candidate.value == value {
                if matches == 1 && matching(candidate) {
                    candidate.observed = candidate.observed.min(now);
                }
            } else if candidate.observed < start
                || oldest.is_some_and(|oldest| self.of(candidate.write).end < oldest)
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
        value != NO_VALUE && self.present[sector] == value
            || self.sectors[sector].iter().any(|c| c.value == value && c.removed == NEVER)
    }

    /// Whether a Clean member may hold the value now only if a write in flight has brought it.
    pub(super) fn is_of_unfinished(&self, sector: usize, value: u64) -> bool {
        let current = self.sectors[sector].iter().filter(|c| c.value == value && c.removed == NEVER);
        current.fold(None, |all, c| Some(all.unwrap_or(true) && self.of(c.write).end == NEVER)) == Some(true)
    }

    /// Values that a Clean member may hold now in some sectors, one of each. That it has others does not say that it may not.
    pub(super) fn present(&self, sectors: std::ops::Range<usize>) -> &[u64] {
        &self.present[sectors]
    }

    /// Whether the sector's value may change without a further request: a write of it is in flight or undecided.
    pub(super) fn is_open(&self, sector: usize) -> bool {
        self.is_in_flight(sector) || self.is_undecided(sector)
    }

    /// Whether a write of the sector is in flight.
    pub(super) fn is_in_flight(&self, sector: usize) -> bool {
        self.sectors[sector].iter().any(|c| self.of(c.write).end == NEVER)
    }

    /// Whether the sector's value hangs on a write that failed or whose client died.
    pub(super) fn is_undecided(&self, sector: usize) -> bool {
        self.sectors[sector].iter().any(|c| c.removed == NEVER && self.of(c.write).failed)
    }

    /// An attachment has made the members agree on what was there, whatever became of its writes.
    pub(super) const fn agree(&mut self, now: Step) {
        self.agreed = now;
    }

    /// Whether `later` may be of a write that is in flight or has failed, where `value` was on all members before. That is not known
    /// of a write that failed or whose client died, unless members were made to agree after it and before the later one began.
    /// Zeroes do not count as such, because they can not be told apart.
    pub(super) fn may_be_overtaken(&self, sector: usize, value: u64, later: u64) -> bool {
        let before = self.of(u32::try_from(value >> 24).unwrap_or(0));
        let unfinished = |c: &Candidate| {
            let write = self.of(c.write);
            // A write that was submitted before the members agreed may have been sent after that only.
            let was_everywhere = !before.failed || before.end < self.agreed;
            c.value == later && (write.end == NEVER || write.failed) && was_everywhere
        };
        self.sectors[sector].iter().any(unfinished)
    }

    /// The state of a sector in words.
    pub(super) fn describe(&self, sector: usize) -> String {
        self.list(&self.sectors[sector], NEVER - 1)
    }

    pub(super) fn name(value: u64) -> String {
        if value == 0 {
            "zeroes".into()
        } else {
            format!("write {} sector {}", value >> 24, value & 0xff_ffff)
        }
    }

    fn list(&self, candidates: &[Candidate], start: Step) -> String {
        let text = |c: &Candidate| {
            let write = self.of(c.write);
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
