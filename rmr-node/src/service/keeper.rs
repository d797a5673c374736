//! Opens the stores of the node, at its start and later: looks at them, judges them together, opens those that may be served,
//! and keeps a list of the others, which are tried again.
//!
//! Whatever waits for a device is done on threads of its own, and for a bounded time: one device that does not answer keeps no
//! other store from being served.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rmr_common::pool::{PoolId, StoreId};

use super::Shared;
use super::judge::{Candidate, FileId, Served, Verdict, judge};
use super::places::{PoolPlace, Reservation, Stage};
use super::remembered::{Entry, Remembered};
use super::shard::{Command, ShardHandle};
use crate::admin::api::{
    ControlError, CreateStore, ErrorCode, LeftOut, OpenStore, StoreChanged, StoreCreated, StoreList,
    StoreName, UnixMs,
};
use crate::ctl::advice::Advice;
use crate::store::{CreateOptions, Store, StoreError, ZeroPolicy};

/// Work on devices that is under way at once.
const AT_ONCE: usize = 16;
/// A device that takes longer keeps no other one waiting.
const SLOW: Duration = Duration::from_secs(2);
/// A device that takes longer counts as one that does not answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// First pause before a store that was left out is tried again; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Longest wait for the same store, which is being made for an earlier request.
const MAKING: Duration = Duration::from_secs(60);
/// A store that was served for this long begins with the first pause again.
const IS_WELL: Duration = Duration::from_secs(600);

/// When a store that was left out is tried again.
#[derive(Clone, Copy, Debug)]
struct Retry {
    attempts: u32,
    due: Instant,
}

/// What is known of attempts to open stores, by path.
#[derive(Default)]
pub(crate) struct Retries {
    by_path: HashMap<PathBuf, Retry>,
    /// When a store that had been left out was opened again, and how many attempts that took.
    opened: HashMap<PathBuf, (Instant, u32)>,
}

impl Retries {
    /// One more attempt failed, or a store stopped to be served: when to try again.
    fn failed(&mut self, path: &Path, now: Instant) -> Retry {
        let before = match self.opened.remove(path) {
            Some((since, attempts)) if now.duration_since(since) < IS_WELL => attempts,
            _ => self.by_path.get(path).map_or(0, |retry| retry.attempts),
        };
        let pause = FIRST_PAUSE.saturating_mul(1 << before.min(16)).min(LONGEST_PAUSE);
        let retry = Retry { attempts: before.saturating_add(1), due: now + pause };
        self.by_path.insert(path.to_owned(), retry);
        retry
    }

    fn succeeded(&mut self, path: &Path, now: Instant) {
        if let Some(retry) = self.by_path.remove(path) {
            self.opened.insert(path.to_owned(), (now, retry.attempts));
        }
    }

    fn forget(&mut self, path: &Path) {
        self.by_path.remove(path);
        self.opened.remove(path);
    }
}

impl Shared {
    fn retries(&self) -> MutexGuard<'_, Retries> {
        self.retries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stores outside the store directory; none without a store directory.
    fn remembered(&self) -> MutexGuard<'_, Option<Remembered>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a store that is deleted off the list of those to open. Waits for the disk of the store directory.
    pub(super) fn forget_store(&self, path: &Path) -> Result<(), String> {
        self.retries().forget(path);
        self.remembered().as_mut().map_or(Ok(()), |list| list.remove(path))
    }

    /// Leaves a store out, to be tried again after a pause; `closed` for one that an operator closed, which is not.
    pub(super) fn leave_out(&self, mut entry: LeftOut) {
        if entry.closed {
            self.retries().forget(&entry.path);
        } else {
            entry.attempts = self.retries().failed(&entry.path, Instant::now()).attempts;
        }
        let (words, is_closed) = (entry.words(), entry.closed);
        let is_news = self.pools().leave_out(entry);
        if is_news && !is_closed {
            tracing::error!(node = %self.config.node_name, "{words}");
        }
    }

