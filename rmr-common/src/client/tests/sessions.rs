//! Attaching and rejoining: what members bring along, who is believed after a death, and who gives way to whom.

use super::*;

#[test]
fn what_a_member_has_of_an_earlier_attachment_is_looked_at_again_after_a_rejoin_that_broke_off() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    // Another attachment, of which the member has heard nothing. Nobody else knows of a write that it has.
    bench.attach_anew();
    bench.slots[1] = vec![written(7, 3)];
    bench.additions.clear();
    bench.prepares = false;
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.epochs[1], bench.client.epoch, "it has the epoch");
    assert!(bench.views[1].epoch < bench.client.epoch, "and no view of it");
    bench.set_up(1, false);
    bench.prepares = true;
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    let missed = DirtyAddition { members: MemberSet::only(member(1)), offset: 3 * 4096, length: 4096 };
    assert_eq!(bench.additions, [missed]);
}

#[test]
fn a_client_that_waits_for_a_member_finds_out_that_another_one_took_it_out() {
    let mut bench = Bench::new(2, |_| ());
    bench.up[1] = false;
    bench.start_client(|_| ());
    bench.pass(Duration::from_secs(3));
    assert!(!bench.client.is_active(), "member 1 is Clean, and may know of more");
    // Somebody who reached both goes on without member 1, whose disk is then replaced.
    let next = bench.views[0].step(ViewStep::Lose(MemberSet::only(member(1))), bench.epochs[0].next());
    bench.views[0] = next.unwrap();
    bench.epochs[0] = bench.epochs[0].next();
    bench.pass(Duration::from_secs(3));
    assert!(bench.client.is_active());
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
}

#[test]
fn a_name_that_two_pools_have_is_refused_whichever_node_answers_first() {
    let by_name = |bench: &mut Bench| {
        let seeds: Vec<_> = bench.spec.members.iter().map(|m| m.address.clone()).collect();
        let mut config = Config::new(ClientId::from_bytes([2; 16]), "by name");
        config.attach_grace = Duration::ZERO;
        let selector = PoolSelector::Name(bench.spec.name.clone());
        bench.client = Client::new(config, selector, &seeds, bench.now);
        bench.nodes.clear();
        bench.run();
    };
    for late in [0, 1] {
        let mut bench = Bench::new(2, |_| {});
        // A pool of one member on each node, both of one name.
        for node in 0..2 {
            bench.specs[node].members.retain(|m| m.id == member(u8::try_from(node).unwrap()));
            bench.views[node].members.retain(|m| m.id == member(u8::try_from(node).unwrap()));
        }
        let other = PoolId::random();
        bench.specs[1].id = other;
        bench.slow = vec![late];
        by_name(&mut bench);
        assert!(!bench.client.is_active(), "one node has not said yet what it has of that name");
        bench.connect();
        let State::Over(OverReason::Conflict(text)) = &bench.client.state else { panic!("not refused") };
        for id in [bench.spec.id, other] {
            assert!(text.contains(&id.to_string()), "{text}");
        }
    }
    // A node that cannot be reached keeps nobody waiting beyond its first attempt, and by uuid the other pool is of no concern.
    let mut bench = Bench::new(2, |_| {});
    bench.specs[0].members.truncate(1);
    bench.views[0].members.truncate(1);
    bench.up[1] = false;
    by_name(&mut bench);
    bench.pass(Duration::from_secs(1));
    assert!(bench.client.is_active());
}

#[test]
fn sequences_go_on_above_those_that_a_member_brings_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    bench.attach_anew();
    bench.slots[1] = vec![written(700, 3)];
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    bench.submit(1, Operation::Write, 0, 4096);
    assert!(bench.sent[0].1.sequence > Sequence(700), "{:?}", bench.sent[0].1.sequence);
}

#[test]
fn sequences_of_a_forced_attachment_go_on_above_those_that_the_member_remembers() {
    let mut bench = Bench::new(2, |_| {});
    bench.slots[0] = vec![written(500, 0)];
    let force = Force { member: member(0), decided: std::time::UNIX_EPOCH };
    bench.start_client(|c| c.force_from = Some(force));
    bench.submit(1, Operation::Write, 0, 4096);
    assert!(bench.sent[0].1.sequence > Sequence(500), "{:?}", bench.sent[0].1.sequence);
}

