//! Stores that went back in time, or are seen twice.

use std::time::SystemTime;

use super::*;

/// What a store has at some moment, as far as a client can see.
struct Store(View, PoolSpec, Epoch, Mark, Attested, bool);

impl Bench {
    fn copy(&self, node: usize) -> Store {
        Store(
            self.views[node].clone(),
            self.specs[node].clone(),
            self.epochs[node],
            self.marks[node],
            self.attested[node],
            self.clean[node],
        )
    }

    fn put(&mut self, node: usize, store: Store) {
        (self.views[node], self.specs[node], self.epochs[node]) = (store.0, store.1, store.2);
        (self.marks[node], self.attested[node], self.clean[node]) = (store.3, store.4, store.5);
    }

    fn detach(&mut self) {
        self.client.apply(Event::Detach, self.now);
        self.run();
        self.pass(Duration::from_millis(300));
        assert_eq!(self.client.over(), Some(&OverReason::Detached));
    }

    /// The client dies; what its nodes know of it stays.
    fn next_client(&mut self) {
        self.notices.clear();
        self.additions.clear();
        self.start_client(|c| c.takeover = true);
        self.pass(Duration::from_secs(1));
    }

    fn write(&mut self, token: u64) {
        self.submit(token, Operation::Write, 0, 4096);
        self.answer_all();
    }

    fn regressed(&self) -> Vec<MemberId> {
        let found = |n: &Notice| if let Notice::Regressed { member, .. } = n { Some(*member) } else { None };
        self.notices.iter().filter_map(found).collect()
    }

    fn waits_for(&self) -> Option<&str> {
        self.notices
            .iter()
            .rev()
            .find_map(|n| if let Notice::Waiting(t) = n { Some(t.as_str()) } else { None })
    }

    fn marks_sent(&self) -> usize {
        self.kinds.iter().filter(|(_, kind)| *kind == Kind::Mark).count()
    }
}

fn whole(bench: &Bench, index: u8) -> DirtyAddition {
    DirtyAddition { members: MemberSet::only(member(index)), offset: 0, length: bench.spec.size }
}

#[test]
fn a_store_that_was_put_back_between_two_clients_is_out_and_wholly_stale() {
    for restored in [0, 1] {
        let mut bench = Bench::new(2, |_| {});
        bench.write(1);
        bench.detach();
        let old = bench.copy(restored);
        bench.next_client();
        bench.write(2);
        bench.detach();
        bench.put(restored, old);
        bench.prepares = false;
        bench.next_client();
        let id = u8::try_from(restored).unwrap();
        assert!(bench.client.is_active());
        assert_eq!(bench.regressed(), [member(id)]);
        assert_eq!(bench.state(member(id)), Some(MemberState::Out));
        assert_eq!(bench.state(member(1 - id)), Some(MemberState::Clean));
        assert!(bench.additions.contains(&whole(&bench, id)), "{:?}", bench.additions);
    }
}

#[test]
fn a_store_that_was_put_back_while_a_client_is_attached_comes_back_wholly_stale() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    let old = bench.copy(1);
    bench.write(2);
    bench.pass(Duration::from_secs(20));
    bench.set_up(1, false);
    bench.put(1, old);
    bench.additions.clear();
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.regressed(), [member(1)]);
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    assert!(bench.additions.contains(&whole(&bench, 1)), "{:?}", bench.additions);
}

/// Found by seed 3017.
#[test]
fn what_a_rejoin_that_was_given_up_had_found_is_not_forgotten() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    let old = bench.copy(1);
    bench.write(2);
    bench.pass(Duration::from_secs(20));
    bench.set_up(1, false);
    bench.put(1, old);
    bench.prepares = false;
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
    bench.additions.clear();
    bench.prepares = true;
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    assert!(bench.additions.contains(&whole(&bench, 1)), "{:?}", bench.additions);
    assert_eq!(bench.regressed(), [member(1)], "it is said once");
}

#[test]
fn a_member_that_is_restarted_as_it_was_is_not_said_to_have_gone_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    bench.set_up(1, false);
    bench.additions.clear();
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    assert_eq!((bench.regressed().len(), bench.additions.len()), (0, 0));
}

