//! Views, epochs and recovery, explored exhaustively to a bounded depth (`docs/model.md`).
//!
//! `make model` goes further: `RMR_MODEL` has rows of `members,writes,crashes,cuts,power,epoch,view,takeover`.

mod pool;
mod rules;
mod state;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use pool::{Bug, Limits, Pool};
use state::{Nameless, State, renamings};
use stateright::{Checker, HasDiscoveries, Model};

const SMALL: Limits =
    Limits { members: 2, writes: 1, crashes: 1, cuts: 0, power: 0, epoch: 2, view: 5, takeover: true };

/// A member or a client dies, and a link is cut.
const CUT: Limits = Limits { cuts: 1, ..SMALL };

/// One of three write-back members loses power, and another member or the client dies.
const POWER: Limits = Limits { members: 3, power: 1, takeover: false, ..SMALL };

fn explore(pool: Pool) -> impl Checker<Pool> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    pool.checker().threads(threads).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join()
}

/// The rule that does not hold, and how it came to that.
fn broken(checker: &impl Checker<Pool>) -> Option<String> {
    let (rule, path) = checker.discoveries().into_iter().next()?;
    let state = path.last_state().state;
    Some(format!("not \"{rule}\" after {:?}:\n{state}", path.into_actions()))
}

fn assert_holds(name: &str, limits: Limits) {
    let begun = std::time::Instant::now();
    let checker = explore(Pool::new(Bug::None, limits));
    println!(
        "{name}: {} states, {} different, depth {}, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    assert_eq!(broken(&checker), None);
    assert_eq!(checker.model().reached.missing(&limits), [], "what it can come to, and has not");
}

fn assert_found(bug: Bug, limits: Limits) {
    let checker = explore(Pool::new(bug, limits));
    let words = broken(&checker);
    println!("{bug:?}: {words:?}");
    assert!(words.is_some(), "{bug:?} breaks no rule in {} states", checker.unique_state_count());
}

#[test]
fn two_members_and_two_clients_that_take_over() {
    assert_holds("2,1,1,0,0,2,5,1", SMALL);
}

#[test]
fn two_members_and_two_clients_that_do_not() {
    assert_holds("2,1,1,0,0,2,5,0", Limits { takeover: false, ..SMALL });
}

#[test]
fn two_members_with_a_crash_and_a_cut() {
    assert_holds("2,1,1,1,0,2,5,1", CUT);
}

#[test]
fn two_members_with_two_cuts_and_no_crash() {
    assert_holds("2,1,0,2,0,2,5,1", Limits { crashes: 0, cuts: 2, ..SMALL });
}

#[test]
fn two_members_with_a_loss_of_power_and_a_cut() {
    assert_holds("2,1,0,1,1,2,5,1", Limits { crashes: 0, cuts: 1, power: 1, ..SMALL });
}

#[test]
fn three_members_with_a_crash_and_a_cut() {
    assert_holds("3,1,1,1,0,2,5,0", Limits { members: 3, takeover: false, ..CUT });
}

#[test]
fn three_members_with_a_crash_a_cut_and_a_client_that_takes_over() {
    assert_holds("3,1,1,1,0,2,4,1", Limits { members: 3, view: 4, ..CUT });
}

#[test]
fn three_members_with_a_loss_of_power() {
    assert_holds("3,1,1,0,1,2,5,0", POWER);
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
    what_was_started_anew_hands_out_nothing SourceStartedAnew POWER;
}

fn print(state: State) -> u64 {
    let mut hasher = DefaultHasher::new();
    Nameless { state, is_nameless: true }.hash(&mut hasher);
    hasher.finish()
}

fn successors(pool: &Pool, state: &Nameless) -> Vec<State> {
    let mut actions = Vec::new();
    pool.actions(state, &mut actions);
    actions.into_iter().filter_map(|a| Some(pool.next_state(state, a)?.state)).collect()
}

#[test]
fn what_may_happen_does_not_depend_on_names() {
    let pool = Pool::new(Bug::None, POWER);
    let mut pending = pool.init_states();
    let mut seen: HashSet<_> = pending.iter().map(|s| print(s.state)).collect();
    while let Some(one) = pending.pop() {
        let next = successors(&pool, &one);
        let prints: HashSet<_> = next.iter().map(|s| print(*s)).collect();
        let is_sample = print(one.state).is_multiple_of(8);
        for names in renamings(POWER.members).iter().filter(|_| is_sample) {
            let other = Nameless { state: one.state.renamed(*names), ..one };
            assert_eq!(print(other.state), print(one.state), "{names:?} of\n{}", one.state);
            let others: HashSet<_> = successors(&pool, &other).into_iter().map(print).collect();
            assert_eq!(others, prints, "{names:?} of\n{}", one.state);
        }
        let new = next.into_iter().filter(|s| seen.insert(print(*s)));
        pending.extend(new.map(|state| Nameless { state, ..one }));
    }
    assert!(seen.len() > 50_000, "{} states were met", seen.len());
}

#[test]
#[ignore = "RMR_MODEL says how far: make model"]
fn what_the_environment_asks_for() {
    const WANTED: &str = "RMR_MODEL: rows of members,writes,crashes,cuts,power,epoch,view,takeover";
    for row in std::env::var("RMR_MODEL").expect(WANTED).split_whitespace() {
        let numbers: Vec<u8> = row.split(',').map(|n| n.parse().expect(WANTED)).collect();
        let [members, writes, crashes, cuts, power, epoch, view, takeover] = numbers[..] else {
            return assert_eq!(row, "", "{WANTED}");
        };
        assert!((2..=3).contains(&members), "members: expected 2 or 3, found {members}");
        let (epoch, view, takeover) = (epoch.into(), view.into(), takeover != 0);
        assert_holds(row, Limits { members, writes, crashes, cuts, power, epoch, view, takeover });
    }
}