#[test]
fn a_write_that_was_given_up_holds_the_watermark_until_members_were_made_to_agree() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Write, 0, 4096);
    bench.admits = false;
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.done, [(Token(1), Err(IoError::Cancelled))]);
    assert_eq!((bench.client.status().state, &bench.watermarks), ("attaching", &vec![Sequence(0); 2]));
    bench.admits = true;
    bench.sent.clear();
    bench.attach_anew();
    bench.submit(2, Operation::Write, 0, 4096);
    bench.answer_all();
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.watermarks, vec![bench.client.sequence; 2]);
}

#[test]
fn a_write_is_not_waiting_for_a_member_that_was_lost_and_then_removed() {
    let mut bench = Bench::new(3, |_| {});
    bench.submit(1, Operation::Write, 0, 4096);
    bench.submit(2, Operation::Flush, 0, 0);
    bench.set_up(1, false);
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
    bench.command(crate::pool::Command::Remove { member: member(1), store: None });
    bench.pass(Duration::from_millis(300));
    assert_eq!(bench.state(member(1)), None, "it is removed, with the write in flight to the others");
    assert!(bench.done.is_empty());
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(())), (Token(2), Ok(()))]);
}

/// Both members were attached to by a client that died; these are their slot tables.
fn after_a_death(slots: [Vec<SlotEntry>; 2]) -> Bench {
    let mut bench = Bench::new(2, |_| {});
    bench.slots = slots.to_vec();
    bench.additions.clear();
    bench.attach_anew();
    bench
}

#[test]
fn what_a_member_brought_back_counts_until_the_view_of_its_rejoin_is_committed() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    bench.attach_anew();
    bench.set_up(1, true);
    let before = (bench.views[0].clone(), bench.specs[0].clone());
    assert_eq!(before.0.state(member(1)), Some(MemberState::Out));
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    // As if the view had reached the Syncing member alone, which has a write of an earlier client, and has that on record.
    (bench.views[0], bench.specs[0]) = before;
    bench.never_had_more(0);
    bench.slots = vec![vec![written(900, 6)], vec![written(7, 3), written(900, 6)]];
    bench.known[0] = Sequence(1000);
    bench.additions.clear();
    bench.attach_anew();
    let missed = DirtyAddition { members: MemberSet::only(member(1)), offset: 3 * 4096, length: 4096 };
    assert!(bench.additions.contains(&missed), "{:?}", bench.additions);
}

#[test]
fn after_a_death_in_a_view_change_only_those_stay_clean_that_heard_of_the_loss() {
    let mut bench = Bench::new(3, |_| {});
    let lost = MemberSet::only(member(2));
    // What member 2 had not flushed was told to member 1, and then the client died.
    bench.set_up(2, false);
    bench.views[0] = View { number: ViewNumber(bench.views[0].number.0 - 1), ..bench.views[0].clone() };
    bench.views[0].members[2].state = MemberState::Clean;
    bench.never_had_more(0);
    bench.prepares = false;
    bench.start_client(|_| {});
    assert!(bench.client.is_active());
    let view = bench.client.view.clone().unwrap();
    assert_eq!(view.state(member(1)), Some(MemberState::Clean));
    assert_eq!(
        view.state(member(0)),
        Some(MemberState::Out),
        "{view}: it does not know what member 2 misses"
    );
    assert!(!bench.additions.iter().any(|a| a.members.contains(member(0)) && a.length > 4096));

    // When nobody is left who was told, member 2 may miss anything.
    let mut bench = Bench::new(3, |_| {});
    bench.set_up(2, false);
    bench.views[0] = View { number: ViewNumber(bench.views[0].number.0 - 1), ..bench.views[0].clone() };
    bench.views[0].members[2].state = MemberState::Clean;
    bench.never_had_more(0);
    // Member 0 is ahead, so that member 1 is brought in line with it.
    bench.slots[0] = vec![written(900, 6)];
    bench.prepares = false;
    bench.additions.clear();
    bench.start_client(|_| {});
    let view = bench.client.view.clone().unwrap();
    assert_eq!(
        (view.state(member(0)), view.state(member(1))),
        (Some(MemberState::Clean), Some(MemberState::Out))
    );
    let all = DirtyAddition { members: lost, offset: 0, length: bench.specs[0].size };
    assert!(bench.additions.contains(&all), "{:?}", bench.additions);
}

