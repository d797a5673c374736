//! `rmrctl pool`: creating on all nodes or none, listing, showing and deleting.

use rmr_common::pool::{
    Address, ChunkSize, MAX_MEMBERS, MemberId, MemberSpec, PoolId, PoolSpec, StoreId, TransportKind, View,
};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::advice::Advice;
use super::http::{CallError, Client, NodeAddress};
use super::status::{client_words, members_table};
use super::{
    Context, CreateArgs, CtlError, DeleteArgs, EXIT_FAILED, MemberArg, Outcome, Survey, assess, format,
    once_each,
};
use crate::admin::api::{
    Authentication, ClientState, CreateStore, ErrorCode, NodeInfo, PoolKey, PoolList, PoolStatus,
    StoreCreated, StoreDeleted, UnixMs,
};

pub(super) async fn create(context: &Context, args: &CreateArgs) -> Result<Outcome, CtlError> {
    check_members(&args.members)?;
    let (planned, infos) = plan(context, args).await?;
    let (begun, mut warnings) = check_names(context, args, &planned).await?;
    warnings.extend(loopback_warning(&planned, &infos));
    let is_new = begun.is_none();
    // What an earlier command has made is used as it is; the members are the same, in the order of that command.
    let (spec, there) = begun.map_or((planned, Vec::new()), |begun| (begun.spec, begun.there));
    let place = |member: &MemberSpec, kind: TransportKind| {
        let has = |info: &&NodeInfo| {
            info.data_addresses.iter().find(|a| a.transport() == kind) == Some(&member.address)
        };
        infos.iter().position(|info| has(&info)).map(|at| (&args.members[at], &infos[at]))
    };
    let places: Option<Vec<_>> =
        spec.members.iter().map(|member| place(member, args.transport.into())).collect();
    let places = places.ok_or_else(|| CtlError::failed("nothing was created: a node changed its address"))?;
    // Two commands at once meet on the same node first, in whatever order each names the nodes: one of them gets it.
    let mut order: Vec<usize> = (0..spec.members.len()).collect();
    order.sort_by_key(|at| spec.members[*at].address.to_string());
    let view = View::initial(spec.members.iter().map(|m| (m.id, m.store)));

    // From here on an interrupt is a reason to clean up, and it is not lost between two members.
    let mut interrupt = signal(SignalKind::interrupt())
        .map_err(|e| CtlError::failed(format!("nothing was created: interrupts cannot be watched: {e}")))?;
    let mut created: Vec<(NodeAddress, StoreCreated)> = Vec::new();
    for at in order {
        let (member, arg) = (&spec.members[at], places[at].0);
        if there.iter().any(|made| made.store == member.store) {
            continue;
        }
        let request = CreateStore {
            spec: spec.clone(),
            member: member.id,
            view: view.clone(),
            path: arg.path.clone(),
            overwrite: args.store.overwrite,
            assume_zero: args.store.assume_zero,
            max_size_bytes: args.max_size.map(|size| size.0),
        };
        let client = Client { timeout: args.store.create_timeout };
        let (error, doubtful) = tokio::select! {
            result = client.post::<StoreCreated>(&arg.node, "/v1/stores", &request) => match result {
                Ok(store) => {
                    warnings.extend(store.warnings.iter().map(|w| format!("node {}: {w}", arg.node)));
                    created.push((arg.node.clone(), store));
                    continue;
                }
                Err(error) => (error.to_string(), may_exist(&error)),
            },
            _ = interrupt.recv() => (format!("interrupted while node {} made its store", arg.node), true),
        };
        let made: Vec<_> = created.iter().map(|(n, s)| (n.clone(), s.store)).collect();
        let doubtful = doubtful.then(|| (arg.node.clone(), member.store));
        return Err(roll_back(context, &spec, &error, made, doubtful).await);
    }
    if !context.keys.is_empty() {
        warnings.extend(without_key(context, &spec, &created).await);
    }
    // All of them, in the order of the members.
    let of = |member: &MemberSpec| {
        let made = created.iter().find(|(_, made)| made.store == member.store);
        made.map(|(_, made)| made).or_else(|| there.iter().find(|made| made.store == member.store))
    };
    let stores =
        spec.members.iter().zip(&places).filter_map(|(m, (arg, _))| Some((arg.node.clone(), of(m)?.clone())));
    let (stores, infos): (Vec<_>, Vec<_>) =
        (stores.collect(), places.iter().map(|(_, i)| (*i).clone()).collect());
    let mut outcome = created_outcome(&spec, &view, &stores, &infos, warnings);
    if !is_new {
        outcome.text = format!(
            "pool {} was made in part by another command, which was cut short or is under way: {} of {} stores were missing\n{}",
            spec.name,
            created.len(),
            stores.len(),
            outcome.text
        );
    }
    Ok(outcome)
}

