//! Routes of the admin API: from HTTP to [`NodeControl`] and back.
//!
//! Every answer is JSON (but for the metrics page); every refusal has the same shape, an [`ErrorBody`].

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{
    DefaultBodyLimit, Extension, FromRef, FromRequest, FromRequestParts, Path, Query, Request, State,
};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use rmr_common::pool::{Command, CommandReply, StoreId};
use rmr_common::words;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, info};
use uuid::Uuid;

use super::api::{
    ControlError, CreateStore, DeleteStore, ErrorBody, ErrorCode, Health, LeftOut, NodeInfo, PoolKey,
    PoolList, PoolStatus, StoreCreated, StoreDeleted, StoreList, StoreState, UnixMs,
};
use super::connections::Work;
use super::words::{condition_words, disk_words};
use super::{AdminLimits, HostNames, NodeControl, metrics, stores};

pub(super) type Control = State<Arc<dyn NodeControl>>;
pub(super) type Answer<T> = Result<Json<T>, Refusal>;

/// What handlers share.
#[derive(Clone)]
pub(super) struct App {
    pub(super) control: Arc<dyn NodeControl>,
    limits: AdminLimits,
    /// For requests that may take long: a reserve of connections is kept from them.
    long: Arc<Semaphore>,
}

impl FromRef<App> for Arc<dyn NodeControl> {
    fn from_ref(app: &App) -> Self {
        Arc::clone(&app.control)
    }
}

/// How long a caller has to send the body of a request, at most.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// The router with its limits. Each connection adds its own [`Work`].
pub(super) fn router(control: Arc<dyn NodeControl>, limits: AdminLimits, names: HostNames) -> Router {
    let quick = Router::new()
        .route("/v1/node", get(node))
        .route("/v1/health", get(health))
        .route("/v1/pools", get(pools))
        .route("/v1/pools/{key}", get(pool))
        .route("/v1/stores/{uuid}", delete(delete_store))
        .route("/metrics", get(metrics_page))
        .layer(middleware::from_fn(move |request: Request, next: Next| async move {
            // These have no body: all of the request is here.
            let work = request.extensions().get::<Work>().map(Work::begin);
            let answer = within(limits.request_timeout, next.run(request)).await;
            drop(work);
            answer.unwrap_or_else(IntoResponse::into_response)
        }));
    let names = Arc::new(names);
    let long = Arc::new(Semaphore::new((limits.max_connections - limits.max_connections / 4).max(1)));
    quick
        .route("/v1/stores", post(create_store))
        .route("/v1/pools/{key}/commands", post(command))
        .merge(stores::routes())
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(limits.max_body))
        .layer(middleware::from_fn(move |request: Request, next: Next| {
            let names = Arc::clone(&names);
            async move {
                match names.check(request.version(), request.uri(), request.headers()) {
                    Ok(()) => next.run(request).await,
                    Err(message) => Refusal::new(ErrorCode::Forbidden, message).into_response(),
                }
            }
        }))
        .with_state(App { control, limits, long })
}

impl App {
    /// Reads the body of a request that may take long.
    pub(super) async fn body<T: DeserializeOwned>(&self, request: Request) -> Result<T, Refusal> {
        let limit = self.limits.request_timeout.min(BODY_LIMIT);
        let JsonOf(body) = within(limit, JsonOf::<T>::from_request(request, self)).await??;
        Ok(body)
    }

    /// A place among the requests that may take long.
    pub(super) fn long_work(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        Arc::clone(&self.long).try_acquire_owned().map_err(|_| {
            let message = "too many creations of stores and commands are under way on this node; wait until one of them is done";
            Refusal::new(ErrorCode::Busy, message)
        })
    }
}

/// Waits as long as a request may take.
async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, Refusal> {
    tokio::time::timeout(limit, work).await.map_err(|_| {
        let limit = words::time(limit);
        let message = format!("the node did not finish within {limit}; it may still carry the request out");
        Refusal::new(ErrorCode::Timeout, message)
    })
}

async fn node(State(control): Control) -> Answer<NodeInfo> {
    Ok(Json(control.node_info().await?))
}

