//! Members that fail again and again, and disks that fail all at once.

use super::*;

impl Bench {
    /// Milliseconds from each rejoin of a member to the next.
    fn pauses(&self, who: u8) -> Vec<u64> {
        let of = |(_, at): &(MemberId, Time)| at.0 / 1_000_000;
        let at: Vec<_> = self.rejoins.iter().filter(|(m, _)| *m == member(who)).map(of).collect();
        at.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// The time passes as exactly as the client asks for.
    fn pass_exactly(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = self.client.deadline().max(self.now + Duration::from_millis(1)).min(end);
            self.client.apply(Event::Tick, self.now);
            self.run();
        }
    }

    /// The member is lost, and its node is up again at once.
    fn flap(&mut self, node: u8) {
        self.set_up(node, false);
        self.set_up(node, true);
    }

    fn told(&self, who: u8) -> &crate::pool::Condition {
        self.conditions.iter().find(|c| c.member == member(who)).expect("a condition")
    }

    /// Milliseconds for which each view that made the member Syncing held requests in vain.
    fn failed_holds(&self) -> Vec<u64> {
        let hold = |n: &Notice| match n {
            Notice::RejoinFailed { cause: Cause::ViewNotAnswered, reason, .. } => {
                let text = reason.rsplit(' ').next().unwrap();
                let (whole, rest) = text.split_once('.').unwrap();
                let whole: u64 = whole.parse().unwrap();
                let tenths: u64 = rest.trim_end_matches(['m', 's']).parse().unwrap();
                Some(if text.ends_with("ms") { whole } else { whole * 1000 + tenths * 100 })
            }
            _ => None,
        };
        self.notices.iter().filter_map(hold).collect()
    }
}

#[test]
fn a_member_that_answers_all_but_views_is_tried_ever_more_seldom_and_holds_requests_ever_so_little() {
    let mut bench = Bench::new(2, |_| {});
    bench.deaf.push(1);
    bench.flap(1);
    bench.pass_exactly(Duration::from_secs(60));
    let holds = bench.failed_holds();
    assert!(holds.len() >= 4 && holds[..3].iter().all(|ms| *ms <= 110), "{holds:?}");
    assert!(holds.iter().sum::<u64>() < 800, "{holds:?}");
    let pauses = bench.pauses(1);
    assert!(pauses.windows(2).all(|p| p[1] * 10 > p[0] * 18), "{pauses:?}");
    assert!(
        bench.told(1).failures >= 5 && bench.told(1).cause == Cause::ViewNotAnswered,
        "{:?}",
        bench.told(1)
    );
    assert!(bench.told(1).age_ms > 20_000 && bench.told(1).retry_in_ms.is_some(), "{:?}", bench.told(1));
    bench.pass_exactly(Duration::from_secs(3600));
    let held: u64 = bench.failed_holds().iter().sum();
    assert!(held < 36_000, "{held} ms of an hour");
    assert!(*bench.pauses(1).last().unwrap() < 310_000, "it is never given up: {:?}", bench.pauses(1));
    // It has recovered, and an operator says so.
    bench.deaf.clear();
    bench.command(Command::Resync { member: Some(member(1)) });
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
}

#[test]
fn a_member_that_is_lost_as_soon_as_it_is_back_is_tried_ever_more_seldom() {
    let mut bench = Bench::new(3, |_| {});
    for _ in 0..6 {
        bench.flap(1);
        for _ in 0..1000 {
            bench.pass(Duration::from_millis(100));
            if bench.state(member(1)) == Some(MemberState::Syncing) {
                break;
            }
        }
        bench.synced(member(1));
        assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
    }
    let pauses = bench.pauses(1);
    assert!(pauses.windows(2).all(|p| p[1] * 10 > p[0] * 16) && pauses[4] > 15_000, "{pauses:?}");
    // A time in service that lasted ends that.
    bench.pass(Duration::from_secs(301));
    bench.flap(1);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
}

#[test]
fn a_member_that_rehearses_too_slowly_never_holds_requests() {
    let mut bench = Bench::new(2, |_| {});
    bench.rehearsal = Duration::from_secs(2);
    bench.flap(1);
    bench.pass_exactly(Duration::from_secs(600));
    assert!(bench.failed_holds().is_empty() && bench.rejoins.len() > 5);
    assert_eq!((bench.state(member(1)), bench.told(1).cause), (Some(MemberState::Out), Cause::TooSlow));
    // The operator may know better.
    bench.command(Command::Resync { member: None });
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
}

#[test]
fn a_member_that_is_as_slow_as_all_others_is_brought_in() {
    let mut bench = Bench::new(3, |_| {});
    bench.submit(1, Operation::Write, 0, 4096);
    bench.pass(Duration::from_secs(1));
    bench.answer_all();
    bench.rehearsal = Duration::from_secs(2);
    bench.flap(1);
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
}