/// Nodes that serve the new pool without a key, although one is named on the command line.
async fn without_key(
    context: &Context,
    spec: &PoolSpec,
    created: &[(NodeAddress, StoreCreated)],
) -> Vec<String> {
    let nodes = created.iter().map(|(node, _)| node.clone()).collect();
    let lists: Vec<(_, Result<PoolList, _>)> = context.get_all(nodes, "/v1/pools").await;
    let words = |(node, list): (NodeAddress, Result<PoolList, _>)| match list {
        Err(error) => Some(format!("whether the pool has its key is not known: {error}")),
        Ok(list) => {
            let own = list.pools.into_iter().find(|pool| pool.spec.id == spec.id)?;
            match own.authentication {
                Authentication::Key | Authentication::Rotating => None,
                Authentication::None => Some(format!(
                    "node {node} has no key for pool '{}', whoever reaches it may attach: put the key's file into its --key-dir",
                    spec.name
                )),
                Authentication::Unusable { reason } => Some(format!("node {node} lets nobody in: {reason}")),
            }
        }
    };
    lists.into_iter().filter_map(words).collect()
}

fn check_members(members: &[MemberArg]) -> Result<(), CtlError> {
    if members.len() > MAX_MEMBERS {
        return Err(CtlError::failed(format!("{} members: expected 1 to {MAX_MEMBERS}", members.len())));
    }
    for (i, member) in members.iter().enumerate() {
        if members[..i].iter().any(|m| m.node == member.node) {
            let message = format!("node {} is given twice: each member needs a node of its own", member.node);
            return Err(CtlError::failed(message));
        }
    }
    Ok(())
}

/// Asks each member's node for its address and makes the specification.
async fn plan(context: &Context, args: &CreateArgs) -> Result<(PoolSpec, Vec<NodeInfo>), CtlError> {
    let nodes = args.members.iter().map(|m| m.node.clone()).collect();
    let answers: Vec<(_, Result<NodeInfo, _>)> = context.get_all(nodes, "/v1/node").await;
    let mut infos = Vec::new();
    let mut members: Vec<MemberSpec> = Vec::new();
    for (id, (node, answer)) in MemberId::all().zip(answers) {
        let info = answer.map_err(|e| CtlError::failed(format!("nothing was created: {e}")))?;
        let address = data_address(&node, &info, args.transport.into())?;
        if let Some(i) = members.iter().position(|m| m.address == address) {
            let message = format!(
                "nodes {} and {node} both advertise {address}: they are one node, or one of them has a wrong \
                 'advertise' in its configuration",
                args.members[i].node
            );
            return Err(CtlError::failed(message));
        }
        members.push(MemberSpec::new(id, StoreId::random(), address));
        infos.push(info);
    }
    let spec = PoolSpec {
        id: PoolId::random(),
        name: args.name.clone(),
        size: args.size.0,
        chunk_size: ChunkSize::from_bytes(args.chunk_size.0).map_err(|e| CtlError::failed(e.to_string()))?,
        logical_block_size: args.block_size,
        members,
    };
    spec.validate().map_err(|e| CtlError::failed(e.to_string()))?;
    Ok((spec, infos))
}

