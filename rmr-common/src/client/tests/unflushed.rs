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

impl Bench {
    /// A node says that its disk failed a flush, and closes the connection.
    fn flush_fails(&mut self, node: u8) {
        let header = MessageHeader::new(Kind::Goodbye, self.spec.id).reply(Kind::Goodbye, Status::IoError);
        self.client.apply(Event::Message(LinkId(node), &header, &[]), self.now);
        self.run();
    }
}

#[test]
fn a_member_whose_flush_failed_is_lost_with_what_it_had_not_flushed() {
    let mut bench = Bench::unflushed();
    bench.flush_fails(1);
    let missed = DirtyAddition { members: MemberSet::only(member(1)), offset: 8192, length: 4096 };
    assert!(bench.additions.contains(&missed), "{:?}", bench.additions);
    assert_ne!(bench.state(member(1)), Some(MemberState::Clean));
    assert!(!bench.client.has_lost_writes());
}

#[test]
fn the_only_clean_member_whose_flush_failed_has_lost_writes_for_good() {
    // By its answer to a flush, by its message, or by what it says when it is attached again.
    for told in 0..3 {
        let mut bench = Bench::unflushed();
        bench.up[1] = false;
        bench.client.apply(Event::LinkDown(LinkId(1), "gone"), bench.now);
        bench.run();
        assert!(bench.client.is_active());
        match told {
            0 => {
                bench.submit(2, Operation::Flush, 0, 0);
                bench.answer(Some(member(0)), Status::IoError);
                assert_eq!(bench.done, [(Token(2), Err(IoError::Media))]);
            }
            1 => bench.flush_fails(0),
            _ => {
                bench.flush_failed[0] = true;
                bench.client.apply(Event::LinkDown(LinkId(0), "gone"), bench.now);
                bench.run();
            }
        }
        bench.done.clear();
        bench.pass(Duration::from_secs(2));
        assert!(bench.client.is_active() && bench.client.has_lost_writes(), "{told}");
        bench.submit(3, Operation::Flush, 0, 0);
        assert_eq!(
            bench.done,
            [(Token(3), Err(IoError::LostWrites))],
            "a flush after a failed one proves nothing"
        );
    }
}

#[test]
fn a_member_whose_flush_failed_is_no_reference_beside_one_whose_table_is_lost_too() {
    let mut bench = Bench::new(2, |_| {});
    bench.write_through = false;
    bench.flush_failed = vec![true, false];
    // It has more than the other one, as far as it knows; but not what it had not flushed.
    bench.slots[0] = vec![written(7, 0)];
    bench.start_client(|_| {});
    assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
    assert_ne!(bench.state(member(0)), Some(MemberState::Clean));
}

#[test]
fn a_flush_that_fails_fails_every_request_that_shares_it_and_the_next_one_fails_as_well() {
    let mut bench = Bench::new(1, |_| {});
    bench.write_through = false;
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_secs(1));
    bench.submit(1, Operation::Write, 8192, 4096);
    bench.answer_all();
    bench.submit(2, Operation::Flush, 0, 0);
    for token in [3, 4, 5] {
        bench.submit(token, Operation::Flush, 0, 0);
    }
    bench.answer(Some(member(0)), Status::Ok);
    bench.done.clear();
    // One round for three requests.
    assert_eq!(bench.sent.len(), 1);
    bench.submit(6, Operation::Write, 0, 4096);
    bench.answer(Some(member(0)), Status::IoError);
    let mut failed: Vec<_> =
        bench.done.iter().filter(|(_, r)| *r == Err(IoError::Media)).map(|(t, _)| t.0).collect();
    failed.sort_unstable();
    assert_eq!(failed, [3, 4, 5]);
}

#[test]
fn a_view_that_replaces_one_under_way_says_what_the_members_lost_before_miss_as_well() {
    let mut bench = Bench::new(3, |_| {});
    bench.submit(1, Operation::Write, 8192, 4096);
    bench.adopts = false;
    bench.client.apply(Event::LinkDown(LinkId(1), "gone"), bench.now);
    bench.run();
    // The view without member 1 is under way, and may reach nobody.
    bench.adopts = true;
    bench.additions.clear();
    bench.client.apply(Event::LinkDown(LinkId(2), "gone"), bench.now);
    bench.run();
    let missed = bench.additions.iter().filter(|a| (a.offset, a.length) == (8192, 4096));
    let members = missed.fold(MemberSet::EMPTY, |all, a| all.union(a.members));
    assert_eq!(members, [1, 2].map(member).into_iter().collect());
}

#[test]
fn a_detach_that_a_member_did_not_answer_well_is_told() {
    let detach = |answers: &[Option<Status>]| {
        let mut bench = Bench::new(2, |_| {});
        bench.client.apply(Event::Detach, bench.now);
        let mut notices = Vec::new();
        while let Some(output) = bench.client.take_output() {
            if let Output::Notice(notice) = output {
                notices.push(notice);
            }
        }
        for (answer, node) in answers.iter().zip(0u8..) {
            let header = MessageHeader {
                epoch: bench.client.epoch,
                ..MessageHeader::new(Kind::Detach, bench.spec.id)
            };
            if let Some(status) = answer {
                let reply = header.reply(Kind::DetachReply, *status);
                bench.client.apply(Event::Message(LinkId(node), &reply, &[]), bench.now);
            }
        }
        bench.now = bench.now + Duration::from_secs(60);
        bench.client.apply(Event::Tick, bench.now);
        while let Some(output) = bench.client.take_output() {
            if let Output::Notice(notice) = output {
                notices.push(notice);
            }
        }
        assert_eq!(bench.client.over(), Some(&OverReason::Detached));
        notices
            .into_iter()
            .find_map(|n| if let Notice::DetachFailed(m, all) = n { Some((m, all)) } else { None })
    };
    let (ok, bad) = (Some(Status::Ok), Some(Status::IoError));
    let only = |i| MemberSet::only(member(i));
    assert_eq!(detach(&[ok, ok]), None);
    assert_eq!(detach(&[ok, bad]), Some((only(1), false)));
    assert_eq!(detach(&[None, ok]), Some((only(0), false)));
    assert_eq!(detach(&[bad, None]), Some((only(0).union(only(1)), true)));
}