impl Bench {
    /// A write that this member answers so much later than the others.
    fn write_slowly(&mut self, token: u64, slow: &[u8], time: Duration) {
        self.submit(token, Operation::Write, 0, 4096);
        let members: Vec<_> = self.sent.iter().map(|(m, _)| *m).collect();
        for member in members.into_iter().filter(|m| !slow.contains(&m.as_u8())) {
            self.answer(Some(member), Status::Ok);
        }
        self.pass(time);
        self.answer_all();
    }

    fn lost_for(&self, who: u8) -> Vec<Cause> {
        let cause = |n: &Notice| match n {
            Notice::Lost(members, cause, _) if members.contains(member(who)) => Some(*cause),
            _ => None,
        };
        self.notices.iter().filter_map(cause).collect()
    }
}

#[test]
fn a_member_that_delays_each_write_is_lost_by_the_sum_of_the_delays() {
    for members in [2, 3] {
        let mut bench = Bench::new(members, |c| c.leg_timeout = Duration::from_secs(3));
        let begun = bench.now;
        for token in 1..60 {
            bench.write_slowly(token, &[1], Duration::from_secs(1));
            if bench.state(member(1)) == Some(MemberState::Out) {
                break;
            }
        }
        assert_eq!(bench.lost_for(1), [Cause::TooSlow]);
        let stalled = bench.now - begun;
        assert!((Duration::from_secs(3)..=Duration::from_secs(4)).contains(&stalled), "{stalled:?}");
    }
}

#[test]
fn a_member_that_delays_a_write_now_and_then_stays() {
    let mut bench = Bench::new(2, |c| c.leg_timeout = Duration::from_secs(3));
    for token in 0..20 {
        bench.write_slowly(2 * token, &[1], Duration::from_secs(1));
        bench.pass(Duration::from_secs(25));
    }
    for token in 100..200 {
        bench.write_slowly(token, &[1], Duration::from_millis(300));
    }
    assert_eq!(bench.lost_for(1), []);
}

#[test]
fn no_member_is_lost_for_delays_when_all_are_slow_or_it_is_the_last_clean_one() {
    let mut bench = Bench::new(2, |c| c.leg_timeout = Duration::from_secs(3));
    for token in 0..30 {
        bench.submit(token, Operation::Write, 0, 4096);
        bench.pass(Duration::from_secs(1));
        // The other one takes longer still.
        let first = member(u8::from(token % 3 == 0));
        bench.answer(Some(first), Status::Ok);
        bench.pass(Duration::from_millis(500));
        bench.answer_all();
    }
    assert_eq!((bench.lost_for(0), bench.lost_for(1)), (Vec::new(), Vec::new()));
    bench.set_up(1, false);
    bench.notices.clear();
    for token in 100..130 {
        bench.write_slowly(token, &[0], Duration::from_secs(1));
    }
    assert_eq!(bench.lost_for(0), []);
    assert!(bench.client.is_active());
}

#[test]
fn sick_members_do_not_keep_one_that_was_well_from_coming_back() {
    let mut bench = Bench::new(3, |_| {});
    bench.deaf.push(0);
    bench.flap(0);
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.state(member(0)), Some(MemberState::Out));
    bench.flap(1);
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
}

#[test]
fn a_write_that_all_disks_fail_ends_with_an_error_at_once_and_the_pool_is_not_attached_again() {
    for (status, cause) in [(Status::IoError, Cause::WriteErrors), (Status::NoSpace, Cause::DiskFull)] {
        let mut bench = Bench::new(3, |_| {});
        let epoch = bench.client.epoch;
        bench.submit(1, Operation::Write, 0, 4096);
        for _ in 0..3 {
            bench.answer(None, status);
        }
        assert_eq!(bench.done, [(Token(1), Err(IoError::Media))]);
        assert_eq!((bench.client.epoch, bench.client.is_active()), (epoch, true));
        let is_told = |n: &Notice| matches!(n, Notice::Lost(_, c, _) if *c == cause);
        assert!(bench.notices.iter().any(is_told), "{:?}", bench.notices);
    }
}

