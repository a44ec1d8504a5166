//! Metrics in the text format of Prometheus, on a port of their own: they are not for users.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::get;
use prometheus::{HistogramOpts, HistogramVec, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::App;

pub(crate) struct Metrics {
    registry: Registry,
    /// By route, not by path: a path has ids, and there is no end of them.
    requests: HistogramVec,
    connections: IntGaugeVec,
}

impl Metrics {
    pub(crate) fn new() -> prometheus::Result<Self> {
        let requests = HistogramVec::new(
            HistogramOpts::new("http_request_seconds", "Time until the answer."),
            &["method", "route", "status"],
        )?;
        let connections = IntGaugeVec::new(
            Opts::new("db_connections", "Connections of the pool."),
            &["state"],
        )?;
        let registry = Registry::new();
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(connections.clone()))?;
        Ok(Self {
            registry,
            requests,
            connections,
        })
    }

    fn text(&self, app: &App) -> prometheus::Result<String> {
        let pool = app.pool.state();
        for (state, number) in [
            ("idle", pool.idle_connections),
            (
                "busy",
                pool.connections.saturating_sub(pool.idle_connections),
            ),
        ] {
            self.connections
                .with_label_values(&[state])
                .set(number.into());
        }
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// Measures a request of the service.
pub(crate) async fn measure(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let method = request.method().as_str().to_owned();
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or_else(|| "none".to_owned(), |route| route.as_str().to_owned());
    let begin = Instant::now();
    let response = next.run(request).await;
    app.metrics
        .requests
        .with_label_values(&[method.as_str(), &route, response.status().as_str()])
        .observe(begin.elapsed().as_secs_f64());
    response
}

/// The service of the metrics.
pub(crate) fn routes(app: Arc<App>) -> Router {
    let show = async |State(app): State<Arc<App>>| {
        let text = app.metrics.text(&app);
        text.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
    };
    Router::new().route("/metrics", get(show)).with_state(app)
}