pub(super) fn data_address(
    node: &NodeAddress,
    info: &NodeInfo,
    kind: TransportKind,
) -> Result<Address, CtlError> {
    info.data_addresses.iter().find(|a| a.transport() == kind).cloned().ok_or_else(|| {
        let has: Vec<_> = info.data_addresses.iter().map(ToString::to_string).collect();
        CtlError::failed(format!("node {node} advertises no {kind} address, only: {}", has.join(", ")))
    })
}

/// A pool of which an earlier command has made some stores.
struct Begun {
    spec: PoolSpec,
    /// The stores that are there.
    there: Vec<StoreCreated>,
}

/// Refuses a name that a node has already, but for a pool that a command began to make in the same way and no client has
/// used: what is missing of it can be made. Gives a warning for each node that was named beside the members' nodes and could
/// not be asked.
async fn check_names(
    context: &Context,
    args: &CreateArgs,
    spec: &PoolSpec,
) -> Result<(Option<Begun>, Vec<String>), CtlError> {
    let member_nodes: Vec<_> = args.members.iter().map(|m| m.node.clone()).collect();
    let all = once_each(&[member_nodes.clone(), context.given.clone()].concat());
    let (keys, tls, advice) = (context.keys.clone(), context.tls.clone(), context.advice.clone());
    let survey = Context { given: all, keys, tls, advice, ..*context }.survey().await;
    for (node, answer) in &survey.answers {
        if let (Err(e), true) = (answer, member_nodes.contains(node)) {
            return Err(CtlError::failed(format!("nothing was created: {e}")));
        }
    }
    let mut clashes: Vec<_> = survey.pictures().into_iter().filter(|p| p.spec.name == spec.name).collect();
    let unasked = |e| format!("whether it has a pool '{}' is not known: {e}", spec.name);
    let warnings = || survey.errors().into_iter().map(unasked).collect();
    if clashes.is_empty() {
        return Ok((None, warnings()));
    }
    let (is_only, clash) = (clashes.len() == 1, clashes.remove(0));
    let holders: Vec<_> = clash.reports.iter().chain(&clash.strays).map(|s| s.node.as_str()).collect();
    let same = clash.spec.size == spec.size
        && clash.spec.chunk_size == spec.chunk_size
        && clash.spec.logical_block_size == spec.logical_block_size
        && clash.spec.members.len() == spec.members.len()
        && clash.spec.members.iter().all(|m| spec.members.iter().any(|own| own.address == m.address));
    let is_unused = clash.view == View::initial(clash.spec.members.iter().map(|m| (m.id, m.store)))
        && clash.reports.iter().all(|r| r.client.is_none() && r.view == clash.view);
    let is_cut_short = clash.reports.len() < clash.spec.members.len() && clash.left_out.is_empty();
    if is_only && same && is_unused && is_cut_short && clash.strays.is_empty() {
        let made =
            |r: &PoolStatus| StoreCreated { store: r.store, path: r.path.clone(), warnings: Vec::new() };
        let there = clash.reports.iter().map(made).collect();
        return Ok((Some(Begun { spec: clash.spec, there }), warnings()));
    }
    let hint = if same {
        "it has this very size and these members; if you ran this command before, there is nothing left to do"
    } else {
        "choose another name, or delete that pool first"
    };
    Err(CtlError::failed(format!(
        "nothing was created: a pool '{}' exists already ({}, {}, on {}): {hint}",
        spec.name,
        clash.spec.id,
        format::bytes(clash.spec.size),
        holders.join(", ")
    )))
}