async fn health(State(control): Control) -> Result<Response, Refusal> {
    let pools = sorted_pools(&control).await?;
    let mut problems = Vec::new();
    for p in &pools {
        if let StoreState::Waiting { reason } | StoreState::Failed { reason } = &p.store_state {
            problems.push(format!("pool '{}' member {}: {reason}", p.spec.name, p.member));
        }
        if p.store_state == StoreState::Serving && p.is_regressed() {
            problems.push(format!(
                "pool '{}' member {}: its store went back in time (restored from a copy?) and is copied over in full",
                p.spec.name, p.member
            ));
        }
        if let Some(disk) = &p.disk {
            problems.push(format!("pool '{}' member {}: {}", p.spec.name, p.member, disk_words(disk)));
        }
        for peer in &p.peers {
            if let Some(condition) = &peer.condition {
                problems.push(format!(
                    "pool '{}' member {} is not current, as its client says: {}",
                    p.spec.name,
                    peer.member,
                    condition_words(condition, UnixMs::now())
                ));
            }
        }
    }
    let list = control.stores().await?;
    problems.extend(list.left_out.iter().map(LeftOut::words));
    let is_faulty = list.left_out.iter().any(|l| !l.closed) || !list.problems.is_empty();
    problems.extend(list.problems);
    let stores = u32::try_from(pools.len()).unwrap_or(u32::MAX);
    // A store that waits needs its peers, and what is the matter with other nodes is no fault of this one.
    let is_sick = |p: &PoolStatus| matches!(p.store_state, StoreState::Failed { .. }) || p.disk.is_some();
    let healthy = !is_faulty && !pools.iter().any(is_sick);
    let health = Health { healthy, stores, problems };
    let status = if health.healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((status, Json(health)).into_response())
}

async fn pools(State(control): Control) -> Answer<PoolList> {
    let (pools, stores) = (sorted_pools(&control).await?, control.stores().await?);
    let StoreList { node, left_out, data_addresses, .. } = stores;
    Ok(Json(PoolList { pools, left_out, node, data_addresses }))
}

async fn pool(State(control): Control, PathOf(key): PathOf<String>) -> Answer<PoolStatus> {
    let key: PoolKey = key.parse().map_err(|e| Refusal::new(ErrorCode::Invalid, format!("{e}")))?;
    let mut found = sorted_pools(&control).await?;
    found.retain(|p| key.matches(&p.spec));
    match found.len() {
        0 => Err(Refusal::new(ErrorCode::NotFound, format!("there is no pool {key} on this node"))),
        1 => Ok(Json(found.remove(0))),
        _ => {
            let ids: Vec<_> = found.iter().map(|p| format!("{} (store {})", p.spec.id, p.store)).collect();
            let message = format!("{key} names {} stores on this node: {}", found.len(), ids.join(", "));
            Err(Refusal::new(ErrorCode::Invalid, message))
        }
    }
}

/// Without a limit of time once the request was read: a disk that must be zeroed takes as long as it takes. The
/// caller may hang up, and the node carries on.
async fn create_store(
    State(app): State<App>,
    Extension(work): Extension<Work>,
    request: Request,
) -> Answer<StoreCreated> {
    let request: CreateStore = app.body(request).await?;
    check_create(&request).map_err(|message| Refusal::new(ErrorCode::Invalid, message))?;
    let (pool, name, member) = (request.spec.id, request.spec.name.clone(), request.member);
    let _guard = (app.long_work()?, work.begin());
    let created = app.control.create_store(request).await?;
    info!(%pool, name, %member, store = %created.store, path = %created.path.display(), "store created");
    Ok(Json(created))
}

/// As with a creation, there is no limit of time once the request was read: a pool grows as fast as its devices can be zeroed.
async fn command(
    State(app): State<App>,
    Extension(work): Extension<Work>,
    PathOf(key): PathOf<String>,
    request: Request,
) -> Answer<CommandReply> {
    let key: PoolKey = key.parse().map_err(|e| Refusal::new(ErrorCode::Invalid, format!("{e}")))?;
    let command: Command = app.body(request).await?;
    let _guard = (app.long_work()?, work.begin());
    let reply = app.control.command(key.clone(), command.clone()).await?;
    match &reply {
        CommandReply::Done { view, .. } => info!(pool = %key, view = %view.number, "done: {command}"),
        CommandReply::Refused { text, .. } => info!(pool = %key, "refused: {command}: {text}"),
        // Asked for again and again; the client logs how a verify begins and ends.
        CommandReply::Verify { .. } => debug!(pool = %key, "{command}"),
    }
    Ok(Json(reply))
}

