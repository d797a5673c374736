//! Changes of a pool in use: copies are added, removed, replaced and moved, taken out for maintenance, and the pool grows.
//!
//! A store is made first, on its node, and then the coordinator is told. Every command can be run again after a failure or
//! a crash at any step: a store that an earlier run made and that has not joined is used, and what is done already is done.

use std::path::PathBuf;
use std::time::Duration;

use rmr_common::pool::{
    Command, Epoch, MemberId, MemberSpec, MemberState, MemberView, PoolSpec, StoreId, View, ViewNumber,
};
use serde_json::json;

use super::advice::Advice;
use super::args::StoreArgs;
use super::assess::Picture;
use super::change_args::{
    AddMemberArgs, GrowArgs, MaintenanceArgs, MoveArgs, RemoveMemberArgs, ReplaceArgs, Switch, WaitArgs,
};
use super::coordinate::deliver;
use super::http::{Client, NodeAddress};
use super::pool::{data_address, may_exist};
use super::readdress::tell;
use super::sync::{outcome, wait_until_current};
use super::{Context, CtlError, MemberArg, Outcome, Survey, format, once_each};
use crate::admin::api::{CreateStore, ErrorCode, NodeInfo, PoolKey, PoolStatus, StoreCreated, StoreDeleted};

/// A change of views is answered within this.
pub(super) const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// How often a store is tried to be deleted that its client is about to leave.
const DELETE_ATTEMPTS: usize = 20;
/// Pause between these.
const DELETE_PAUSE: Duration = Duration::from_millis(250);

pub(super) async fn add(context: &Context, args: &AddMemberArgs) -> Result<Outcome, CtlError> {
    let context = &context.with_node(&args.member.node);
    let joined = join(context, &args.pool, None, &args.member, &args.store).await?;
    let headline = match joined.is_new {
        true => format!("pool {}: member {} is added", joined.name, joined.member),
        false => {
            format!("pool {}: member {} is on node {} already", joined.name, joined.member, args.member.node)
        }
    };
    conclude(context, &args.pool, &joined, &args.wait, &headline).await
}

pub(super) async fn replace(context: &Context, args: &ReplaceArgs) -> Result<Outcome, CtlError> {
    let context = &context.with_node(&args.member.node);
    let joined = join(context, &args.pool, Some(args.number.0), &args.member, &args.store).await?;
    let headline = match joined.is_new {
        true => format!("pool {}: member {} has a new store", joined.name, joined.member),
        false => format!(
            "pool {}: node {} has the store of member {} already; nothing was to be replaced",
            joined.name, args.member.node, joined.member
        ),
    };
    conclude(context, &args.pool, &joined, &args.wait, &headline).await
}

/// Waits if asked to, and shows the pool.
async fn conclude(
    context: &Context,
    pool: &PoolKey,
    joined: &Joined,
    wait: &WaitArgs,
    headline: &str,
) -> Result<Outcome, CtlError> {
    let json = json!({"member": joined.member, "store": joined.store, "changed": joined.is_new});
    let (survey, picture) = if wait.wait {
        wait_until_current(context, pool, Some(joined.member), wait.wait_timeout).await?
    } else {
        look(context, pool).await?
    };
    Ok(outcome(&survey, &picture, headline, json))
}

pub(super) async fn remove(context: &Context, args: &RemoveMemberArgs) -> Result<Outcome, CtlError> {
    let (survey, picture) = look(context, &args.pool).await?;
    let (member, name) = (args.member.0, picture.spec.name.clone());
    ensure_found(&survey, &picture, member, args.delete_store)?;
    let left = leave(context, &survey, &picture, member, args.delete_store).await?;
    let (survey, picture) = look(context, &args.pool).await?;
    let mut headline = match left.was_member {
        true => format!("pool {name}: member {member} is removed"),
        false => no_member(&picture, member),
    };
    headline += &left.stores_words(&picture.advice, member);
    let json = json!({"member": member, "changed": left.was_member, "deleted_stores": left.deleted});
    let mut outcome = outcome(&survey, &picture, &headline, json);
    if !left.was_member && left.deleted.is_empty() {
        outcome.warnings.push(no_member(&picture, member));
    }
    Ok(outcome)
}

