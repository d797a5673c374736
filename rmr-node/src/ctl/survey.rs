//! Asking nodes: which, how, and what all of them together say of pools.

use rmr_common::auth::KeyRing;
use rmr_common::pool::StoreId;
use rmr_common::transport::tls::ClientTls;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::advice::Advice;
use super::http::{CallError, Client, NodeAddress};
use super::{CtlError, assess};
use crate::admin::api::{PoolKey, PoolList, PoolStatus};

/// Which nodes to ask, and how.
pub(super) struct Context {
    pub(super) client: Client,
    /// Nodes named on the command line or in the environment; may be empty.
    pub(super) given: Vec<NodeAddress>,
    /// Print JSON for programs.
    pub(super) json: bool,
    /// The key of the pool.
    pub(super) keys: KeyRing,
    /// How `tls://` addresses are reached.
    pub(super) tls: Option<ClientTls>,
    /// A client that left without a goodbye will not come back.
    pub(super) client_is_gone: bool,
    /// How this program was called.
    pub(super) advice: Advice,
}

impl Context {
    /// The nodes to ask: those given, each once, or the one on this machine.
    pub(super) fn nodes(&self) -> Vec<NodeAddress> {
        if self.given.is_empty() { vec![NodeAddress::local()] } else { once_each(&self.given) }
    }

    /// Asks all nodes for their pools.
    pub(super) async fn survey(&self) -> Survey {
        let lists: Vec<(_, Result<PoolList, _>)> = self.get_all(self.nodes(), "/v1/pools").await;
        let answers = lists.into_iter().map(|(node, list)| (node, list.map(|l| l.pools))).collect();
        Survey { answers, advice: self.advice.clone() }
    }

    /// Asks nodes at the same time; the answers come in the order of `nodes`.
    pub(super) async fn get_all<T: serde::de::DeserializeOwned + Send + 'static>(
        &self,
        nodes: Vec<NodeAddress>,
        path: &'static str,
    ) -> Vec<(NodeAddress, Result<T, CallError>)> {
        let client = self.client;
        let mut tasks = JoinSet::new();
        for (i, node) in nodes.into_iter().enumerate() {
            tasks.spawn(async move {
                let answer = client.get(&node, path).await;
                (i, node, answer)
            });
        }
        let mut answers = tasks.join_all().await;
        answers.sort_by_key(|(i, ..)| *i);
        answers.into_iter().map(|(_, node, answer)| (node, answer)).collect()
    }
}

/// What the nodes said when asked for their pools.
pub(super) struct Survey {
    pub(super) answers: Vec<(NodeAddress, Result<Vec<PoolStatus>, CallError>)>,
    advice: Advice,
}

impl Survey {
    pub(super) fn all_answered(&self) -> bool {
        self.answers.iter().all(|(_, answer)| answer.is_ok())
    }

    pub(super) fn any_answered(&self) -> bool {
        self.answers.iter().any(|(_, answer)| answer.is_ok())
    }

    /// The nodes that did not answer.
    pub(super) fn silent(&self) -> String {
        let silent = self.answers.iter().filter(|(_, answer)| answer.is_err());
        silent.map(|(node, _)| node.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// What went wrong, one line for each node that did not answer.
    pub(super) fn errors(&self) -> Vec<String> {
        self.answers.iter().filter_map(|(_, answer)| answer.as_ref().err().map(ToString::to_string)).collect()
    }

    /// The node that holds this store.
    pub(super) fn holder(&self, store: StoreId) -> Option<&NodeAddress> {
        let holds = |pools: &Vec<PoolStatus>| pools.iter().any(|p| p.store == store);
        self.answers.iter().find(|(_, answer)| answer.as_ref().is_ok_and(holds)).map(|(node, _)| node)
    }

    pub(super) fn pictures(&self) -> Vec<assess::Picture> {
        let statuses = self.answers.iter().filter_map(|(_, a)| a.as_ref().ok()).flatten().cloned().collect();
        let mut pictures = assess::merge(statuses);
        let names: Vec<_> = pictures.iter().map(|p| p.spec.name.clone()).collect();
        for picture in &mut pictures {
            let is_alone = names.iter().filter(|&name| *name == picture.spec.name).count() == 1;
            let pool = if is_alone { picture.spec.name.clone() } else { picture.spec.id.to_string() };
            picture.advice = self.advice.of(pool);
        }
        pictures
    }

    /// The one pool that the key names.
    pub(super) fn picture(&self, key: &PoolKey) -> Result<assess::Picture, CtlError> {
        let mut found: Vec<_> = self.pictures().into_iter().filter(|p| key.matches(&p.spec)).collect();
        match found.len() {
            0 if !self.any_answered() => {
                Err(CtlError::failed(format!("no node answered: {}", self.errors().join("; "))))
            }
            0 => {
                let asked: Vec<_> = self.answers.iter().map(|(node, _)| node.to_string()).collect();
                let unanswered = match self.errors() {
                    errors if errors.is_empty() => String::new(),
                    errors => format!("; not all answered: {}", errors.join("; ")),
                };
                let message =
                    format!("there is no pool {key} on the nodes asked ({}){unanswered}", asked.join(", "));
                Err(CtlError::failed(message))
            }
            1 => Ok(found.remove(0)),
            _ => {
                let ids: Vec<_> = found.iter().map(|p| p.spec.id.to_string()).collect();
                Err(CtlError::failed(format!("{key} names several pools, use the uuid: {}", ids.join(", "))))
            }
        }
    }

    /// The nodes as JSON: which were asked and which answered.
    pub(super) fn json(&self) -> Value {
        self.answers
            .iter()
            .map(|(node, answer)| {
                json!({
                    "address": node,
                    "answered": answer.is_ok(),
                    "error": answer.as_ref().err().map(ToString::to_string),
                })
            })
            .collect()
    }
}

pub(super) fn once_each(nodes: &[NodeAddress]) -> Vec<NodeAddress> {
    let mut once: Vec<NodeAddress> = Vec::new();
    for node in nodes {
        if !once.contains(node) {
            once.push(node.clone());
        }
    }
    once
}
