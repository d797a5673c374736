//! Data that arrives with another digest than it was sent with.

use super::*;

#[test]
fn a_write_that_one_leg_got_with_other_data_is_repeated_on_all_from_a_copy_under_another_sequence() {
    let mut bench = Bench::new(2, |c| c.data_digest = DataDigest::Detect);
    bench.submit(1, Operation::Write, 0, 4096);
    let first = bench.sent[0].1.sequence;
    bench.answer(Some(member(0)), Status::Ok);
    bench.answer(Some(member(1)), Status::DigestDiffers);
    assert!(bench.done.is_empty(), "one leg has not got it");
    let sent: Vec<_> = bench.sent.iter().map(|(m, h)| (*m, h.kind, h.slot, h.sequence > first)).collect();
    let slot = crate::pool::Slot(0);
    assert_eq!(sent, [0, 1].map(|m| (member(m), Kind::Write, slot, true)));
    assert!(bench.client.is_bounced(slot));
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert!(!bench.client.is_bounced(slot));
    let counters = bench.client.status().counters;
    assert_eq!((counters.digest_mismatches, counters.bounced), (1, 1));
}

#[test]
fn a_copy_that_arrives_with_another_digest_costs_its_leg() {
    let mut bench = Bench::new(2, |c| c.data_digest = DataDigest::Bounce);
    bench.submit(1, Operation::Write, 0, 4096);
    bench.answer(Some(member(0)), Status::Ok);
    bench.answer(Some(member(1)), Status::DigestDiffers);
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
}

#[test]
fn a_read_with_another_digest_is_asked_for_once_more_before_it_counts_against_its_leg() {
    let mut bench = Bench::new(2, |c| c.data_digest = DataDigest::Detect);
    bench.submit(1, Operation::Read, 0, 4096);
    let home = bench.answer(None, Status::DigestDiffers);
    assert_eq!((bench.sent.len(), bench.sent[0].0), (1, home), "the guest may have written there");
    bench.answer(Some(home), Status::DigestDiffers);
    assert_ne!(bench.sent[0].0, home);
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert_eq!(bench.state(home), Some(MemberState::Out));
}