#[test]
fn a_member_that_did_not_hear_of_the_last_mark_or_view_is_not_said_to_have_gone_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    let before = bench.copy(1);
    // The client dies when member 0 has the mark, and member 1 has not.
    bench.marks_answered = false;
    bench.write(2);
    bench.pass(Duration::from_secs(5));
    bench.marks[0] = bench.marks[0].next();
    bench.put(1, before);
    bench.marks_answered = true;
    bench.next_client();
    assert!(bench.client.is_active());
    assert_eq!(bench.regressed(), []);
    assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
}

#[test]
fn nobody_goes_on_without_proof_that_nothing_later_is_lost_with_a_store_that_went_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    let old = bench.copy(1);
    bench.pass(Duration::from_secs(20));
    // The client dies: it may have gone on with member 1 alone.
    bench.put(1, old);
    bench.next_client();
    assert!(!bench.client.is_active());
    let text = bench.waits_for().unwrap();
    assert!(text.contains("member 1 was at epoch 1") && text.contains("--force-from 0"), "{text}");
    let epochs = bench.epochs.clone();
    bench.pass(Duration::from_secs(30));
    assert_eq!(bench.epochs, epochs, "it waits without proposing epochs");
    bench.start_client(|c| {
        c.takeover = true;
        c.force_from = Some(Force { member: member(0), decided: SystemTime::now() });
    });
    assert!(bench.client.is_active());
    assert_eq!(bench.state(member(0)), Some(MemberState::Clean));
}

#[test]
fn the_last_current_store_does_not_serve_when_it_went_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    bench.write(1);
    let old = bench.copy(0);
    bench.pass(Duration::from_secs(20));
    bench.set_up(0, false);
    bench.put(0, old);
    bench.up = vec![true, true];
    bench.pass(Duration::from_secs(10));
    assert!(!bench.client.is_active());
    assert!(bench.waits_for().unwrap().contains("no other member is current"), "{:?}", bench.waits_for());
}

/// Found by seed 805: member 0 was Clean alone in view 4, went back, and member 1 had a view in which both are.
#[test]
fn a_member_of_an_earlier_view_is_no_proof_for_the_client_that_made_a_later_one() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    let old = bench.copy(0);
    bench.set_up(1, false);
    bench.write(2);
    bench.set_up(0, false);
    bench.put(0, old);
    bench.up = vec![true, true];
    bench.pass(Duration::from_secs(10));
    assert!(!bench.client.is_active(), "write 2 was on member 0 alone");
}

#[test]
fn a_view_that_says_so_and_was_not_committed_is_said_again() {
    let mut bench = Bench::new(3, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    let before = (bench.copy(0), bench.copy(1));
    // Member 2 was found to have gone back, was told so with the view of its rejoin, and the client died.
    bench.attested[2].regressed = MemberSet::only(member(2));
    let lost = bench.views[2].step(ViewStep::Lose(MemberSet::only(member(2))), bench.client.epoch).unwrap();
    bench.views[2] = lost.step(ViewStep::Rejoin(member(2)), bench.client.epoch).unwrap();
    bench.put(0, before.0);
    bench.put(1, before.1);
    bench.prepares = false;
    bench.next_client();
    assert!(bench.client.is_active());
    assert!(bench.additions.contains(&whole(&bench, 2)), "{:?}", bench.additions);
    assert_eq!(bench.state(member(2)), Some(MemberState::Out));
}

#[test]
fn a_member_that_is_away_misses_what_the_intents_of_the_others_tell() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    bench.write(1);
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
    let chunk_size = bench.spec.chunk_size.bytes();
    bench.intents[0] = vec![(crate::pool::Chunk(3), 2)];
    bench.next_client();
    assert!(bench.client.is_active());
    // Its store may be put back before it returns, to before a write that no mark covers.
    let missed =
        DirtyAddition { members: MemberSet::only(member(1)), offset: 3 * chunk_size, length: 2 * chunk_size };
    assert!(bench.additions.contains(&missed), "{:?}", bench.additions);
}

#[test]
fn marks_follow_writes_and_end_with_them() {
    let mut bench = Bench::new(2, |_| {});
    bench.pass(Duration::from_secs(60));
    let before = bench.marks_sent();
    bench.pass(Duration::from_secs(60));
    assert_eq!(bench.marks_sent(), before, "nothing happened");
    bench.write(1);
    bench.pass(Duration::from_secs(60));
    assert_eq!(
        bench.marks_sent(),
        before + 4,
        "one that covers the write, and one that tells of it, to two members"
    );
    for i in 0..100 {
        bench.write(2 + i);
        bench.pass(Duration::from_millis(100));
    }
    assert!(bench.marks_sent() <= before + 10, "not more often than every five seconds");
}

