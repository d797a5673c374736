//! What a command still needs: a pure function of the committed view and its specification.

use crate::pool::{
    Address, Command, MAX_MEMBERS, MemberAddress, MemberId, MemberSet, MemberSpec, MemberState, PoolSpec,
    Refusal, StoreId, View, ViewStep,
};
use crate::wire::HelloReply;

/// A member leaves with nothing lost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Leave {
    pub(super) member: MemberId,
    /// The pool as it is then.
    pub(super) spec: PoolSpec,
}

/// What a command still needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Nothing.
    Done,
    /// It cannot be done.
    Refuse(Refusal, String),
    /// To know what the node at this address has.
    Meet(Address),
    /// That a member leaves.
    Leave(Leave),
    /// Room for a pool of this size at every active member.
    MakeRoom(u64),
    /// A view.
    Change(ViewStep, PoolSpec),
}

pub(super) fn new_store(command: &Command) -> Option<StoreId> {
    match command {
        Command::Add { store, .. } | Command::Replace { store, .. } => Some(*store),
        Command::Remove { .. }
        | Command::Readdress { .. }
        | Command::Maintenance { .. }
        | Command::Resync { .. }
        | Command::Grow { .. }
        | Command::Verify { .. }
        | Command::VerifyStatus
        | Command::VerifyCancel => None,
    }
}

/// Judges what a node says of the store that is to be part of the pool.
pub(super) fn look_at(
    command: &Command,
    hello: &HelloReply,
    view: &View,
    spec: &PoolSpec,
) -> Result<(), (Refusal, String)> {
    let (Some(store), Some(member)) = (new_store(command), new_member(command, spec)) else { return Ok(()) };
    if hello.store() != store || hello.member != member {
        let text = format!(
            "the node has store {} as member {}, not store {store} as member {member}",
            hello.store(),
            hello.member
        );
        return Err((Refusal::StoreNotFound, text));
    }
    // A store with a later history than the pool's would seem to be the newest of all at the next attach.
    if hello.view.order() >= view.order() {
        let text = format!("store {store} has {}, later than the pool's {view}", hello.view);
        return Err((Refusal::StoreInUse, text));
    }
    Ok(())
}

/// The id that a new store is to have.
fn new_member(command: &Command, spec: &PoolSpec) -> Option<MemberId> {
    match command {
        Command::Add { member: Some(member), .. } | Command::Replace { member, .. } => Some(*member),
        Command::Add { member: None, .. } => MemberId::all().find(|m| spec.member(*m).is_none()),
        Command::Remove { .. }
        | Command::Readdress { .. }
        | Command::Maintenance { .. }
        | Command::Resync { .. }
        | Command::Grow { .. }
        | Command::Verify { .. }
        | Command::VerifyStatus
        | Command::VerifyCancel => None,
    }
}

/// What a command still needs in a pool that is like this. `met` says that the node of a new store was asked and has it,
/// `has_room` that every active member has room for the pool as it is to be.
pub(super) fn next_step(command: &Command, view: &View, spec: &PoolSpec, met: bool, has_room: bool) -> Step {
    match command {
        Command::Add { store, address, .. } => add(command, *store, address, view, spec, met),
        Command::Remove { member, store } => remove(*member, *store, view, spec),
        Command::Replace { member, store, address } => replace(*member, *store, address, view, spec, met),
        Command::Readdress { members } => readdress(members, spec),
        Command::Maintenance { member, on } => maintenance(*member, *on, view, spec),
        Command::Grow { size } => grow(*size, spec, has_room),
        // They change no view, and were answered at once.
        Command::Resync { member: Some(member) } if spec.member(*member).is_none() => unknown(*member),
        Command::Resync { .. } | Command::Verify { .. } | Command::VerifyStatus | Command::VerifyCancel => {
            Step::Done
        }
    }
}

fn unknown(member: MemberId) -> Step {
    Step::Refuse(Refusal::UnknownMember, format!("the pool has no member {member}"))
}

/// That an active member leaves, or a refusal when it is the last Clean one.
fn leave(member: MemberId, view: &View, spec: PoolSpec) -> Step {
    if view.clean() == MemberSet::only(member) {
        let text = format!("member {member} is the only Clean one, {view}");
        return Step::Refuse(Refusal::LastClean, text);
    }
    Step::Leave(Leave { member, spec })
}

fn address_taken(but: Option<MemberId>, address: &Address, spec: &PoolSpec) -> Option<Step> {
    let other = spec.members.iter().find(|m| Some(m.id) != but && m.address == *address)?;
    let text = format!("member {} has the address {address}", other.id);
    Some(Step::Refuse(Refusal::AddressInUse, text))
}

fn store_taken(but: Option<MemberId>, store: StoreId, spec: &PoolSpec) -> Option<Step> {
    let other = spec.members.iter().find(|m| Some(m.id) != but && m.store == store)?;
    let text = format!("store {store} is member {} at {}", other.id, other.address);
    Some(Step::Refuse(Refusal::StoreInUse, text))
}