    /// The stores left out, with the time until the next attempt.
    pub(super) fn left_out(&self) -> Vec<LeftOut> {
        let mut list: Vec<LeftOut> = self.pools().left_out().cloned().collect();
        let (now, retries) = (Instant::now(), self.retries());
        for entry in &mut list {
            let retry = retries.by_path.get(&entry.path).filter(|_| !entry.closed);
            entry.next_attempt_s = retry.map(|retry| retry.due.saturating_duration_since(now).as_secs());
        }
        list
    }
}

/// An entry for a store of which nothing is known but its path.
fn unknown(path: &Path, reason: String) -> LeftOut {
    LeftOut {
        path: path.to_owned(),
        pool: None,
        name: None,
        member: None,
        store: None,
        reason,
        closed: false,
        since_unix_ms: UnixMs::now(),
        attempts: 0,
        next_attempt_s: None,
    }
}

fn known(candidate: &Candidate, reason: String) -> LeftOut {
    LeftOut {
        pool: Some(candidate.pool),
        name: Some(candidate.name.clone()),
        member: Some(candidate.member),
        store: Some(candidate.store),
        ..unknown(&candidate.path, reason)
    }
}

/// Does the same for each path, on threads; `None` for those that take longer than a device may.
fn for_each<T: Send + 'static>(
    paths: Vec<PathBuf>,
    patience: Duration,
    work: impl Fn(&Path) -> T + Send + Sync + 'static,
) -> Vec<(PathBuf, Option<T>)> {
    let (work, order) = (Arc::new(work), paths.clone());
    let (sender, receiver) = mpsc::channel();
    let mut waiting: VecDeque<PathBuf> = paths.into();
    let mut begun: HashMap<PathBuf, Instant> = HashMap::new();
    let mut done: HashMap<PathBuf, T> = HashMap::new();
    loop {
        let now = Instant::now();
        let quick = begun.values().filter(|since| now.duration_since(**since) < SLOW).count();
        for path in waiting.drain(..AT_ONCE.saturating_sub(quick).min(waiting.len())) {
            let (work, sender, own) = (Arc::clone(&work), sender.clone(), path.clone());
            let run = move || drop(sender.send((own.clone(), work(&own))));
            match std::thread::Builder::new().name("open-store".into()).spawn(run) {
                Ok(_) => drop(begun.insert(path, now)),
                Err(error) => {
                    tracing::error!(path = %path.display(), "no thread to look at a store: {error}")
                }
            }
        }
        begun.retain(|_, since| now.duration_since(*since) < patience);
        if begun.is_empty() && waiting.is_empty() {
            break;
        }
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok((path, result)) => {
                // One that comes too late is dropped, and with it the store that it opened.
                if begun.remove(&path).is_some() {
                    done.insert(path, result);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    order.into_iter().map(|path| (path.clone(), done.remove(&path))).collect()
}

/// See the module's comment.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    shards: Vec<ShardHandle>,
    /// One round of opening at a time: two would judge without knowing of each other.
    round: Mutex<()>,
    /// Paths whose look did not end: another one would only hang as well.
    hanging: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, shards: Vec<ShardHandle>) -> Self {
        if let Some(problem) = shared.remembered().as_ref().and_then(Remembered::problem) {
            tracing::error!("{problem}");
        }
        Self { shared, shards, round: Mutex::default(), hanging: Arc::default() }
    }

    /// What is wrong with the list of remembered stores.
    pub(super) fn problems(&self) -> Vec<String> {
        self.shared
            .remembered()
            .as_ref()
            .and_then(Remembered::problem)
            .map(str::to_owned)
            .into_iter()
            .collect()
    }

    /// Opens every store that the node has; returns the number that are open.
    pub(super) fn open_all(&self) -> anyhow::Result<usize> {
        let mut paths = self.shared.config.stores_to_open()?;
        for entry in self.shared.remembered().iter().flat_map(Remembered::entries) {
            if !paths.contains(&entry.path) {
                paths.push(entry.path.clone());
            }
        }
        self.round(&paths, &|_| true);
        Ok(self.shared.pools().open_count())
    }

    /// Tries stores again that were left out and are due. Called on a thread of its own, for ever, about once a second.
    pub(super) fn retry_due(&self) {
        let now = Instant::now();
        let mut left_out: Vec<PathBuf> =
            self.shared.pools().left_out().filter(|l| !l.closed).map(|l| l.path.clone()).collect();
        let due: HashSet<PathBuf> = {
            let retries = self.shared.retries();
            let is_due = |path: &&PathBuf| retries.by_path.get(*path).is_none_or(|retry| retry.due <= now);
            left_out.iter().filter(is_due).cloned().collect()
        };
        if due.is_empty() {
            return;
        }
        // Whoever took a file out of the store directory wants nothing of it here.
        left_out.retain(|path| {
            let is_gone =
                due.contains(path) && self.is_scanned(path) && std::fs::symlink_metadata(path).is_err();
            if is_gone {
                self.shared.retries().forget(path);
                self.shared.pools().take_in(path);
                tracing::info!(path = %path.display(), "the store is not there any more, and off the list");
            }
            !is_gone
        });
        // All of them are judged together: the one that is in the way of another may not be due.
        self.round(&left_out, &|path| due.contains(path));
    }

    /// Whether the path is found in the store directory at each start.
    fn is_scanned(&self, path: &Path) -> bool {
        self.shared.config.is_in_store_dir(path)
    }

    /// Looks at stores, judges them, and opens those that may be and are wanted.
    fn round(&self, paths: &[PathBuf], is_wanted: &dyn Fn(&Path) -> bool) {
        let _one = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let candidates = self.look(paths);
        let mut served: Vec<Served> = self
            .shared
            .pools()
            .all()
            .map(|(pool, place)| Served {
                path: place.path.clone(),
                file: None,
                pool,
                name: place.name.clone(),
                store: place.store,
            })
            .collect();
        // Not under the lock of the list: it asks file systems.
        for store in &mut served {
            store.file = FileId::at(&store.path);
        }
        let mut opening = Vec::new();
        for (candidate, verdict) in candidates.iter().zip(judge(&candidates, &served)) {
            let path = &candidate.path;
            match verdict {
                // It is on the list with the reason why it could not be read.
                _ if candidate.file.is_none() => {}
                Verdict::SameFile => {
                    tracing::info!(path = %path.display(), "another name of a store that is opened by its first one");
                    self.shared.pools().take_in(path);
                }
                Verdict::LeaveOut(reason) if is_wanted(path) => {
                    self.shared.leave_out(known(candidate, reason))
                }
                Verdict::Open if is_wanted(path) => match self.reserve(candidate) {
                    Ok(reservation) => opening.push((candidate.clone(), reservation)),
                    Err(error) => self.shared.leave_out(known(candidate, error.message)),
                },
                Verdict::LeaveOut(_) | Verdict::Open => {}
            }
        }
        self.open(opening);
    }

    /// Reads what the stores are. Those that cannot be read are left out; what is known of them from before counts.
    fn look(&self, paths: &[PathBuf]) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        let hanging = Arc::clone(&self.hanging);
        let lock = |set: &Mutex<HashSet<PathBuf>>| {
            set.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect::<HashSet<_>>()
        };
        let stuck = lock(&self.hanging);
        let tried: Vec<PathBuf> = paths.iter().filter(|p| !stuck.contains(*p)).cloned().collect();
        let look = move |path: &Path| {
            let change = |hangs: bool| {
                let mut set = hanging.lock().unwrap_or_else(PoisonError::into_inner);
                if hangs { set.insert(path.to_owned()) } else { set.remove(path) }
            };
            change(true);
            let found = Candidate::read(path);
            change(false);
            found
        };
        let mut found: HashMap<PathBuf, Option<Result<Candidate, StoreError>>> =
            for_each(tried, PATIENCE, look).into_iter().collect();
        for path in paths {
            let reason = match found.remove(path).flatten() {
                Some(Ok(candidate)) => {
                    candidates.push(candidate);
                    continue;
                }
                Some(Err(error)) => error.to_string(),
                None => format!("{}: it does not answer", path.display()),
            };
            self.shared.leave_out(unknown(path, reason));
            if let Some(entry) = self.shared.pools().left_out_at(path)
                && let (Some(pool), Some(name), Some(member), Some(store)) =
                    (entry.pool, entry.name.clone(), entry.member, entry.store)
            {
                let order = Default::default();
                let path = path.clone();
                candidates.push(Candidate {
                    path,
                    file: None,
                    pool,
                    name,
                    member,
                    store,
                    order,
                    has_served: true,
                });
            }
        }
        candidates
    }

    fn reserve(&self, candidate: &Candidate) -> Result<Reservation, ControlError> {
        self.reserve_place(candidate.pool, &candidate.name, candidate.store, &candidate.path)
    }

    fn reserve_place(
        &self,
        pool: PoolId,
        name: &str,
        store: StoreId,
        path: &Path,
    ) -> Result<Reservation, ControlError> {
        let shard = {
            let pools = self.shared.pools();
            let (count, most) = (pools.all().count(), self.shared.max_stores);
            if count >= most {
                let text = format!(
                    "this node has {count} stores, as many as it may have: raise max_stores and the limit of open files \
                     (LimitNOFILE=), of which each store needs {}",
                    super::DESCRIPTORS_PER_STORE
                );
                return Err(ControlError::new(ErrorCode::NoSpace, text));
            }
            pools.emptiest_shard(self.shards.len())
        };
        let place =
            PoolPlace { name: name.to_owned(), store, path: path.to_owned(), shard, stage: Stage::Making };
        Reservation::take(&self.shared, pool, place)
    }

    /// Opens stores whose places are reserved, and has them served.
    fn open(&self, opening: Vec<(Candidate, Reservation)>) {
        let pools: HashMap<PathBuf, PoolId> = opening.iter().map(|(c, _)| (c.path.clone(), c.pool)).collect();
        let paths = opening.iter().map(|(c, _)| c.path.clone()).collect();
        let opened = for_each(paths, PATIENCE, move |path| Store::open(path, pools.get(path).copied()));
        let mut adopting = Vec::new();
        for ((candidate, reservation), (path, result)) in opening.into_iter().zip(opened) {
            let reason = match result {
                Some(Ok(store)) if store.superblock().store == candidate.store => {
                    adopting.push((candidate, reservation, self.adopt(store)));
                    continue;
                }
                Some(Ok(_)) => format!("{}: it has become another store", path.display()),
                Some(Err(error)) => error.to_string(),
                None => format!("{}: it does not answer", path.display()),
            };
            drop(reservation);
            self.shared.leave_out(known(&candidate, reason));
        }
        for (candidate, reservation, answer) in adopting {
            match adopted(&answer) {
                Ok(()) => {
                    self.shared.retries().succeeded(&candidate.path, Instant::now());
                    if self.shared.pools().take_in(&candidate.path).is_some() {
                        let (pool, path) = (&candidate.name, candidate.path.display());
                        tracing::info!(%pool, member = %candidate.member, %path, "the store that was left out is served again");
                    }
                }
                Err(error) => {
                    drop(reservation);
                    self.shared.leave_out(known(&candidate, error.message));
                }
            }
        }
    }

    /// Gives an open store to the shard that its place names; the answer comes when it is served.
    fn adopt(&self, store: Store) -> mpsc::Receiver<Result<(), ControlError>> {
        let (sender, answer) = mpsc::channel();
        let shard = self.shared.pools().get(store.superblock().spec.id).map_or(0, |place| place.shard);
        if let Some(handle) = self.shards.get(shard) {
            handle.send(Command::Adopt(Box::new(store), sender));
        }
        answer
    }
}