fn loopback_warning(spec: &PoolSpec, infos: &[NodeInfo]) -> Option<String> {
    let loopback = |a: &Address| {
        a.host() == "localhost" || a.host().parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    };
    let (local, other): (Vec<_>, Vec<_>) =
        spec.members.iter().zip(infos).partition(|(m, _)| loopback(&m.address));
    let (member, info) = local.first()?;
    (!other.is_empty()).then(|| {
        format!(
            "node {} advertises {}, which only its own machine can reach; set 'advertise' in its configuration",
            info.name, member.address
        )
    })
}

/// Whether a store may have been made although its creation failed.
pub(super) fn may_exist(error: &CallError) -> bool {
    match error.refusal() {
        Some(refusal) => refusal.code == ErrorCode::Timeout,
        None => !error.never_arrived(),
    }
}

/// Removes what this call made, and says what became of it. `doubtful` is the store of which it is not known whether it
/// was made.
async fn roll_back(
    context: &Context,
    spec: &PoolSpec,
    error: &str,
    made: Vec<(NodeAddress, StoreId)>,
    doubtful: Option<(NodeAddress, StoreId)>,
) -> CtlError {
    let mut message = format!("pool '{}' was not created: {error}", spec.name);
    if made.is_empty() && doubtful.is_none() {
        message += "\nnothing had been made yet";
    }
    for (node, store) in doubtful.iter().chain(made.iter().rev()) {
        let name = format!("store {store} on {node}");
        let way = Advice::delete_on(node, spec.id);
        match context.client.delete::<StoreDeleted>(node, &format!("/v1/stores/{store}")).await {
            Ok(_) => message += &format!("\nremoved again: {name}"),
            Err(e) if e.refusal().is_some_and(|r| r.code == ErrorCode::NotFound) => {
                message += &format!("\nnot there: {name}");
                if doubtful.as_ref().is_some_and(|(_, s)| s == store) {
                    message +=
                        &format!(", but it may still be in the making; if it appears, remove it with: {way}");
                }
            }
            Err(e) => message += &format!("\nNOT removed: {name}: {e}\n  remove it with: {way}"),
        }
    }
    CtlError::failed(message)
}

fn created_outcome(
    spec: &PoolSpec,
    view: &View,
    created: &[(NodeAddress, StoreCreated)],
    infos: &[NodeInfo],
    warnings: Vec<String>,
) -> Outcome {
    let mut table = format::Table::new(&["MEMBER", "NODE", "ADDRESS", "STORE", "PATH"]);
    let mut members = Vec::new();
    for (((node, store), member), info) in created.iter().zip(&spec.members).zip(infos) {
        table.row(vec![
            member.id.to_string(),
            info.name.clone(),
            member.address.to_string(),
            store.store.to_string(),
            store.path.display().to_string(),
        ]);
        members.push(json!({
            "member": member.id,
            "node": info.name,
            "admin_address": node,
            "address": member.address,
            "store": store.store,
            "path": store.path,
        }));
    }
    let text = format!(
        "pool {} created: {}, {} {}, uuid {}\n{}",
        spec.name,
        format::bytes(spec.size),
        created.len(),
        if created.len() == 1 { "copy (there is no second one)" } else { "copies" },
        spec.id,
        table.print(2)
    );
    let json = json!({"pool": spec.id, "spec": spec, "view": view, "members": members});
    Outcome { text, json, warnings, exit: 0 }
}

