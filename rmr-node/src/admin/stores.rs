//! Routes of the admin API about the stores of a node: which there are, and those that open, close and delete them by path.

use axum::Json;
use axum::Router;
use axum::extract::{Extension, Request, State};
use axum::routing::{get, post};
use tracing::info;

use super::api::{ErrorCode, StoreChanged, StoreList, StoreName};
use super::connections::Work;
use super::routes::{Answer, App, Control, Refusal};

/// The routes. Those that wait for a device have no limit of time once their request was read.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/stores", get(list))
        .route("/v1/stores/open", post(open))
        .route("/v1/stores/close", post(close))
        .route("/v1/stores/delete", post(delete))
}

async fn list(State(control): Control) -> Answer<StoreList> {
    Ok(Json(control.stores().await?))
}

async fn read(app: &App, request: Request) -> Result<StoreName, Refusal> {
    let name: StoreName = app.body(request).await?;
    let problem = match (&name.path, name.store) {
        (None, None) => "expected the path or the uuid of a store".to_owned(),
        (Some(path), _) if !path.is_absolute() => {
            format!("store path '{}': expected an absolute path", path.display())
        }
        _ => return Ok(name),
    };
    Err(Refusal::new(ErrorCode::Invalid, problem))
}

async fn open(
    State(app): State<App>,
    Extension(work): Extension<Work>,
    request: Request,
) -> Answer<StoreChanged> {
    let name = read(&app, request).await?;
    let (Some(path), None, false) = (name.path, name.store, name.force) else {
        return Err(Refusal::new(ErrorCode::Invalid, "a store is opened by its path, and by nothing else"));
    };
    let _guard = (app.long_work()?, work.begin());
    let changed = app.control.open_store(path).await?;
    info!(path = %changed.path.display(), "opened by command");
    Ok(Json(changed))
}

async fn close(
    State(app): State<App>,
    Extension(work): Extension<Work>,
    request: Request,
) -> Answer<StoreChanged> {
    let name = read(&app, request).await?;
    let _guard = (app.long_work()?, work.begin());
    let changed = app.control.close_store(name).await?;
    info!(path = %changed.path.display(), "closed by command");
    Ok(Json(changed))
}

async fn delete(
    State(app): State<App>,
    Extension(work): Extension<Work>,
    request: Request,
) -> Answer<StoreChanged> {
    let name = read(&app, request).await?;
    let (_guard, force) = ((app.long_work()?, work.begin()), name.force);
    let changed = app.control.delete_store_at(name).await?;
    info!(path = %changed.path.display(), force, "deleted by command");
    Ok(Json(changed))
}