#[test]
fn a_client_leaves_when_a_mark_covers_what_it_wrote() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.marks_answered = false;
    bench.client.apply(Event::Detach, bench.now);
    bench.run();
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.client.over(), None);
    assert_eq!(bench.client.status().state, "detaching");
    bench.marks_answered = true;
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.client.over(), Some(&OverReason::Detached), "silent members are lost, as always");
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.detach();
    for node in [0, 1] {
        let known = bench.attested[node].of(member(1 - u8::try_from(node).unwrap()));
        assert_eq!(*known, bench.position(1 - node), "it is told with the detach");
    }
}

#[test]
fn a_member_is_promoted_when_a_mark_covers_what_it_reported() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    bench.write(1);
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    bench.marks_answered = false;
    bench.synced(member(1));
    bench.pass(Duration::from_secs(1));
    assert_eq!(
        bench.state(member(1)),
        Some(MemberState::Syncing),
        "its store could go back to before the report"
    );
    bench.answer_marks();
    assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
}

#[test]
fn a_member_that_does_not_answer_marks_is_lost() {
    let mut bench = Bench::new(2, |_| {});
    bench.marks_answered = false;
    bench.write(1);
    bench.pass(Duration::from_secs(6) + bench.client.config.leg_timeout);
    let is_lost =
        |n: &Notice| matches!(n, Notice::LinkLost(_, _, text) if text.contains("mark was not answered"));
    assert!(bench.notices.iter().any(is_lost), "{:?}", bench.notices);
}

#[test]
fn of_two_nodes_that_show_one_store_the_one_that_the_specification_names_is_used() {
    let copy = Address::tcp("copy", 2);
    let mut bench = Bench::new(2, |_| {});
    bench.notices.clear();
    bench.start_client_at(&[copy.clone(), bench.spec.members[0].address.clone()], |c| c.takeover = true);
    bench.pass(Duration::from_secs(10));
    assert!(bench.client.is_active());
    let leg = bench.client.legs[1].and_then(|id| bench.client.link(id)).map(|l| l.address.clone());
    assert_eq!(leg, Some(bench.spec.members[1].address.clone()));
    let is_named = |n: &Notice| matches!(n, Notice::Duplicate(_, Some(used), ..) if *used != copy);
    assert!(bench.notices.iter().any(is_named), "{:?}", bench.notices);
}

#[test]
fn of_two_nodes_that_show_one_store_at_other_addresses_neither_is_used() {
    let mut bench = Bench::new(2, |_| {});
    // The node at the member's own address is gone.
    let seeds: Vec<_> = ["copy", "copied"].map(|host| Address::tcp(host, 2)).to_vec();
    let seeds = [seeds, vec![bench.spec.members[0].address.clone()]].concat();
    bench.gone = Some(bench.spec.members[1].address.clone());
    bench.notices.clear();
    bench.start_client_at(&seeds, |c| c.takeover = true);
    bench.pass(Duration::from_secs(1));
    assert!(!bench.client.is_active());
    let is_named = |n: &Notice| matches!(n, Notice::Duplicate(_, None, ..));
    assert!(bench.notices.iter().any(is_named), "{:?}", bench.notices);
}

#[test]
fn a_store_is_used_at_another_address_when_it_is_not_where_it_should_be() {
    let mut bench = Bench::new(2, |_| {});
    bench.gone = Some(bench.spec.members[1].address.clone());
    let seeds = [Address::tcp("copy", 2), bench.spec.members[0].address.clone()];
    bench.start_client_at(&seeds, |c| c.takeover = true);
    bench.pass(Duration::from_secs(1));
    assert!(bench.client.is_active());
}

/// Found by seed 13959: the write was on one member alone when another one rejoined, pulled it, and the client died.
#[test]
fn a_write_that_is_refused_during_the_barrier_of_a_rejoin_is_repeated_before_it_ends() {
    let mut bench = Bench::new(3, |c| c.data_digest = DataDigest::Detect);
    bench.set_up(2, false);
    bench.submit(1, Operation::Write, 0, 4096);
    bench.set_up(2, true);
    // Requests are held for a short time only.
    for _ in 0..40 {
        if bench.client.rejoin_phase() != Some((member(2), "quiescing")) {
            bench.pass(Duration::from_millis(50));
        }
    }
    assert_eq!(bench.client.rejoin_phase(), Some((member(2), "quiescing")));
    bench.answer(Some(member(0)), Status::Ok);
    bench.answer(Some(member(1)), Status::DigestDiffers);
    assert_eq!(
        bench.client.rejoin_phase(),
        Some((member(2), "quiescing")),
        "member 0 has what member 1 has not"
    );
    assert_eq!(bench.sent.len(), 2, "it is repeated at once");
    bench.answer_all();
    assert_eq!(bench.state(member(2)), Some(MemberState::Syncing));
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
}