#[test]
fn a_member_whose_disk_failed_a_write_is_not_the_reference_when_another_one_carried_it_out() {
    let failed = SlotEntry { failed: true, ..written(7, 3) };
    let later = written(8, 4);
    for (torn, tables) in [
        (0, [vec![failed], vec![written(7, 3)]]),
        (1, [vec![written(7, 3)], vec![failed]]),
        // The newer write counts for nothing.
        (0, [vec![failed, later], vec![written(7, 3)]]),
        // Nor does it help that the other one has nothing.
        (0, [vec![failed], vec![]]),
    ] {
        let bench = after_a_death(tables);
        let missed = DirtyAddition { members: MemberSet::only(member(torn)), offset: 3 * 4096, length: 4096 };
        assert!(bench.additions.contains(&missed), "{torn}: {:?}", bench.additions);
        assert!(bench.additions.iter().all(|a| a.members == missed.members), "{:?}", bench.additions);
        assert_eq!(bench.state(member(1 - torn)), Some(MemberState::Clean));
    }
}

#[test]
fn a_write_that_the_disks_of_two_members_failed_is_not_taken_for_the_same() {
    let failed = SlotEntry { failed: true, ..written(7, 3) };
    let mut bench = after_a_death([vec![failed], vec![failed]]);
    let missed = DirtyAddition { members: MemberSet::only(member(1)), offset: 3 * 4096, length: 4096 };
    // It comes with the first view, and once more with the rejoin.
    bench.additions.dedup();
    assert_eq!(bench.additions, [missed]);
}

#[test]
fn a_client_whose_attach_was_cut_short_by_another_gives_that_one_time_to_come_through() {
    let mut bench = Bench::new(2, |_| {});
    bench.admits = false;
    bench.restart_all(&[1, 1]);
    assert_eq!(bench.client.status().state, "attaching");
    // The nodes took another client in meanwhile.
    bench.admits = true;
    bench.epochs = vec![bench.client.epoch.next(); 2];
    bench.restart_all(&[1, 1]);
    assert!(!bench.client.is_active(), "it displaces the other one at once");
    bench.pass(bench.client.config.leg_timeout);
    assert!(bench.client.is_active(), "the other one is gone, and it waits for ever");
}

#[test]
fn a_client_that_is_told_that_another_attached_ends_and_leaves_no_view_in_its_way() {
    let told = |bench: &mut Bench, epoch| {
        let pool = PoolId::from_bytes([9; 16]);
        let header = MessageHeader { epoch, ..MessageHeader::new(Kind::Goodbye, pool) };
        let header = header.reply(Kind::Goodbye, Status::StaleEpoch);
        bench.client.apply(Event::Message(LinkId(0), &header, &[]), bench.now);
        bench.run();
    };
    let mut bench = Bench::new(2, |_| {});
    let (epoch, views) = (bench.client.epoch, bench.client.counters.views);
    told(&mut bench, epoch.next());
    assert_eq!(bench.client.over(), Some(&OverReason::Fenced(epoch.next())));
    assert_eq!(bench.client.counters.views, views);
    assert!(bench.additions.is_empty(), "{:?}", bench.additions);
    // Of an attachment before its own it is no news, and the member is lost like any that closes the connection.
    let mut bench = Bench::new(2, |_| {});
    told(&mut bench, epoch);
    assert_eq!((bench.client.over(), bench.state(member(0))), (None, Some(MemberState::Out)));
}

#[test]
fn a_member_that_comes_back_is_told_since_when_the_client_has_the_pool() {
    let mut bench = Bench::new(2, |_| {});
    assert_eq!(bench.held_ms, [0, 0]);
    bench.pass(Duration::from_secs(60));
    bench.set_up(1, false);
    bench.pass(Duration::from_secs(2));
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    let told = *bench.held_ms.last().unwrap();
    assert!((62_000..=64_000).contains(&told), "{told}");
    // Another client begins with nothing.
    bench.start_client(|config| config.takeover = true);
    assert_eq!(bench.held_ms.last(), Some(&0));
}