fn adopted(answer: &mpsc::Receiver<Result<(), ControlError>>) -> Result<(), ControlError> {
    answer.recv().unwrap_or_else(|_| Err(ControlError::new(ErrorCode::Busy, "the node is stopping")))
}

/// What operators ask for.
impl Keeper {
    /// The stores of the node.
    pub(super) fn list(&self) -> StoreList {
        let mut open: Vec<OpenStore> = self
            .shared
            .pools()
            .all()
            .map(|(pool, place)| OpenStore {
                path: place.path.clone(),
                pool,
                name: place.name.clone(),
                store: place.store,
                stage: match place.stage {
                    Stage::Making => "making",
                    Stage::Open => "open",
                    Stage::Closing => "closing",
                }
                .to_owned(),
            })
            .collect();
        open.sort_by(|a, b| (&a.name, a.pool).cmp(&(&b.name, b.pool)));
        let node = self.shared.config.node_name.clone();
        let (left_out, problems) = (self.shared.left_out(), self.problems());
        StoreList { node, open, left_out, problems, data_addresses: self.shared.advertised().clone() }
    }

    /// Makes a store, opens it and serves it. Whatever does not come that far is removed again.
    pub(super) fn create(&self, request: &CreateStore) -> Result<StoreCreated, ControlError> {
        let (spec, invalid) = (&request.spec, |text: String| ControlError::new(ErrorCode::Invalid, text));
        let Some(member) = spec.member(request.member) else {
            return Err(invalid(format!("pool '{}' has no member {}", spec.name, request.member)));
        };
        // A command may be given again while the first one is still carried out here.
        let since = Instant::now();
        loop {
            match self.is_made(spec.id, member.store) {
                Some(Err(_)) if since.elapsed() < MAKING => std::thread::sleep(Duration::from_millis(50)),
                Some(made) => return made,
                None => break,
            }
        }
        let path = match &request.path {
            Some(path) if is_link_to_file(path) => return Err(StoreError::Link(path.clone()).into()),
            Some(path) => self.check_path(path)?,
            None => self.shared.config.new_store_path(spec.id, request.member).ok_or_else(|| {
                let text =
                    "this node has no store directory (store_dir): name a device or file for the store";
                invalid(text.to_owned())
            })?,
        };
        if let Some(other) = self.shared.pools().left_out_name(spec.id, &spec.name) {
            let text = format!(
                "this node knows another pool of the name '{}': {}. Choose another name, or delete that store first: \
                 {}",
                spec.name,
                other.words(),
                Advice::delete_store_here(&other.path)
            );
            return Err(ControlError::new(ErrorCode::Exists, text));
        }
        let reservation = self.reserve_place(spec.id, &spec.name, member.store, &path)?;
        let options = CreateOptions {
            spec: spec.clone(),
            member: request.member,
            store: member.store,
            view: request.view.clone(),
            overwrite: request.overwrite,
            zero: if request.assume_zero { ZeroPolicy::Check } else { ZeroPolicy::Zero },
            max_size: request.max_size_bytes,
        };
        let was_there = std::fs::symlink_metadata(&path).is_ok();
        // Before it is made: a node that dies in between finds it at its next start, and the same command goes on with it.
        let was_remembered = self.remember(&path, !was_there)?;
        if let Err(error) = Store::create(&path, &options, &mut |_, _| {}) {
            if !was_remembered && let Err(left) = self.shared.forget_store(&path) {
                tracing::error!(path = %path.display(), "a store that was not made stays on the list of those to open: {left}");
            }
            return Err(error.into());
        }
        let served = self.serve_new(&path, spec.id);
        let warnings = match served {
            Ok(warnings) => warnings,
            Err(error) => {
                // It would be there after the next start, and take the place of another one.
                let removed = match was_there {
                    true => Store::destroy(&path, Some(spec.id)),
                    false => Store::remove(&path, Some(spec.id)),
                };
                let mut text = error.message;
                if let Err(left) =
                    removed.map_err(|e| e.to_string()).and_then(|_| self.shared.forget_store(&path))
                {
                    text += &format!("; what was made is NOT removed: {left}");
                }
                return Err(ControlError::new(error.code, text));
            }
        };
        drop(reservation);
        self.shared.retries().forget(&path);
        self.shared.pools().take_in(&path);
        for warning in &warnings {
            tracing::warn!(pool = %spec.name, member = %request.member, "{warning}");
        }
        Ok(StoreCreated { store: member.store, path, warnings })
    }

