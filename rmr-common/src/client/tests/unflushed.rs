//! Machines that lost writes which were completed and not flushed.

use super::*;

impl Bench {
    /// Two write-back members with a write that completed and was not flushed.
    fn unflushed() -> Self {
        let mut bench = Self::new(2, |_| {});
        bench.write_through = false;
        bench.client.apply(Event::Cancel, bench.now);
        bench.pass(Duration::from_secs(1));
        bench.submit(1, Operation::Write, 8192, 4096);
        bench.answer_all();
        assert_eq!(bench.done, [(Token(1), Ok(()))]);
        bench.done.clear();
        bench
    }
}

#[test]
fn when_every_machine_lost_unflushed_writes_all_fails_until_that_is_acknowledged() {
    let mut bench = Bench::unflushed();
    bench.restart_all(&[2, 2]);
    assert!(bench.client.is_active() && bench.client.status().lost_writes);
    bench.submit(2, Operation::Flush, 0, 0);
    bench.submit(3, Operation::Read, 0, 512);
    assert_eq!(bench.done, [2, 3].map(|t| (Token(t), Err(IoError::LostWrites))));
    bench.client.acknowledge_loss();
    bench.submit(4, Operation::Read, 0, 512);
    bench.answer_all();
    assert_eq!(bench.done.last(), Some(&(Token(4), Ok(()))));
    bench.restart_all(&[3, 3]);
    assert!(!bench.client.has_lost_writes(), "nothing was unflushed any more");
}

#[test]
fn a_flush_that_was_under_way_when_every_machine_went_fails() {
    let mut bench = Bench::unflushed();
    bench.submit(2, Operation::Flush, 0, 0);
    bench.restart_all(&[2, 2]);
    assert_eq!(bench.done, [(Token(2), Err(IoError::LostWrites))]);
}

#[test]
fn processes_that_are_started_anew_on_machines_that_run_on_have_lost_nothing() {
    let mut bench = Bench::unflushed();
    bench.restart_all(&[1, 1]);
    assert!(!bench.client.has_lost_writes());
    bench.submit(2, Operation::Flush, 0, 0);
    bench.answer_all();
    assert_eq!(bench.done, [(Token(2), Ok(()))]);
}

#[test]
fn a_machine_that_lost_unflushed_writes_is_stale_for_them_when_another_kept_them() {
    let mut bench = Bench::unflushed();
    bench.restart_all(&[2, 1]);
    assert!(!bench.client.has_lost_writes());
    let missed = DirtyAddition { members: MemberSet::only(member(0)), offset: 8192, length: 4096 };
    assert!(bench.additions.contains(&missed), "{:?}", bench.additions);
    assert_ne!(bench.state(member(0)), Some(MemberState::Clean));
    assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
}

#[test]
fn what_was_flushed_is_not_lost_with_the_machines() {
    let mut bench = Bench::unflushed();
    bench.submit(2, Operation::Flush, 0, 0);
    bench.answer_all();
    bench.restart_all(&[2, 2]);
    assert!(!bench.client.has_lost_writes());
}
