//! The admin endpoint: HTTP/1 for probes, Prometheus and people; and the client that the programs ask it with.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::ready::Readiness;

mod client;
#[cfg(test)]
mod tests;

pub use client::get;

/// Connections at once. One more ends the oldest: an answer takes no time, so that one waits for a peer that says
/// nothing, and a probe must not wait for it too.
const CONNECTIONS: usize = 64;
/// For the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// For a request and its answer. A connection carries one.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request's head.
const HEAD_LIMIT: usize = 16 * 1024;
/// Before the next connection is accepted where the system has no room for one.
const PAUSE: Duration = Duration::from_millis(100);

const PATHS: &str = "/livez\n/readyz\n/metrics\n/status\n";
const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the endpoint tells.
///
/// | path | answer |
/// |---|---|
/// | `/livez` | 200: the program answers |
/// | `/readyz` | 200, or 503 with what is waited for, a line each |
/// | `/metrics` | the registry, as OpenMetrics text |
/// | `/status` | what the program says of itself, as JSON |
/// | `/` | the page, if there is one, else the paths |
///
/// GET and HEAD only; other methods are 405, other paths 404.
pub struct Admin {
    readiness: Readiness,
    registry: Registry,
    status: Box<dyn Fn() -> String + Send + Sync>,
    page: Option<&'static str>,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin").field("readiness", &self.readiness).finish_non_exhaustive()
    }
}

impl Admin {
    /// `status` gives a JSON text. It is asked for each request and must not block.
    pub fn new(
        readiness: Readiness,
        registry: Registry,
        status: impl Fn() -> String + Send + Sync + 'static,
    ) -> Self {
        Self { readiness, registry, status: Box::new(status), page: None }
    }

    /// The page that `/` shows.
    pub fn with_page(self, html: &'static str) -> Self {
        Self { page: Some(html), ..self }
    }

    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if ![Method::GET, Method::HEAD].contains(method) {
            let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET or HEAD only\n");
            refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refusal;
        }
        match path {
            "/livez" => response(StatusCode::OK, TEXT, "ok\n"),
            "/readyz" => self.ready(),
            "/metrics" => self.metrics(),
            "/status" => response(StatusCode::OK, JSON, (self.status)()),
            "/" => match self.page {
                Some(page) => response(StatusCode::OK, HTML, page),
                None => response(StatusCode::OK, TEXT, PATHS),
            },
            _ => {
                let page = if self.page.is_some() { "/\n" } else { "" };
                response(StatusCode::NOT_FOUND, TEXT, format!("nothing here; there is:\n{page}{PATHS}"))
            }
        }
    }

    fn ready(&self) -> Response<Full<Bytes>> {
        let pending = self.readiness.pending();
        if pending.is_empty() {
            return response(StatusCode::OK, TEXT, "ok\n");
        }
        let lines: String = pending.iter().map(|what| format!("waiting for {what}\n")).collect();
        response(StatusCode::SERVICE_UNAVAILABLE, TEXT, lines)
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => response(StatusCode::OK, OPEN_METRICS, text),
            Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
        }
    }
}

fn response(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in
        [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-store"), (X_CONTENT_TYPE_OPTIONS, "nosniff")]
    {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Binds the endpoint. Nothing is answered before [`Serving::run`]; connections wait.
///
/// # Errors
/// Those of bind(2) and listen(2).
pub async fn bind(addr: SocketAddr, admin: Admin) -> io::Result<Serving> {
    let listener = TcpListener::bind(addr).await?;
    let addr = listener.local_addr()?;
    Ok(Serving { listener, addr, admin: Arc::new(admin) })
}

/// A bound endpoint.
#[derive(Debug)]
pub struct Serving {
    listener: TcpListener,
    addr: SocketAddr,
    admin: Arc<Admin>,
}

impl Serving {
    /// Where it listens, with the port that the system chose for port 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Answers until it is dropped, which closes its connections.
    ///
    /// # Errors
    /// What makes the listening socket useless. What concerns one connection ends that connection, and where the
    /// system has no room for another the next ones wait.
    pub async fn run(self) -> io::Result<()> {
        let mut connections = JoinSet::new();
        let mut by_age: VecDeque<AbortHandle> = VecDeque::with_capacity(CONNECTIONS);
        loop {
            tokio::select! {
                biased;
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        by_age.retain(|connection| !connection.is_finished());
                        if by_age.len() >= CONNECTIONS && let Some(oldest) = by_age.pop_front() {
                            oldest.abort();
                        }
                        by_age.push_back(connections.spawn(serve(stream, Arc::clone(&self.admin))));
                    }
                    Err(error) if passes(&error) => sleep(PAUSE).await,
                    Err(error) => return Err(error),
                },
            }
        }
    }
}

/// Whether accept(2) may succeed later: the connection was gone already, or descriptors or memory ran out.
fn passes(error: &io::Error) -> bool {
    let no_room = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted)
        || no_room.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// One exchange. A peer that speaks no HTTP, or too slowly, concerns nobody else: its connection ends.
async fn serve(stream: TcpStream, admin: Arc<Admin>) {
    let answer = service_fn(|request: Request<Incoming>| {
        let answer = admin.answer(request.method(), request.uri().path());
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let exchange = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_LIMIT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match timeout(EXCHANGE_TIMEOUT, exchange).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an admin connection"),
        Err(_) => tracing::debug!("an admin connection was too slow"),
    }
}