pub(super) async fn move_member(context: &Context, args: &MoveArgs) -> Result<Outcome, CtlError> {
    let context = &context.with_node(&args.to.node);
    let (survey, picture) = look(context, &args.pool).await?;
    let (from, name) = (args.member.0, picture.spec.name.clone());
    ensure_found(&survey, &picture, from, args.delete_store)?;
    // Known before the new copy is added, and gone from the pool once it was moved away from.
    let leaves = picture.spec.member(from).cloned();
    // Moved in an earlier run, it is gone, and its copy is where it was to go.
    let is_moved = matches!(place(&survey, &picture, &args.to.node), Place::Member(..));
    if leaves.is_none() && !is_moved {
        return Err(CtlError::failed(no_member(&picture, from)));
    }
    let joined = join(context, &args.pool, None, &args.to, &args.store).await?;
    if joined.member == from {
        return Err(CtlError::failed(format!(
            "nothing was done: member {from} is on node {} already",
            args.to.node
        )));
    }
    wait_until_current(context, &args.pool, Some(joined.member), args.wait_timeout).await?;
    let (survey, picture) = look(context, &args.pool).await?;
    let left = leave(context, &survey, &picture, from, args.delete_store).await?;
    let (survey, picture) = look(context, &args.pool).await?;
    let mut headline = match leaves {
        Some(old) => format!(
            "pool {name}: member {from} at {} is moved; it is member {} now",
            old.address, joined.member
        ),
        None => format!("pool {name}: member {from} was moved already; it is member {} now", joined.member),
    };
    headline += &left.stores_words(&picture.advice, from);
    let json = json!({
        "from": from, "member": joined.member, "store": joined.store, "deleted_stores": left.deleted,
    });
    Ok(outcome(&survey, &picture, &headline, json))
}

pub(super) async fn maintenance(context: &Context, args: &MaintenanceArgs) -> Result<Outcome, CtlError> {
    let (survey, picture) = look(context, &args.pool).await?;
    let (member, on, name) = (args.member.0, args.switch == Switch::On, &picture.spec.name);
    // As a removal that is repeated: what is to be so is so, since the pool does not need the node.
    if picture.spec.member(member).is_none() {
        let text = no_member(&picture, member);
        let json = json!({"member": member, "maintenance": false, "changed": false});
        let mut outcome = outcome(&survey, &picture, &text, json);
        outcome.warnings.push(text);
        return Ok(outcome);
    }
    let command = Command::Maintenance { member, on };
    deliver(context, &survey, &picture, &command, COMMAND_LIMIT).await?;
    let headline = if on {
        format!(
            "pool {name}: member {member} is out, by plan: its node may be stopped, and what it misses is recorded. Then:\n  {}",
            picture.advice.maintenance_off(member)
        )
    } else {
        format!(
            "pool {name}: the maintenance of member {member} is over; it is brought up to date while a client is attached"
        )
    };
    let (survey, picture) = if args.wait.wait && !on {
        wait_until_current(context, &args.pool, Some(member), args.wait.wait_timeout).await?
    } else {
        look(context, &args.pool).await?
    };
    Ok(outcome(&survey, &picture, &headline, json!({"member": member, "maintenance": on})))
}

pub(super) async fn grow(context: &Context, args: &GrowArgs) -> Result<Outcome, CtlError> {
    let (survey, picture) = look(context, &args.pool).await?;
    let before = picture.spec.size;
    let command = Command::Grow { size: args.size.0 };
    let spec = deliver(context, &survey, &picture, &command, args.grow_timeout).await?;
    let (survey, picture) = look(context, &args.pool).await?;
    let (name, size) = (&spec.name, format::bytes(spec.size));
    let headline = if before == spec.size {
        format!("pool {name} has {size} already")
    } else {
        format!(
            "pool {name} has {size} now, {} before. A guest under QEMU sees it at once, under other hypervisors after its next start; \
             then let it grow its partition and file system",
            format::bytes(before)
        )
    };
    let json = json!({"size_bytes": spec.size, "size_before_bytes": before});
    Ok(outcome(&survey, &picture, &headline, json))
}