fn add(
    command: &Command,
    store: StoreId,
    address: &Address,
    view: &View,
    spec: &PoolSpec,
    met: bool,
) -> Step {
    let Command::Add { member: wanted, .. } = command else { return Step::Done };
    if let Some(line) = spec.members.iter().find(|m| m.store == store) {
        let is_same = line.address == *address && wanted.is_none_or(|id| id == line.id);
        return if is_same { Step::Done } else { store_taken(None, store, spec).unwrap_or(Step::Done) };
    }
    if spec.members.len() >= MAX_MEMBERS {
        let text = format!("the pool has {MAX_MEMBERS} members, which is the most");
        return Step::Refuse(Refusal::TooManyMembers, text);
    }
    let Some(id) = new_member(command, spec) else { return unknown_id() };
    if let Some(line) = spec.member(id) {
        let text = format!("member {id} is store {} at {}", line.store, line.address);
        return Step::Refuse(Refusal::MemberIdTaken, text);
    }
    if let Some(refusal) = address_taken(None, address, spec) {
        return refusal;
    }
    if !met {
        return Step::Meet(address.clone());
    }
    debug_assert!(view.member(id).is_none(), "view and specification have the same members");
    let mut next = spec.clone();
    next.members.push(MemberSpec::new(id, store, address.clone()));
    next.members.sort_by_key(|m| m.id);
    Step::Change(ViewStep::Add(id, store), next)
}

fn unknown_id() -> Step {
    Step::Refuse(Refusal::TooManyMembers, "no member id is free".to_owned())
}

fn remove(member: MemberId, store: Option<StoreId>, view: &View, spec: &PoolSpec) -> Step {
    let line = spec.member(member);
    if store.is_some_and(|s| line.is_none_or(|l| l.store != s)) {
        return Step::Done;
    }
    match view.state(member) {
        None => unknown(member),
        Some(MemberState::Out) => {
            let mut next = spec.clone();
            next.members.retain(|m| m.id != member);
            Step::Change(ViewStep::Remove(member), next)
        }
        Some(MemberState::Clean | MemberState::Syncing) => leave(member, view, spec.clone()),
    }
}

fn replace(
    member: MemberId,
    store: StoreId,
    address: &Address,
    view: &View,
    spec: &PoolSpec,
    met: bool,
) -> Step {
    let Some(line) = spec.member(member) else { return unknown(member) };
    if line.store == store && line.address == *address {
        return Step::Done;
    }
    let taken = store_taken(Some(member), store, spec).or_else(|| address_taken(Some(member), address, spec));
    if let Some(refusal) = taken {
        return refusal;
    }
    if line.store != store && view.clean() == MemberSet::only(member) {
        return leave(member, view, spec.clone());
    }
    let mut next = spec.clone();
    for line in next.members.iter_mut().filter(|m| m.id == member) {
        line.store = store;
        line.address = address.clone();
    }
    if let Some((_, old, new)) = spec.weakened_in(&next) {
        let text = format!(
            "member {member} would be reached at {new} instead of {old}, with less protection, and its node refuses that. A \
             new store at such an address can be added as another member (POST /v1/pools/{}/commands), and this one removed",
            spec.name
        );
        return Step::Refuse(Refusal::WeakerAddress, text);
    }
    if line.store == store {
        // The same data, somewhere else: nothing is missed by that.
        return Step::Change(ViewStep::Amend, next);
    }
    match view.state(member) {
        _ if !met => Step::Meet(address.clone()),
        Some(MemberState::Out) => Step::Change(ViewStep::Add(member, store), next),
        _ => leave(member, view, spec.clone()),
    }
}

/// The same stores at other addresses: nothing is missed by that.
fn readdress(members: &[MemberAddress], spec: &PoolSpec) -> Step {
    let mut next = spec.clone();
    for new in members {
        let Some(line) = next.members.iter_mut().find(|m| m.id == new.member) else {
            return unknown(new.member);
        };
        if line.store != new.store {
            let text = format!("member {} is store {}, not store {}", line.id, line.store, new.store);
            return Step::Refuse(Refusal::StoreNotFound, text);
        }
        if line.address.transport() != new.address.transport() {
            let text = format!(
                "member {} is reached over {}, and {} is another transport",
                line.id,
                line.address.transport(),
                new.address
            );
            return Step::Refuse(Refusal::BadCommand, text);
        }
        line.address = new.address.clone();
    }
    if next == *spec {
        return Step::Done;
    }
    let taken = members.iter().find_map(|new| {
        let other = next.members.iter().find(|m| m.id != new.member && m.address == new.address)?;
        Some((new, other.id))
    });
    if let Some((new, other)) = taken {
        let text = format!(
            "member {} is to be at {}, and member {other} is there as far as the pool knows: name the nodes of all members that moved",
            new.member, new.address
        );
        return Step::Refuse(Refusal::AddressInUse, text);
    }
    match next.validate() {
        Ok(()) => Step::Change(ViewStep::Amend, next),
        Err(error) => Step::Refuse(Refusal::AddressInUse, error.to_string()),
    }
}

fn maintenance(member: MemberId, on: bool, view: &View, spec: &PoolSpec) -> Step {
    let Some(line) = spec.member(member) else { return unknown(member) };
    if line.maintenance == on {
        return Step::Done;
    }
    let mut next = spec.clone();
    for line in next.members.iter_mut().filter(|m| m.id == member) {
        line.maintenance = on;
    }
    match view.state(member) {
        Some(MemberState::Clean | MemberState::Syncing) if on => leave(member, view, next),
        _ => Step::Change(ViewStep::Amend, next),
    }
}

fn grow(size: u64, spec: &PoolSpec, has_room: bool) -> Step {
    if size == spec.size {
        return Step::Done;
    }
    let mut next = spec.clone();
    next.size = size;
    if size < spec.size {
        let text = format!("the pool has {} bytes, and is never made smaller", spec.size);
        return Step::Refuse(Refusal::BadSize, text);
    }
    if let Err(error) = next.validate() {
        return Step::Refuse(Refusal::BadSize, error.to_string());
    }
    if !has_room {
        return Step::MakeRoom(size);
    }
    Step::Change(ViewStep::Amend, next)
}