pub(super) async fn list(context: &Context) -> Result<Outcome, CtlError> {
    let survey = context.survey().await;
    if !survey.any_answered() {
        return Err(CtlError::failed(format!("no node answered: {}", survey.errors().join("; "))));
    }
    let now = UnixMs::now();
    let mut table = format::Table::new(&["NAME", "UUID", "SIZE", "COPIES", "SEEN", "CLIENT", "STATE"]);
    let mut pools = Vec::new();
    for picture in survey.pictures() {
        let a = assess::assess(&picture, survey.all_answered(), now);
        table.row(vec![
            picture.spec.name.clone(),
            picture.spec.id.to_string(),
            format::bytes(picture.spec.size),
            a.copies.to_string(),
            picture.reports.len().to_string(),
            a.client.as_ref().map_or_else(|| "-".into(), |c| format::plain(&c.text)),
            match (a.level, a.copies) {
                (assess::Level::Safe, 1) => "SAFE, one copy only".to_owned(),
                (level, _) => level.word().to_owned(),
            },
        ]);
        pools.push(json!({
            "pool": picture.spec.id,
            "name": picture.spec.name,
            "size_bytes": picture.spec.size,
            "copies": a.copies,
            "seen": picture.reports.len(),
            "level": a.level,
        }));
    }
    // A list that may lack something must not look like success to a script.
    let exit = if survey.all_answered() { 0 } else { EXIT_FAILED };
    let json = json!({"pools": pools, "nodes": survey.json()});
    Ok(Outcome { text: table.print(0), json, warnings: survey.errors(), exit })
}

pub(super) async fn show(context: &Context, key: &PoolKey) -> Result<Outcome, CtlError> {
    let survey = context.survey().await;
    let picture = survey.picture(key)?;
    let now = UnixMs::now();
    let a = assess::assess(&picture, survey.all_answered(), now);
    let spec = &picture.spec;
    let mut text = format!("pool {}\n", spec.name);
    for (label, value) in [
        ("state", a.headline.clone()),
        ("uuid", spec.id.to_string()),
        ("size", format!("{} ({} bytes)", format::bytes(spec.size), spec.size)),
        ("chunk size", format::bytes(spec.chunk_size.bytes())),
        ("block size", format!("{} bytes, logical", spec.logical_block_size)),
        ("view", format!("{} of epoch {}", picture.view.number, picture.view.epoch)),
        ("client", client_words(a.client.as_ref(), now)),
    ] {
        text += &format!("  {label:12}{value}\n");
    }
    text += "\n";
    text += &members_table(&a.members);
    text += "\n";
    text += &stores_table(&survey, &picture);
    for note in &a.notes {
        text += &format!("  note: {note}\n");
    }
    let stores: Vec<_> = picture.reports.iter().chain(&picture.strays).collect();
    let json = json!({
        "pool": spec.id,
        "spec": spec,
        "view": picture.view,
        "assessment": a,
        "stores": stores,
        "nodes": survey.json(),
    });
    Ok(Outcome { text, json, warnings: survey.errors(), exit: 0 })
}

/// The stores with their I/O.
fn stores_table(survey: &Survey, picture: &assess::Picture) -> String {
    let mut table = format::Table::new(&[
        "MEMBER",
        "ADMIN",
        "STORE",
        "PATH",
        "READS",
        "READ",
        "WRITES",
        "WRITTEN",
        "ZEROES",
        "FLUSHES",
        "ERRORS",
        "IN FLIGHT",
        "P99 R/W",
    ]);
    for status in picture.reports.iter().chain(&picture.strays) {
        let io = &status.io;
        table.row(vec![
            status.member.to_string(),
            survey.holder(status.store).map_or_else(|| "?".into(), ToString::to_string),
            status.store.to_string(),
            status.path.display().to_string(),
            io.reads.to_string(),
            format::bytes(io.read_bytes),
            io.writes.to_string(),
            format::bytes(io.written_bytes),
            io.zeroes.to_string(),
            io.flushes.to_string(),
            io.errors.to_string(),
            io.in_flight.to_string(),
            status.latency.map_or_else(|| "-".into(), |l| format!("{}/{} µs", l.read_p99_us, l.write_p99_us)),
        ]);
    }
    table.print(2)
}