pub(super) async fn look(context: &Context, pool: &PoolKey) -> Result<(Survey, Picture), CtlError> {
    let survey = context.survey().await;
    let picture = survey.picture(pool)?;
    Ok((survey, picture))
}

/// A store that is a member now.
struct Joined {
    name: String,
    member: MemberId,
    store: StoreId,
    /// It was not before.
    is_new: bool,
}

/// What a node has of a pool.
enum Place {
    /// Nothing.
    Nothing,
    /// The store of this member, as the pool knows it.
    Member(MemberId, StoreId, PathBuf),
    /// A store that was made for a new copy, and has not joined.
    Prepared(Box<PoolStatus>),
    /// A store that is not of the pool any more.
    Former(Box<PoolStatus>),
}

/// Makes a store and has it join the pool: as the new store of the member `replaces`, or as one more.
async fn join(
    context: &Context,
    pool: &PoolKey,
    replaces: Option<MemberId>,
    arg: &MemberArg,
    options: &StoreArgs,
) -> Result<Joined, CtlError> {
    let (survey, picture) = look(context, pool).await?;
    let spec = &picture.spec;
    if let Some(member) = replaces.filter(|&m| spec.member(m).is_none()) {
        let text =
            format!("nothing was done: pool '{}' has no member {member}; add one with add-member", spec.name);
        return Err(CtlError::failed(text));
    }
    let info: NodeInfo = context
        .client
        .get(&arg.node, "/v1/node")
        .await
        .map_err(|e| CtlError::failed(format!("nothing was done: {e}")))?;
    let kind = spec.members[0].address.transport();
    let address = data_address(&arg.node, &info, kind)?;
    let joined = |member, store, is_new| Joined { name: spec.name.clone(), member, store, is_new };
    let mut prepared = None;
    match place(&survey, &picture, &arg.node) {
        Place::Nothing => {}
        Place::Member(id, store, path) if replaces.is_none_or(|member| member == id) => {
            if let Some(other) = arg.path.as_ref().filter(|other| **other != path) {
                return Err(CtlError::failed(format!(
                    "nothing was done: node {} has the store of member {id} at {}, and a node holds one store of a pool, so \
                     that it is not replaced by {} in one step. While another copy is current, this does it:\n  {}\n  {}\n  {}",
                    arg.node,
                    path.display(),
                    other.display(),
                    picture.advice.close_store(&arg.node, &path),
                    picture.advice.replace(id, &arg.node, Some(other)),
                    picture.advice.delete_store(&arg.node, &path)
                )));
            }
            // The node may be at another address since, and the pool is told so.
            if picture.moved.iter().any(|m| m.member == id) {
                // With all the others: two nodes may have each other's address.
                tell(context, &survey, &picture, &picture.moved).await?;
            }
            return Ok(joined(id, store, false));
        }
        Place::Member(id, ..) => {
            return Err(CtlError::failed(format!(
                "nothing was done: node {} holds member {id} of pool '{}' already, and a node holds one copy at the most",
                arg.node, spec.name
            )));
        }
        Place::Prepared(status) => {
            let fits = match replaces {
                Some(member) => status.member == member,
                None => spec.member(status.member).is_none(),
            };
            let is_there = arg.path.as_ref().is_none_or(|path| *path == status.path);
            if fits && is_there && status.spec.size == spec.size {
                prepared = Some((status.member, status.store));
            } else {
                // Nothing is in it, and the pool has changed since it was made.
                delete_store(context, &arg.node, status.store).await?;
            }
        }
        Place::Former(status) => {
            return Err(CtlError::failed(format!(
                "nothing was done: node {} has store {} ({}) of pool '{}', which was member {} once; delete it first:\n  \
                 {}",
                arg.node,
                status.store,
                status.path.display(),
                spec.name,
                status.member,
                picture.advice.remove_member(status.member, Some(&arg.node))
            )));
        }
    }
    if let Some(other) = spec.members.iter().find(|m| m.address == address && Some(m.id) != replaces) {
        return Err(CtlError::failed(format!(
            "nothing was done: node {} advertises {address}, which is the address of member {}",
            arg.node, other.id
        )));
    }
    let (member, store, is_made) = match prepared {
        Some((member, store)) => (member, store, false),
        None => {
            let member = replaces.or_else(|| MemberId::all().find(|&id| spec.member(id).is_none()));
            let member = member.ok_or_else(|| {
                CtlError::failed(format!("nothing was done: pool '{}' has 8 members already", spec.name))
            })?;
            let store = StoreId::random();
            make_store(&picture, MemberSpec::new(member, store, address.clone()), arg, options).await?;
            (member, store, true)
        }
    };
    let command = match replaces {
        Some(member) => Command::Replace { member, store, address },
        None => Command::Add { store, address, member: Some(member) },
    };
    if let Err(error) = deliver(context, &survey, &picture, &command, COMMAND_LIMIT).await {
        let mut text = format!("member {member} was not brought in: {error}");
        if is_made && error.is_for_good() {
            match delete_store(context, &arg.node, store).await {
                Ok(()) => text += &format!("\nremoved again: store {store} on {}", arg.node),
                Err(error) => text += &format!("\nNOT removed: store {store} on {}: {error}", arg.node),
            }
        } else if !error.is_for_good() {
            text += &format!(
                "\nstore {store} on {} is made, and will be used when the command is run again",
                arg.node
            );
        }
        return Err(CtlError::failed(text));
    }
    Ok(joined(member, store, true))
}

