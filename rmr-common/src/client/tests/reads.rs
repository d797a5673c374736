//! Reads that a leg fails: what the guest hears, what goes on record, and when the leg is left out.

use super::*;

#[test]
fn a_range_that_one_leg_cannot_read_is_on_record_as_missed_by_it_and_it_comes_back() {
    let mut bench = Bench::new(2, |_| {});
    let bad = bench.fail_read(1, 5 * 4096 + 512);
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert_eq!(bench.state(bad), Some(MemberState::Out));
    let missed = DirtyAddition { members: MemberSet::only(bad), offset: 5 * 4096, length: 4096 };
    assert_eq!(bench.additions, [missed], "exactly the block");
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(bad), Some(MemberState::Syncing));
    bench.synced(bad);
    assert_eq!(bench.state(bad), Some(MemberState::Clean));
}

#[test]
fn read_errors_that_come_together_are_one_view_change() {
    let mut bench = Bench::new(2, |_| {});
    let before = bench.client.counters.views;
    (0..8).for_each(|i| bench.submit(i, Operation::Read, i * 512, 512));
    let bad = bench.sent[0].0;
    (0..8).for_each(|_| _ = bench.answer(Some(bad), Status::IoError));
    bench.answer_all();
    assert_eq!((bench.done.len(), bench.client.counters.views), (8, before + 1));
    assert_eq!(bench.state(bad), Some(MemberState::Out));
}

#[test]
fn a_leg_does_not_leave_for_a_read_error_before_all_that_it_was_sent_is_answered() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Read, 0, 512);
    let bad = bench.sent[0].0;
    bench.submit(2, Operation::Write, 1 << 20, 4096);
    let other = member(1 - bad.as_u8());
    bench.answer(Some(bad), Status::IoError);
    bench.answer(Some(other), Status::Ok);
    bench.answer(Some(other), Status::Ok);
    assert_eq!(bench.state(bad), Some(MemberState::Clean), "it has the guest's memory still");
    bench.answer(Some(bad), Status::Ok);
    assert_eq!(bench.state(bad), Some(MemberState::Out));
    assert_eq!(bench.additions.len(), 1, "the write is not missed: {:?}", bench.additions);
}

#[test]
fn what_no_leg_can_read_is_an_error_to_the_guest_and_costs_no_leg() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Read, 0, 512);
    bench.answer(None, Status::IoError);
    bench.answer(None, Status::IoError);
    assert_eq!(bench.done, [(Token(1), Err(IoError::Media))]);
    bench.pass(Duration::from_secs(1));
    assert_eq!([bench.state(member(0)), bench.state(member(1))], [Some(MemberState::Clean); 2]);
}

#[test]
fn a_read_that_lost_its_leg_goes_to_it_again_when_it_is_the_clean_one_that_is_left() {
    for fails_first in [false, true] {
        let mut bench = Bench::new(2, |c| c.rejoin_hold = c.leg_timeout);
        bench.submit(1, Operation::Read, 0, 4096);
        let home = bench.answer(None, Status::Ok);
        bench.submit(2, Operation::Write, 0, 4096);
        bench.submit(3, Operation::Read, 0, 4096);
        // Stands in line behind the first write, and is not sent before the read is lost.
        bench.submit(4, Operation::Write, 0, 4096);
        if fails_first {
            let at = bench.sent.iter().position(|(_, h)| h.kind == Kind::Read).unwrap();
            bench.sent.swap(0, at);
            bench.answer(None, Status::IoError);
        }
        let other = 1 - home.as_u8();
        bench.set_up(home.as_u8(), false);
        bench.sent.retain(|(m, _)| *m != home);
        assert_eq!(bench.state(home), Some(MemberState::Out));
        bench.set_up(home.as_u8(), true);
        bench.pass(Duration::from_secs(2));
        bench.answer(Some(member(other)), Status::Ok);
        bench.pass(Duration::from_secs(2));
        bench.synced(home);
        assert_eq!(bench.state(home), Some(MemberState::Clean));
        bench.set_up(other, false);
        bench.sent.retain(|(m, _)| *m == home);
        bench.answer_all();
        bench.done.sort_by_key(|(token, _)| token.0);
        assert_eq!(bench.done, [1, 2, 3, 4].map(|t| (Token(t), Ok(()))), "{fails_first}");
    }
}

#[test]
fn a_leg_that_fails_reads_too_often_is_left_out_until_an_operator_brings_it_back() {
    let mut bench = Bench::new(2, |c| c.read_error_limit = 1);
    let bad = bench.fail_read(1, 0);
    bench.pass(Duration::from_secs(2));
    bench.synced(bad);
    assert_eq!(bench.excluded(bad), None);
    assert_eq!(bench.fail_read(2, 0), bad);
    assert!(bench.excluded(bad).unwrap().contains("2 times"));
    bench.pass(Duration::from_secs(30));
    assert_eq!(bench.state(bad), Some(MemberState::Out));
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.state(bad), Some(MemberState::Out), "a new attachment knows nothing better of its disk");
    let told = bench.conditions.iter().find(|c| c.member == bad).unwrap();
    assert_eq!((told.cause, told.retry_in_ms), (Cause::ReadErrorLimit, None));
    bench.command(Command::Resync { member: None });
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.state(bad), Some(MemberState::Syncing));
}

#[test]
fn a_syncing_member_whose_source_fails_is_told_another_one() {
    let mut bench = Bench::new(3, |_| {});
    let bad = bench.fail_read(1, 0);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(bad), Some(MemberState::Syncing));
    let source = |bench: &Bench| bench.client.source_of(bad).unwrap();
    let mut named = vec![source(&bench)];
    for _ in 0..2 {
        let header = MessageHeader {
            epoch: bench.client.epoch,
            slot: crate::pool::Slot(source(&bench).as_u8().into()),
            ..MessageHeader::new(Kind::SourceFailed, bench.spec.id)
        };
        bench.client.apply(Event::Message(LinkId(bad.as_u8()), &header, &[]), bench.now);
        bench.run();
        named.push(source(&bench));
    }
    assert!(named[0] != named[1] && named[0] == named[2], "{named:?}");
}