pub(super) async fn delete(context: &Context, args: &DeleteArgs) -> Result<Outcome, CtlError> {
    let survey = context.survey().await;
    let picture = survey.picture(&args.pool)?;
    let stores: Vec<&PoolStatus> = picture.reports.iter().chain(&picture.strays).collect();
    check_delete(args, &picture, &stores, &survey)?;

    let name = &picture.spec.name;
    let (mut deleted, mut failed) = (Vec::new(), Vec::new());
    for status in &stores {
        let Some(node) = survey.holder(status.store) else { continue };
        let force = if args.force { "?force=true" } else { "" };
        match context
            .client
            .delete::<StoreDeleted>(node, &format!("/v1/stores/{}{force}", status.store))
            .await
        {
            Ok(_) => deleted.push((status, node)),
            // Somebody else was faster; what was asked for is so.
            Err(e) if e.refusal().is_some_and(|r| r.code == ErrorCode::NotFound) => {
                deleted.push((status, node))
            }
            Err(e) => failed.push((status, e)),
        }
    }
    if !failed.is_empty() {
        let lines: Vec<_> =
            failed.iter().map(|(s, e)| format!("member {} is still there: {e}", s.member)).collect();
        let message = format!(
            "pool '{name}' is deleted only in part ({} of {} stores): {}\nrun the command again to delete the rest",
            deleted.len(),
            stores.len(),
            lines.join("; ")
        );
        return Err(CtlError::failed(message));
    }
    let mut table = format::Table::new(&["MEMBER", "NODE", "STORE", "PATH"]);
    let mut json_stores = Vec::new();
    for (status, node) in &deleted {
        table.row(vec![
            status.member.to_string(),
            status.node.clone(),
            status.store.to_string(),
            status.path.display().to_string(),
        ]);
        json_stores.push(json!({
            "member": status.member, "node": status.node, "admin_address": node,
            "store": status.store, "path": status.path,
        }));
    }
    Ok(Outcome {
        text: format!("pool {name} ({}) deleted\n{}", picture.spec.id, table.print(2)),
        json: json!({"pool": picture.spec.id, "name": name, "deleted": json_stores}),
        warnings: unreached(&picture).into_iter().map(|m| format!("left behind: {m}")).collect(),
        exit: 0,
    })
}

/// What stands against a deletion, in words that say how to go on.
fn check_delete(
    args: &DeleteArgs,
    picture: &assess::Picture,
    stores: &[&PoolStatus],
    survey: &Survey,
) -> Result<(), CtlError> {
    let name = &picture.spec.name;
    if !args.yes_destroy_all_data {
        let what: Vec<_> = stores.iter().map(|s| format!("{} on {}", s.path.display(), s.node)).collect();
        return Err(CtlError::failed(format!(
            "nothing was deleted: this would destroy all {} of pool '{name}' ({}) for ever: {}; if you mean it, add \
             --yes-destroy-all-data",
            format::bytes(picture.spec.size),
            picture.spec.id,
            what.join(", ")
        )));
    }
    if args.force {
        return Ok(());
    }
    let attached = |s: &&PoolStatus| s.client.as_ref().is_some_and(|c| c.state == ClientState::Attached);
    if let Some(client) = stores.iter().copied().find(attached).and_then(|s| s.client.as_ref()) {
        return Err(CtlError::failed(format!(
            "nothing was deleted: {} ({}) is attached to pool '{name}'; stop it first, or add --force",
            format::plain(&client.text),
            format::plain(&client.address)
        )));
    }
    let missing = unreached(picture);
    if !missing.is_empty() {
        let mut message = format!(
            "nothing was deleted: {} would be left behind; name its node with --node, or add --force",
            missing.join(", ")
        );
        for error in survey.errors() {
            message += &format!("\n{error}");
        }
        return Err(CtlError::failed(message));
    }
    Ok(())
}

/// The members of the view whose store was not seen on any node.
fn unreached(picture: &assess::Picture) -> Vec<String> {
    let seen = |id| picture.reports.iter().any(|r| r.member == id);
    let name = |id| {
        let address = picture.spec.member(id).map(|m| m.address.to_string()).unwrap_or_default();
        format!("the store of member {id} ({address})")
    };
    picture.view.members.iter().filter(|m| !seen(m.id)).map(|m| name(m.id)).collect()
}