fn place(survey: &Survey, picture: &Picture, node: &NodeAddress) -> Place {
    let answer = survey.answers.iter().find(|(asked, _)| asked == node);
    let pools = answer.and_then(|(_, answer)| answer.as_ref().ok());
    let status = pools.and_then(|pools| pools.iter().find(|p| p.spec.id == picture.spec.id));
    let Some(status) = status else { return Place::Nothing };
    match picture.spec.members.iter().find(|m| m.store == status.store) {
        Some(member) => Place::Member(member.id, member.store, status.path.clone()),
        None if status.is_prepared() => Place::Prepared(Box::new(status.clone())),
        None => Place::Former(Box::new(status.clone())),
    }
}

/// Makes the empty store of a member that is to join. It believes in a view that is older than any of the pool's, and in which
/// it is Out: nobody can take it for a current copy.
async fn make_store(
    picture: &Picture,
    member: MemberSpec,
    arg: &MemberArg,
    options: &StoreArgs,
) -> Result<(), CtlError> {
    let (id, store) = (member.id, member.store);
    let mut spec: PoolSpec = picture.spec.clone();
    spec.members.retain(|m| m.id != id);
    spec.members.push(member);
    spec.members.sort_by_key(|m| m.id);
    let mut members: Vec<MemberView> = picture.view.members.iter().filter(|m| m.id != id).copied().collect();
    members.push(MemberView { id, store, state: MemberState::Out });
    members.sort_by_key(|m| m.id);
    let view = View { number: ViewNumber(0), epoch: Epoch(0), members };
    view.validate().map_err(|_| {
        CtlError::failed(format!(
            "nothing was done: member {id} is the only current copy of pool '{}'",
            spec.name
        ))
    })?;
    // As far as the others can grow, this one has to.
    let max_size_bytes = picture.reports.iter().filter_map(|r| r.max_size_bytes).max();
    let request = CreateStore {
        spec,
        member: id,
        view,
        path: arg.path.clone(),
        overwrite: options.overwrite,
        assume_zero: options.assume_zero,
        max_size_bytes,
    };
    let client = Client { timeout: options.create_timeout };
    let Err(error) = client.post::<StoreCreated>(&arg.node, "/v1/stores", &request).await else {
        return Ok(());
    };
    let mut text = format!("nothing was changed: {error}");
    if may_exist(&error) {
        text += "; the store may still be in the making: run the same command again, which will find it";
    }
    Err(CtlError::failed(text))
}

