//! Requests from their entry to their release.
#![allow(unsafe_code)]

use super::*;

struct Table {
    flight: Flight,
    status: Segment,
    memory: Arc<GuestMemory>,
}

impl Table {
    fn new() -> Self {
        // SAFETY: a segment of no bytes is never touched.
        let status = unsafe { Segment::new(std::ptr::null_mut(), 0) };
        Self { flight: Flight::new(4), status, memory: Arc::new(GuestMemory::new()) }
    }

    fn enter(&mut self, head: u16, parts: u16, flush_behind: bool) -> Index {
        let origin = Origin { queue: 0, head, incarnation: 1 };
        self.flight.enter(origin, self.status, &[], parts, flush_behind, &self.memory).unwrap()
    }

    fn complete(&mut self, index: Index, part: u8, failed: bool) -> Progress {
        let token = self.flight.token(index, part);
        self.flight.complete(token, failed)
    }

    /// Heads of a list, and whether each failed.
    fn release(&mut self, index: Index) -> Vec<(u16, bool)> {
        let (mut next, mut released) = (Some(index), Vec::new());
        while let Some(index) = next {
            let (finished, rest) = self.flight.release(index).unwrap();
            released.push((finished.origin.head, finished.failed));
            next = rest;
        }
        released
    }
}

#[test]
fn a_request_ends_with_its_last_part_and_has_failed_if_any_part_did() {
    for failing in [None, Some(0), Some(1), Some(2)] {
        let mut table = Table::new();
        let index = table.enter(7, 3, false);
        for part in 0..3u8 {
            let expected = if part < 2 { Progress::Waiting } else { Progress::Done(index) };
            assert_eq!(table.complete(index, part, failing == Some(part)), expected);
        }
        assert_eq!(table.release(index), [(7, failing.is_some())]);
        assert!(table.flight.is_empty());
    }
}

#[test]
fn requests_that_share_a_flush_share_its_fate_and_a_failed_write_waits_for_none() {
    for flush_fails in [false, true] {
        let mut table = Table::new();
        let [first, second, bad] = [1, 2, 3].map(|head| table.enter(head, 1, true));
        assert_eq!(table.complete(first, 0, false), Progress::Written(first));
        table.flight.share_flush(first, None);
        assert_eq!(table.complete(second, 0, false), Progress::Written(second));
        table.flight.share_flush(second, Some(first));
        assert_eq!(table.complete(bad, 0, true), Progress::Done(bad));
        assert_eq!(table.release(bad), [(3, true)]);
        assert_eq!(table.complete(second, u8::MAX, flush_fails), Progress::Done(second));
        assert_eq!(table.release(second), [(2, flush_fails), (1, flush_fails)]);
    }
}

#[test]
fn an_answer_that_comes_twice_ends_no_other_request() {
    let mut table = Table::new();
    let index = table.enter(1, 1, false);
    let token = table.flight.token(index, 0);
    assert_eq!(table.flight.complete(token, false), Progress::Done(index));
    assert_eq!(table.flight.complete(token, false), Progress::Unknown);
    table.release(index);
    assert_eq!(table.flight.complete(token, false), Progress::Unknown);
    let again = table.enter(2, 1, false);
    assert_eq!(again, index, "the slot is used again");
    assert_eq!(table.flight.complete(token, false), Progress::Unknown);
    assert_eq!(table.complete(again, 0, false), Progress::Done(again));
    assert_eq!(table.flight.complete(Token(u64::MAX), false), Progress::Unknown);
}