    /// The answer to a creation that was carried out already: its answer was lost, or the command was cut short elsewhere.
    fn is_made(&self, pool: PoolId, store: StoreId) -> Option<Result<StoreCreated, ControlError>> {
        let pools = self.shared.pools();
        let place = pools.get(pool).filter(|place| place.store == store)?;
        Some(match place.stage {
            Stage::Open => Ok(StoreCreated { store, path: place.path.clone(), warnings: Vec::new() }),
            Stage::Making | Stage::Closing => {
                let text =
                    format!("store {store} of pool '{}' is being made or closed: try again", place.name);
                Err(ControlError::new(ErrorCode::Busy, text))
            }
        })
    }

    /// Where a store is made or opened for a request that names this path, if it may be there: where the configuration allows
    /// it, and where it is found again at the next start.
    fn check_path(&self, path: &Path) -> Result<PathBuf, ControlError> {
        let invalid = |text: String| ControlError::new(ErrorCode::Invalid, text);
        let config = &self.shared.config;
        // A listed device that is not there leads nowhere, and is still the one that is meant.
        let is_listed = config.stores.iter().chain(&config.store_places).any(|listed| listed == path);
        let place = if is_listed && std::fs::symlink_metadata(path).is_err() {
            path.to_owned()
        } else {
            config
                .place_for_store(path)
                .map_err(|error| ControlError::new(ErrorCode::Forbidden, error.to_string()))?
        };
        let shown = path.display();
        let is_there = std::fs::symlink_metadata(path).is_ok();
        if let (Some(parent), false) = (path.parent(), is_there) {
            let real =
                std::fs::canonicalize(parent).map_err(|e| invalid(format!("{}: {e}", parent.display())))?;
            let own = self.shared.config.store_dir.as_ref().and_then(|dir| std::fs::canonicalize(dir).ok());
            if real != parent && Some(&real) != own.as_ref() {
                let text = format!(
                    "{shown}: its directory is {}, by a symbolic link or by dots, which are not followed where a file is made: \
                     name it so",
                    real.display()
                );
                return Err(invalid(text));
            }
        }
        if self.is_found_at_start(path) {
            return Ok(path.to_owned());
        }
        // The store directory may be named by another way.
        if let Some(own) = &config.store_dir
            && let (Some(parent), Some(name)) = (place.parent(), place.file_name())
            && std::fs::canonicalize(own).is_ok_and(|own| own == parent)
        {
            let named = own.join(name);
            if self.is_scanned(&named) {
                return Ok(named);
            }
        }
        match &*self.shared.remembered() {
            Some(list) => match list.problem() {
                Some(problem) => Err(invalid(problem.to_owned())),
                None => Ok(place),
            },
            None => Err(invalid(format!(
                "{shown}: this node would not open it after its next start. Add it to its configuration and start the node again, \
                 or give it a store_dir, where it remembers such paths:\n  stores = [\"{shown}\"]"
            ))),
        }
    }