/// What must hold between the parts of the request, so that the service only sees consistent ones.
fn check_create(request: &CreateStore) -> Result<(), String> {
    request.spec.validate().map_err(|e| e.to_string())?;
    request.view.validate().map_err(|e| e.to_string())?;
    let member = request.member;
    let in_spec = request.spec.member(member).ok_or(format!("member {member} is not in the pool"))?;
    let in_view = request.view.member(member).ok_or(format!("member {member} is not in the view"))?;
    if in_spec.store != in_view.store {
        return Err(format!(
            "member {member} has store {} in the pool and {} in the view: expected the same",
            in_spec.store, in_view.store
        ));
    }
    match &request.path {
        Some(path) if !path.is_absolute() => {
            Err(format!("store path '{}': expected an absolute path", path.display()))
        }
        _ => Ok(()),
    }
}

async fn delete_store(
    State(control): Control,
    PathOf(uuid): PathOf<Uuid>,
    QueryOf(request): QueryOf<DeleteStore>,
) -> Answer<StoreDeleted> {
    let store = StoreId(uuid);
    control.delete_store(store, request).await?;
    info!(%store, force = request.force, "store deleted");
    Ok(Json(StoreDeleted { store }))
}

async fn metrics_page(State(control): Control) -> Result<Response, Refusal> {
    let page = metrics::page(
        &control.node_info().await?,
        &sorted_pools(&control).await?,
        &control.stores().await?.left_out,
    );
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response())
}

async fn no_such_route(request: Request) -> Refusal {
    Refusal::new(ErrorCode::NotFound, format!("there is no route {}", request.uri().path()))
}

async fn no_such_method(request: Request) -> Refusal {
    let message = format!("{} is not possible on {}", request.method(), request.uri().path());
    Refusal::new(ErrorCode::Method, message)
}

async fn sorted_pools(control: &Arc<dyn NodeControl>) -> Result<Vec<PoolStatus>, ControlError> {
    let mut pools = control.pools().await?;
    pools.sort_by(|a, b| (&a.spec.name, a.spec.id, a.member).cmp(&(&b.spec.name, b.spec.id, b.member)));
    Ok(pools)
}

/// A [`ControlError`] as an HTTP answer.
pub(super) struct Refusal(ControlError);

impl Refusal {
    pub(super) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ControlError::new(code, message))
    }

    /// A refusal of the framework, in our shape.
    fn rejected(status: StatusCode, text: String) -> Self {
        let code = match status {
            StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::TooLarge,
            StatusCode::UNSUPPORTED_MEDIA_TYPE => ErrorCode::MediaType,
            _ => ErrorCode::Invalid,
        };
        Self::new(code, text)
    }
}

impl From<ControlError> for Refusal {
    fn from(error: ControlError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(ErrorBody { error: self.0 })).into_response()
    }
}

/// [`Json`] whose rejection is a [`Refusal`].
pub(super) struct JsonOf<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonOf<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let Json(value) = Json::from_request(request, state)
            .await
            .map_err(|e: JsonRejection| Refusal::rejected(e.status(), e.body_text()))?;
        Ok(Self(value))
    }
}

/// [`Path`] whose rejection is a [`Refusal`].
struct PathOf<T>(T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for PathOf<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, Refusal> {
        let Path(value) = Path::from_request_parts(parts, state)
            .await
            .map_err(|e: PathRejection| Refusal::rejected(e.status(), e.body_text()))?;
        Ok(Self(value))
    }
}

/// [`Query`] whose rejection is a [`Refusal`].
struct QueryOf<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for QueryOf<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, Refusal> {
        let Query(value) = Query::from_request_parts(parts, state)
            .await
            .map_err(|e: QueryRejection| Refusal::rejected(e.status(), e.body_text()))?;
        Ok(Self(value))
    }
}