#[test]
fn when_all_disks_fail_while_a_view_is_under_way_the_guest_hears_of_it_with_the_commit() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Write, 0, 4096);
    bench.submit(2, Operation::Write, 8192, 4096);
    bench.adopts = false;
    let first = bench.answer(None, Status::IoError);
    bench.sent.retain(|(m, _)| *m != first);
    bench.answer(None, Status::IoError);
    assert_eq!(bench.done, [], "the view that has the first one Out is not durable yet");
    let other = member(1 - first.as_u8());
    let header = MessageHeader {
        epoch: bench.client.epoch,
        view: ViewNumber(bench.client.view.as_ref().unwrap().number.0 + 1),
        ..MessageHeader::new(Kind::SetViewReply, bench.spec.id)
    };
    bench.adopts = true;
    bench.client.apply(Event::Message(LinkId(other.as_u8()), &header, &[]), bench.now);
    bench.run();
    assert_eq!(bench.done, [(Token(1), Err(IoError::Media))]);
    bench.answer(Some(other), Status::Ok);
    assert_eq!(bench.done.last(), Some(&(Token(2), Ok(()))));
}

#[test]
fn a_flush_that_all_disks_fail_ends_with_an_error_at_once() {
    let mut bench = Bench::new(2, |_| {});
    let epoch = bench.client.epoch;
    bench.submit(1, Operation::Flush, 0, 0);
    bench.answer(None, Status::IoError);
    bench.answer(None, Status::IoError);
    assert_eq!(bench.done, [(Token(1), Err(IoError::Media))]);
    assert_eq!(bench.client.epoch, epoch);
}

#[test]
fn a_request_waits_no_longer_than_the_suspend_timeout_for_a_pool_that_comes_back_and_serves_nothing() {
    let mut bench = Bench::new(2, |c| c.suspend_timeout = Duration::from_secs(20));
    bench.submit(1, Operation::Write, 0, 4096);
    let begun = bench.now;
    while bench.done.is_empty() && bench.now - begun < Duration::from_secs(300) {
        bench.restart_all(&[1, 1]);
        assert!(!bench.done.is_empty() || bench.client.is_active());
        bench.pass(Duration::from_secs(1));
    }
    assert_eq!(bench.done, [(Token(1), Err(IoError::Suspended))]);
    assert!(bench.now - begun < Duration::from_secs(25), "{:?}", bench.now - begun);
}

#[test]
fn where_the_disks_of_all_current_members_refuse_requests_fail_within_the_leg_timeout() {
    let mut bench = Bench::new(2, |_| {});
    bench.refusing = vec![(0, Status::IoError), (1, Status::IoError)];
    bench.submit(1, Operation::Write, 0, 4096);
    let begun = bench.now;
    bench.restart_all(&[1, 1]);
    while bench.done.is_empty() && bench.now - begun < Duration::from_secs(300) {
        bench.pass(Duration::from_millis(100));
    }
    assert_eq!(bench.done, [(Token(1), Err(IoError::Media))]);
    assert!(bench.now - begun < Duration::from_secs(7), "{:?}", bench.now - begun);
}

#[test]
fn what_a_node_flushed_before_it_stopped_is_not_missed_and_what_it_did_not_is() {
    for is_flushed in [true, false] {
        let mut bench = Bench::new(2, |_| {});
        bench.write_through = false;
        bench.client.apply(Event::Cancel, bench.now);
        bench.pass(Duration::from_secs(1));
        bench.submit(1, Operation::Write, 8192, 4096);
        bench.answer_all();
        // In flight: nobody knows whether the node carries it out.
        bench.submit(2, Operation::Write, 65536, 4096);
        bench.additions.clear();
        let body = crate::wire::Goodbye { flushed: is_flushed }.encode();
        let header = MessageHeader {
            epoch: bench.client.epoch,
            payload: 1,
            ..MessageHeader::new(Kind::Goodbye, bench.spec.id)
        };
        bench.client.apply(Event::Message(LinkId(1), &header, &body), bench.now);
        bench.run();
        let misses =
            |offset: u64| bench.additions.iter().any(|a| a.members.contains(member(1)) && a.offset == offset);
        assert_eq!((misses(8192), misses(65536)), (!is_flushed, true));
        let is_told = |n: &Notice| matches!(n, Notice::Lost(_, Cause::NodeStopped, _));
        assert!(bench.notices.iter().any(is_told), "{:?}", bench.notices);
    }
}

#[test]
fn a_claim_of_another_attachment_counts_for_nothing() {
    let mut bench = Bench::new(2, |_| {});
    bench.write_through = false;
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_secs(1));
    bench.submit(1, Operation::Write, 8192, 4096);
    bench.answer_all();
    bench.additions.clear();
    let body = crate::wire::Goodbye { flushed: true }.encode();
    let header = MessageHeader {
        epoch: Epoch(bench.client.epoch.0 - 1),
        payload: 1,
        ..MessageHeader::new(Kind::Goodbye, bench.spec.id)
    };
    bench.client.apply(Event::Message(LinkId(1), &header, &body), bench.now);
    bench.run();
    assert!(bench.additions.iter().any(|a| a.offset == 8192), "{:?}", bench.additions);
}