    /// Whether the configuration names the path, or its directory.
    fn is_found_at_start(&self, path: &Path) -> bool {
        self.is_scanned(path) || self.shared.config.stores.iter().any(|p| p == path)
    }

    /// Has a store served that was just made.
    fn serve_new(&self, path: &Path, pool: PoolId) -> Result<Vec<String>, ControlError> {
        let store = Store::open(path, Some(pool))?;
        let warnings = store.space_warning().into_iter().collect();
        adopted(&self.adopt(store))?;
        Ok(warnings)
    }

    /// Sees to it that the path is looked at at each start; true if that was so before.
    fn remember(&self, path: &Path, made: bool) -> Result<bool, ControlError> {
        if self.is_found_at_start(path) {
            return Ok(true);
        }
        let mut remembered = self.shared.remembered();
        let Some(list) = &mut *remembered else { return Ok(true) };
        if list.entries().iter().any(|e| e.path == path) {
            return Ok(true);
        }
        let added = list.add(Entry { path: path.to_owned(), made });
        added.map(|()| false).map_err(|e| {
            ControlError::new(ErrorCode::Internal, format!("the node cannot remember the store: {e}"))
        })
    }

    /// Whether this node made the file, so that it removes it with the store.
    pub(super) fn is_own(&self, path: &Path) -> bool {
        let remembered = self.shared.remembered();
        let made = remembered.as_ref().is_some_and(|l| l.entries().iter().any(|e| e.path == path && e.made));
        made || self.is_scanned(path)
    }