/// Found by seed 1109.
#[test]
fn a_store_that_went_back_to_before_the_others_joined_is_not_believed_when_they_are_away() {
    let mut bench = Bench::new(2, |_| {});
    let store = bench.views[0].members[0].store;
    let alone = View { epoch: bench.epochs[0], ..View::initial([(member(0), store)]) };
    let spec = PoolSpec { members: bench.spec.members[..1].to_vec(), ..bench.spec.clone() };
    let old = Store(alone, spec, bench.epochs[0], Mark(0), Attested::default(), false);
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    bench.put(0, old);
    bench.next_client();
    assert!(bench.waits_for().is_some_and(|t| t.contains("went back in time")), "{:?}", bench.notices);
    // The member that knows better is away: what it said is not.
    bench.set_up(1, false);
    bench.pass(Duration::from_secs(20));
    assert!(!bench.client.is_active(), "{:?}", bench.notices);
}

/// Found by seed 1957.
#[test]
fn what_a_rejoin_had_found_is_not_forgotten_with_its_attachment() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    let old = bench.copy(1);
    bench.write(2);
    bench.pass(Duration::from_secs(20));
    bench.set_up(1, false);
    bench.put(1, old);
    bench.prepares = false;
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(20));
    assert_eq!((bench.regressed(), bench.state(member(1))), (vec![member(1)], Some(MemberState::Out)));
    // The rejoin ends with the attachment, before any view says that the member misses the whole pool.
    bench.set_up(1, false);
    bench.additions.clear();
    bench.attach_anew();
    bench.prepares = true;
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    assert!(bench.additions.contains(&whole(&bench, 1)), "{:?}", bench.additions);
}

/// Found by seed 6165.
#[test]
fn a_member_whose_promotion_was_not_committed_does_not_replace_the_one_that_went_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    let old = bench.copy(0);
    bench.set_up(1, false);
    bench.write(2);
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    // The promotion reaches member 1 alone.
    let view = &mut bench.views[1];
    view.number.0 += 1;
    view.members[1].state = MemberState::Clean;
    bench.set_up(0, false);
    bench.put(0, old);
    bench.set_up(0, true);
    bench.pass(Duration::from_secs(20));
    assert!(!bench.client.is_active(), "{:?}", bench.notices);
    assert!(bench.waits_for().is_some_and(|t| t.contains("went back in time")), "{:?}", bench.notices);
}

/// Found by seed 869: a finding outlived the store that it was about.
#[test]
fn the_right_store_is_not_copied_over_when_it_is_put_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    let old = bench.copy(1);
    bench.write(2);
    bench.pass(Duration::from_secs(20));
    bench.set_up(1, false);
    let right = bench.copy(1);
    bench.put(1, old);
    bench.prepares = false;
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.regressed(), [member(1)]);
    bench.set_up(1, false);
    bench.put(1, right);
    bench.prepares = true;
    bench.additions.clear();
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    assert!(!bench.additions.contains(&whole(&bench, 1)), "{:?}", bench.additions);
}

#[test]
fn a_hello_from_before_another_client_moved_on_is_no_sign_of_a_store_that_went_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.write(1);
    bench.pass(Duration::from_secs(20));
    bench.up[1] = false;
    bench.next_client();
    assert!(bench.waits_for().is_some(), "member 0 has said hello, member 1 is awaited");
    // Another client attached to both meanwhile.
    bench.epochs.iter_mut().for_each(|epoch| epoch.0 += 1);
    let position = Position::new(bench.epochs[0], &bench.views[0], bench.marks[0]);
    bench.attested[1].note(member(0), &position);
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(5));
    let alarms = bench.notices.iter().filter(|n| matches!(n, Notice::Waiting(t) if t.contains("went back")));
    assert_eq!(alarms.count(), 0, "{:?}", bench.notices);
    assert!(bench.client.is_active());
}
