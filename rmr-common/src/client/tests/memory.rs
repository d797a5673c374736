//! Requests whose memory is taken away while they are under way.

use super::*;

impl Bench {
    /// The memory of the request that was sent to this member cannot be reached.
    fn fault(&mut self, who: MemberId) {
        let (_, header) = *self.sent.iter().find(|(m, _)| *m == who).expect("a request");
        self.client.apply(Event::MemoryFault(header.slot, header.sequence), self.now);
        self.run();
    }
}

#[test]
fn a_write_whose_memory_could_not_be_read_for_one_leg_fails_once_all_legs_have_the_same() {
    for digest in [DataDigest::Off, DataDigest::Detect] {
        let mut bench = Bench::new(2, |c| c.data_digest = digest);
        bench.submit(1, Operation::Write, 0, 4096);
        let first = bench.sent[0].1.sequence;
        bench.fault(member(1));
        bench.answer(Some(member(0)), Status::Ok);
        assert!(bench.done.is_empty() && bench.sent.len() == 1, "filler is on its way to a leg");
        bench.answer(Some(member(1)), Status::Ok);
        let sent: Vec<_> = bench.sent.iter().map(|(m, h)| (*m, h.kind, h.sequence > first)).collect();
        assert_eq!(sent, [0, 1].map(|m| (member(m), Kind::Write, true)));
        // The same range waits for it, as it does for any write.
        bench.submit(2, Operation::Write, 0, 512);
        assert_eq!(bench.sent.len(), 2);
        bench.answer(None, Status::Ok);
        assert!(bench.done.is_empty());
        bench.answer(None, Status::Ok);
        assert_eq!(bench.done, [(Token(1), Err(IoError::Memory))]);
        bench.answer_all();
        assert_eq!(bench.done.last(), Some(&(Token(2), Ok(()))));
        assert!((0..2).all(|m| bench.state(member(m)) == Some(MemberState::Clean)), "no leg is lost");
        assert_eq!(bench.client.status().counters.memory_faults, 1);
    }
}

#[test]
fn the_copy_of_a_faulted_write_is_salvaged_also_when_a_new_attachment_comes_between() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Write, 0, 4096);
    bench.fault(member(0));
    bench.attach_anew();
    // Cancelled with the attachment: nothing of it is sent again.
    assert_eq!(bench.done, [(Token(1), Err(IoError::Cancelled))]);
    bench.sent.clear();
    bench.done.clear();
    bench.submit(2, Operation::Write, 0, 4096);
    let first = bench.sent[0].1.sequence;
    bench.fault(member(0));
    bench.restart_all(&[1, 1]);
    assert!(bench.client.is_active(), "the legs are back");
    let sequences = bench.sent.iter().filter(|(_, h)| h.kind == Kind::Write).map(|(_, h)| h.sequence);
    let sequences: Vec<_> = sequences.collect();
    assert!(!sequences.is_empty() && sequences.iter().all(|s| *s > first), "{sequences:?}");
    assert!(bench.client.is_bounced(Slot(0)));
    bench.answer_all();
    assert_eq!(bench.done, [(Token(2), Err(IoError::Memory))]);
}

#[test]
fn members_that_completed_a_faulted_write_are_not_equal_by_their_slot_tables() {
    let mut bench = Bench::new(3, |_| {});
    bench.submit(1, Operation::Write, 3 * 4096, 4096);
    let sequence = bench.sent[0].1.sequence;
    bench.fault(member(0));
    // All three have the write, with filler on member 0; the client gives it up before it is repeated.
    let entry = SlotEntry { sequence, offset: 3 * 4096, length: 4096, failed: false, slot: Slot(0) };
    bench.slots = vec![vec![entry]; 3];
    bench.additions.clear();
    // An attachment that breaks off settles nothing.
    bench.adopts = false;
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_millis(500));
    bench.adopts = true;
    bench.attach_anew();
    let missed: MemberSet =
        bench.additions.iter().map(|a| a.members).fold(MemberSet::EMPTY, MemberSet::union);
    assert_eq!(missed.iter().count(), 2, "one of them is the reference: {:?}", bench.additions);
    assert!(
        bench.additions.iter().all(|a| (a.offset, a.length) == (3 * 4096, 4096)),
        "{:?}",
        bench.additions
    );
    // Once members agree, nothing of it is left.
    bench.pass(Duration::from_secs(5));
    bench.slots = vec![Vec::new(); 3];
    bench.additions.clear();
    bench.attach_anew();
    assert_eq!(bench.additions, []);
}

#[test]
fn a_read_into_memory_that_is_gone_fails_alone() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Read, 0, 4096);
    bench.submit(2, Operation::Read, 0, 4096);
    let home = bench.sent[0].0;
    bench.fault(home);
    assert_eq!(bench.done, [(Token(1), Err(IoError::Memory))]);
    bench.sent.remove(0);
    bench.answer_all();
    assert_eq!(bench.done.last(), Some(&(Token(2), Ok(()))));
    assert_eq!(bench.client.status().counters.read_errors, 0, "no disk is at fault");
    assert!((0..2).all(|m| bench.state(member(m)) == Some(MemberState::Clean)));
    // What comes late is nobody's.
    bench.client.apply(Event::MemoryFault(Slot(0), Sequence(1)), bench.now);
    bench.client.apply(Event::MemoryFault(Slot(63), Sequence(1)), bench.now);
}