/// What became of the stores of a member that left.
struct Left {
    was_member: bool,
    deleted: Vec<StoreId>,
    kept: Vec<(StoreId, String)>,
}

impl Left {
    fn stores_words(&self, advice: &Advice, member: MemberId) -> String {
        let way = advice.remove_member(member, None);
        let deleted = self.deleted.iter().map(|store| format!("\n  store {store} is deleted"));
        let kept = self.kept.iter().map(|(store, place)| {
            format!(
                "\n  store {store} ({place}) stays and belongs to nothing; delete it with\n    \
                 {way}"
            )
        });
        deleted.chain(kept).collect()
    }
}

/// What is said of a member that the pool does not have: it is gone already, or its number is mistyped.
fn no_member(picture: &Picture, member: MemberId) -> String {
    let has: Vec<_> = picture.spec.members.iter().map(|m| m.id.to_string()).collect();
    format!(
        "pool {} has no member {member}, only {}; nothing was to be done",
        picture.spec.name,
        has.join(", ")
    )
}

/// A store that is to be deleted has to be on a node that was asked, or it would stay for good without a word.
fn ensure_found(survey: &Survey, picture: &Picture, member: MemberId, deletes: bool) -> Result<(), CtlError> {
    match picture.spec.member(member) {
        Some(current) if deletes && survey.holder(current.store).is_none() => Err(CtlError::failed(format!(
            "nothing was done: the store of member {member}, at {}, is on none of the nodes that answered, and cannot be deleted; \
             name the admin address of its node with --node, or leave --delete-store out if that node is gone",
            current.address
        ))),
        _ => Ok(()),
    }
}

/// Removes a member that may be removed already, and what is left of it.
async fn leave(
    context: &Context,
    survey: &Survey,
    picture: &Picture,
    member: MemberId,
    deletes: bool,
) -> Result<Left, CtlError> {
    let current = picture.spec.member(member).map(|m| m.store);
    if let Some(store) = current {
        let command = Command::Remove { member, store: Some(store) };
        deliver(context, survey, picture, &command, COMMAND_LIMIT).await?;
    }
    let all = picture.reports.iter().chain(&picture.strays);
    let stores = all.filter(|s| Some(s.store) == current || current.is_none() && s.member == member);
    let mut left = Left { was_member: current.is_some(), deleted: Vec::new(), kept: Vec::new() };
    for status in stores {
        match survey.holder(status.store).filter(|_| deletes) {
            Some(node) => {
                delete_store(context, node, status.store).await?;
                left.deleted.push(status.store);
            }
            None => left.kept.push((status.store, format!("{} on {}", status.path.display(), status.node))),
        }
    }
    Ok(left)
}

/// Deletes a store that is not of the pool any more, as soon as its client has left it.
async fn delete_store(context: &Context, node: &NodeAddress, store: StoreId) -> Result<(), CtlError> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let error = match context.client.delete::<StoreDeleted>(node, &format!("/v1/stores/{store}")).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        match error.refusal().map(|refusal| refusal.code) {
            Some(ErrorCode::NotFound) => return Ok(()),
            Some(ErrorCode::InUse) if attempt < DELETE_ATTEMPTS => tokio::time::sleep(DELETE_PAUSE).await,
            _ => {
                return Err(CtlError::failed(format!(
                    "store {store} is not deleted: {error}; run the same command again"
                )));
            }
        }
    }
}

impl Context {
    /// The same, asking one more node: one that a command names besides.
    fn with_node(&self, node: &NodeAddress) -> Self {
        let given = once_each(&[self.nodes(), vec![node.clone()]].concat());
        let advice = self.advice.clone();
        Self { given, keys: self.keys.clone(), tls: self.tls.clone(), advice, ..*self }
    }
}
