//! Views, epochs and recovery, explored exhaustively to a bounded depth (`docs/model.md`).
//!
//! `make model` goes further: `RMR_MODEL=members,writes,crashes,cuts,power,epoch,view,takeover`.

mod pool;

use pool::{Bug, Limits, Pool};
use stateright::{Checker, HasDiscoveries, Model};

const SMALL: Limits =
    Limits { members: 2, writes: 1, crashes: 1, cuts: 0, power: 0, epoch: 2, view: 5, takeover: true };

/// A client dies after one of three write-back members has lost power.
const POWER: Limits = Limits { members: 3, power: 1, view: 4, takeover: false, ..SMALL };

/// How the properties begin that must hold always.
const RULES: [&str; 4] = ["one client", "a completed write", "what an absent member", "whoever"];

fn check(bug: Bug, limits: Limits) -> impl Checker<Pool> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    Pool { limits, bug }
        .checker()
        .threads(threads)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join()
}

fn assert_holds(name: &str, limits: Limits) {
    let begun = std::time::Instant::now();
    let checker = check(Bug::None, limits);
    println!(
        "{name}: {} states, {} different, depth {}, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    let broken = checker.discoveries().into_iter().find(|(name, _)| is_rule(name));
    let words = broken.map(|(name, path)| {
        let state = path.last_state().to_string();
        format!("not \"{name}\" after {:?}:\n{state}", path.into_actions())
    });
    assert_eq!(words, None);
    checker.assert_properties();
}

fn is_rule(name: &str) -> bool {
    RULES.iter().any(|rule| name.starts_with(rule))
}

fn assert_found(bug: Bug, limits: Limits) {
    let checker = check(bug, limits);
    let found = checker.discoveries().into_iter().find(|(name, _)| is_rule(name));
    let words = found.map(|(name, path)| format!("not \"{name}\" after {:?}", path.into_actions()));
    println!("{bug:?}: {words:?}");
    assert!(words.is_some(), "{bug:?} breaks no rule in {} states", checker.unique_state_count());
}

#[test]
fn two_members_and_two_clients_that_take_over() {
    assert_holds("2 members, takeover", SMALL);
}

#[test]
fn two_members_and_two_clients_that_do_not() {
    assert_holds("2 members", Limits { takeover: false, ..SMALL });
}

macro_rules! mistakes {
    ($($test:ident $bug:ident $limits:expr;)+) => {
        $(#[test]
        fn $test() {
            assert_found(Bug::$bug, $limits);
        })+
    };
}

mistakes! {
    one_clean_member_is_not_enough OneCleanMemberWillDo SMALL;
    the_number_alone_does_not_order_views OrderByNumber SMALL;
    an_epoch_is_for_one_client EqualEpoch SMALL;
    a_view_is_durable_before_it_is_answered ViewNotDurable SMALL;
    a_view_needs_all_its_active_members CommitWithoutAll SMALL;
    a_promotion_that_is_not_committed_is_taken_back PromotionKept SMALL;
    an_attach_takes_back_what_a_clean_member_has_not_heard_of PromotionKeptByAttach SMALL;
    what_a_lost_member_missed_comes_with_the_view NothingRecorded SMALL;
    a_member_that_has_not_heard_of_a_loss_does_not_stay_clean DeafStaysClean POWER;
}

#[test]
#[ignore = "RMR_MODEL says how far: make model"]
fn what_the_environment_asks_for() {
    let text =
        std::env::var("RMR_MODEL").expect("RMR_MODEL: members,writes,crashes,cuts,power,epoch,view,takeover");
    let numbers: Vec<u8> =
        text.split(',').map(|n| n.parse().expect("RMR_MODEL: a list of numbers")).collect();
    let [members, writes, crashes, cuts, power, epoch, view, takeover] = numbers[..] else {
        return assert_eq!(
            text, "",
            "RMR_MODEL: expected members,writes,crashes,cuts,power,epoch,view,takeover"
        );
    };
    let (epoch, view, takeover) = (epoch.into(), view.into(), takeover != 0);
    assert_holds(&text, Limits { members, writes, crashes, cuts, power, epoch, view, takeover });
}