    /// Opens a store by command: one that was left out or closed, or another one.
    pub(super) fn open_by_command(&self, path: &Path) -> Result<StoreChanged, ControlError> {
        if let Some((_, place)) = self.shared.pools().at(path) {
            let (store, name, notes) =
                (Some(place.store), Some(place.name.clone()), vec!["it is open already".into()]);
            return match place.stage {
                Stage::Open => Ok(StoreChanged { path: path.to_owned(), store, name, notes }),
                Stage::Making | Stage::Closing => {
                    let text = format!("{}: it is being made or closed: try again", path.display());
                    Err(ControlError::new(ErrorCode::Busy, text))
                }
            };
        }
        let path = &*self.check_path(path)?;
        if let Some((_, place)) = self.shared.pools().at(path).filter(|(_, place)| place.stage == Stage::Open)
        {
            let (store, name) = (Some(place.store), Some(place.name.clone()));
            let notes = vec!["it is open already".into()];
            return Ok(StoreChanged { path: path.to_owned(), store, name, notes });
        }
        let others: Vec<PathBuf> = {
            let mut pools = self.shared.pools();
            if let Some(mut entry) = pools.left_out_at(path).cloned() {
                entry.closed = false;
                pools.leave_out(entry);
            }
            pools.left_out().filter(|l| !l.closed && l.path != path).map(|l| l.path.clone()).collect()
        };
        let was_known = self.is_found_at_start(path) || self.shared.pools().left_out_at(path).is_some();
        let paths: Vec<PathBuf> = std::iter::once(path.to_owned()).chain(others).collect();
        self.round(&paths, &|wanted| wanted == path);
        let (entry, place) = {
            let pools = self.shared.pools();
            (pools.left_out_at(path).cloned(), pools.at(path).map(|(_, place)| place.clone()))
        };
        if let Some(place) = place {
            self.remember(path, false)?;
            let (store, name) = (Some(place.store), Some(place.name));
            return Ok(StoreChanged { path: path.to_owned(), store, name, notes: Vec::new() });
        }
        let Some(entry) = entry else {
            let text = format!("{}: another name of a store that the node has already", path.display());
            return Err(ControlError::new(ErrorCode::Exists, text));
        };
        if !was_known {
            // Nobody wants to hear of it again.
            self.shared.retries().forget(path);
            self.shared.pools().take_in(path);
        }
        Err(ControlError::new(ErrorCode::InUse, format!("not opened: {}", entry.words())))
    }

