//! `rmrctl store`: the stores of nodes, one by one, while the nodes run.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Subcommand;
use rmr_common::pool::StoreId;
use serde_json::{Value, json};

use super::http::NodeAddress;
use super::{Context, CtlError, EXIT_FAILED, Outcome, format};
use crate::admin::api::{StoreChanged, StoreList, StoreName};

/// Opening and closing wait for devices, and closing for clients.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(120);

const LIST_HELP: &str = "\
Exit codes: 0 no store is left out, 1 some are, or a node did not answer";

/// The commands on stores.
#[derive(Clone, Debug, Subcommand)]
pub enum StoreCommand {
    /// List the stores of nodes: those that are open, and those that are left out, with the reason
    #[command(after_help = LIST_HELP)]
    List,
    /// Open a store: one that was left out or closed, or one on another device or file of the node
    Open {
        /// Device or file on the node
        path: PathBuf,
    },
    /// Close a store, which stays as it is, so that its device can be taken away; the next start of the node opens it again
    Close {
        /// Device or file on the node, or uuid of the store
        #[arg(value_name = "PATH|UUID")]
        store: StoreArg,
        /// Close it although a client is attached
        #[arg(long)]
        force: bool,
    },
    /// Delete a store, open or left out; what cannot be read is only taken off the node's list
    Delete {
        /// Device or file on the node, or uuid of the store
        #[arg(value_name = "PATH|UUID")]
        store: StoreArg,
        /// Say that you mean it: nothing of this copy's data can be had back
        #[arg(long)]
        yes_destroy_all_data: bool,
        /// Delete it although a client is attached
        #[arg(long)]
        force: bool,
    },
}

/// A store on the command line: by path or uuid.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreArg {
    /// By device or file.
    Path(PathBuf),
    /// By uuid.
    Store(StoreId),
}

impl FromStr for StoreArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Path(text.into()));
        }
        let uuid = uuid::Uuid::parse_str(text);
        let uuid = uuid.map_err(|_| format!("'{text}': expected an absolute path or the uuid of a store"))?;
        Ok(Self::Store(StoreId(uuid)))
    }
}

impl StoreArg {
    fn name(&self, force: bool) -> StoreName {
        match self {
            Self::Path(path) => StoreName { path: Some(path.clone()), store: None, force },
            Self::Store(store) => StoreName { path: None, store: Some(*store), force },
        }
    }
}

pub(super) async fn run(context: &Context, command: &StoreCommand) -> Result<Outcome, CtlError> {
    match command {
        StoreCommand::List => Ok(list(context).await),
        StoreCommand::Open { path } => {
            if !path.is_absolute() {
                let text = format!("store path '{}': expected an absolute path on the node", path.display());
                return Err(CtlError::failed(text));
            }
            change(context, "open", "opened", &StoreName::at(path.clone())).await
        }
        StoreCommand::Close { store, force } => change(context, "close", "closed", &store.name(*force)).await,
        StoreCommand::Delete { store, yes_destroy_all_data: false, .. } => {
            let name = store.name(false);
            Err(CtlError::failed(format!(
                "nothing was deleted: this would destroy {name} for ever, which may be the last copy of a pool; if you mean it, \
                 add --yes-destroy-all-data"
            )))
        }
        StoreCommand::Delete { store, force, .. } => {
            change(context, "delete", "deleted", &store.name(*force)).await
        }
    }
}

async fn list(context: &Context) -> Outcome {
    let answers: Vec<(_, Result<StoreList, _>)> = context.get_all(context.nodes(), "/v1/stores").await;
    let mut table = format::Table::new(&["NODE", "STATE", "POOL", "MEMBER", "STORE", "PATH"]);
    let (mut nodes, mut warnings, mut reasons) = (Vec::new(), Vec::new(), String::new());
    let mut is_well = true;
    for (address, answer) in answers {
        let list = match answer {
            Ok(list) => list,
            Err(error) => {
                is_well = false;
                warnings.push(error.to_string());
                nodes.push(json!({"address": address, "answered": false, "error": error.to_string()}));
                continue;
            }
        };
        for store in &list.open {
            let (path, member) = (store.path.display().to_string(), "-".to_owned());
            let id = store.store.to_string();
            table.row(vec![list.node.clone(), store.stage.clone(), store.name.clone(), member, id, path]);
        }
        for store in &list.left_out {
            is_well &= store.closed;
            let state = if store.closed { "closed" } else { "LEFT OUT" };
            let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "?".into());
            table.row(vec![
                list.node.clone(),
                state.to_owned(),
                or_unknown(store.name.clone()),
                or_unknown(store.member.map(|m| m.to_string())),
                or_unknown(store.store.map(|s| s.to_string())),
                store.path.display().to_string(),
            ]);
            let next = store.next_attempt_s.map(|s| format!("; tried again in {}", format::duration(s)));
            let words = format!("{}: {}{}", list.node, store.words(), next.unwrap_or_default());
            reasons += &format!("{}\n", format::plain(&words));
        }
        is_well &= list.problems.is_empty();
        warnings.extend(list.problems.iter().map(|p| format!("{}: {p}", list.node)));
        nodes.push(json!({"address": address, "answered": true, "stores": list}));
    }
    let exit = if is_well { 0 } else { EXIT_FAILED };
    Outcome { text: table.print(0) + &reasons, json: json!({ "nodes": nodes }), warnings, exit }
}

/// The one node that has the store, or could have it.
async fn node_of(context: &Context, name: &StoreName) -> Result<NodeAddress, CtlError> {
    let nodes = context.nodes();
    if let [one] = &nodes[..] {
        return Ok(one.clone());
    }
    let Some(store) = name.store else {
        let list: Vec<_> = nodes.iter().map(ToString::to_string).collect();
        return Err(CtlError::failed(format!(
            "a path is one of a node: name that node alone with --node (given: {})",
            list.join(", ")
        )));
    };
    let answers: Vec<(_, Result<StoreList, _>)> = context.get_all(nodes, "/v1/stores").await;
    let has = |list: &StoreList| {
        list.open.iter().any(|s| s.store == store) || list.left_out.iter().any(|s| s.store == Some(store))
    };
    let found: Vec<_> =
        answers.iter().filter(|(_, a)| a.as_ref().is_ok_and(has)).map(|(node, _)| node.clone()).collect();
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => Err(CtlError::failed(format!("none of the nodes that answered has store {store}"))),
        _ => {
            let list: Vec<_> = found.iter().map(ToString::to_string).collect();
            Err(CtlError::failed(format!(
                "store {store} is on several nodes, so all but one of them are copies: name the node that is meant: {}",
                list.join(", ")
            )))
        }
    }
}

async fn change(context: &Context, route: &str, done: &str, name: &StoreName) -> Result<Outcome, CtlError> {
    let node = node_of(context, name).await?;
    let client = super::http::Client { timeout: LIMIT.max(context.client.timeout) };
    let changed: StoreChanged = client.post(&node, &format!("/v1/stores/{route}"), name).await?;
    let pool = changed.name.as_ref().map(|name| format!(" of pool {name}")).unwrap_or_default();
    let store = changed.store.map(|store| format!("store {store}")).unwrap_or_else(|| "store".into());
    let mut text = format!("{store}{pool} at {} on {node} is {done}\n", changed.path.display());
    for note in &changed.notes {
        text += &format!("  note: {}\n", format::plain(note));
    }
    let json: Value = json!({"node": node, "done": done, "store": changed});
    Ok(Outcome { text, json, warnings: Vec::new(), exit: 0 })
}