    /// Deletes a store that is left out. What cannot be read, and so not destroyed, is only forgotten.
    pub(super) fn delete_left_out(&self, name: &StoreName) -> Result<StoreChanged, ControlError> {
        let _one = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = self.find_left_out(name)?;
        let path = &entry.path;
        let refused =
            |text: String| ControlError::new(ErrorCode::Invalid, format!("nothing is deleted: {text}"));
        let mut notes = Vec::new();
        match Store::identify(path) {
            Ok(found) if entry.store.is_some_and(|store| store != found.store) => {
                let text = format!(
                    "{} holds store {} of pool '{}' now, another one than before: look again with `{}`",
                    path.display(),
                    found.store,
                    found.spec.name,
                    Advice::list_stores_here()
                );
                return Err(refused(text));
            }
            Ok(found) => {
                let pool = Some(found.spec.id);
                let done =
                    if self.is_own(path) { Store::remove(path, pool) } else { Store::destroy(path, pool) };
                done?;
            }
            Err(error) if self.is_scanned(path) && std::fs::symlink_metadata(path).is_ok() => {
                return Err(refused(format!("{error}; if nobody needs the file, remove it by hand")));
            }
            Err(error) => {
                notes.push(format!("it is off the list, and nothing was destroyed: {error}"));
                if self.shared.config.stores.contains(path) {
                    notes.push("it is in `stores` of the node's configuration: take it out there".to_owned());
                }
            }
        }
        self.shared.forget_store(path).map_err(|e| ControlError::new(ErrorCode::Internal, e))?;
        self.shared.retries().forget(path);
        self.shared.pools().take_in(path);
        tracing::info!(path = %path.display(), "a store that was left out is deleted");
        Ok(StoreChanged { path: entry.path, store: entry.store, name: entry.name, notes })
    }

    /// Marks a store that is left out as closed: it is not tried again.
    pub(super) fn close_left_out(&self, name: &StoreName) -> Result<StoreChanged, ControlError> {
        let mut entry = self.find_left_out(name)?;
        entry.closed = true;
        let (path, store, pool) = (entry.path.clone(), entry.store, entry.name.clone());
        self.shared.leave_out(entry);
        Ok(StoreChanged { path, store, name: pool, notes: vec!["it was not open".to_owned()] })
    }

    fn find_left_out(&self, name: &StoreName) -> Result<LeftOut, ControlError> {
        let pools = self.shared.pools();
        let found: Vec<&LeftOut> = pools
            .left_out()
            .filter(|l| name.path.as_ref().is_none_or(|path| *path == l.path))
            .filter(|l| name.store.is_none_or(|store| Some(store) == l.store))
            .collect();
        match found[..] {
            [one] => Ok(one.clone()),
            [] => {
                let text = format!("this node has no {name}, neither open nor left out");
                Err(ControlError::new(ErrorCode::NotFound, text))
            }
            _ => {
                let paths: Vec<_> = found.iter().map(|l| l.path.display().to_string()).collect();
                let text =
                    format!("{name} is at several paths, name the one that is meant: {}", paths.join(", "));
                Err(ControlError::new(ErrorCode::Invalid, text))
            }
        }
    }
}

fn is_link_to_file(path: &Path) -> bool {
    let is_link = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_symlink());
    is_link && !std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_attempts_double_up_to_minutes_and_begin_anew_after_a_time_of_service() {
        let mut retries = Retries::default();
        let (path, start) = (Path::new("/dev/vdb"), Instant::now());
        let pauses: Vec<u64> = (0..11).map(|_| (retries.failed(path, start).due - start).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        // Opened, and failed again at once.
        retries.succeeded(path, start);
        assert_eq!((retries.failed(path, start).due - start).as_secs(), 300);
        retries.succeeded(path, start);
        let later = start + IS_WELL;
        assert_eq!((retries.failed(path, later).due - later).as_secs(), 1);
    }

    #[test]
    fn a_path_that_does_not_answer_keeps_no_other_one_waiting() {
        let paths: Vec<PathBuf> = (0..40).map(|n| PathBuf::from(format!("{n}"))).collect();
        let work = |path: &Path| {
            if path == Path::new("3") {
                std::thread::sleep(Duration::from_secs(60));
            }
            path.to_owned()
        };
        let done = for_each(paths.clone(), Duration::from_secs(1), work);
        for (path, (asked, result)) in paths.iter().zip(&done) {
            assert_eq!((asked, result.is_some()), (path, path != Path::new("3")));
        }
    }
}
