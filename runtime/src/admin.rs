//! The admin endpoint: HTTP/1 for probes, Prometheus and people; and the client that the programs ask it with.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::http::uri::Authority;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use rustix::io::Errno;
use servicekeel_core::admission::Admission;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::ready::Readiness;
use crate::throttle::Throttle;

mod client;
mod exposition;
#[cfg(test)]
mod tests;

pub use client::get;

/// Connections at once. One more ends the oldest of the network that has most of them: an answer takes no time, so that one
/// waits for a client that says nothing, and a probe must not wait for it too.
const CONNECTIONS: usize = 64;
/// For the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// For a request and its answer. A connection carries one.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// For the turn of a request for the status, of which one at a time is answered.
const TURN_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of a request's head.
const HEAD_LIMIT: usize = 16 * 1024;
/// How often it is told that connections make room.
const TELL: Duration = Duration::from_secs(10);
/// Before the next connection is accepted where the system has no room for one.
const PAUSE: Duration = Duration::from_millis(100);

/// Between two tries to bind the address.
const BIND_RETRY: Duration = Duration::from_secs(1);

const PATHS: &str = "/livez\n/readyz\n/metrics\n/status\n";
const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";

type Telling = Pin<Box<dyn Future<Output = String> + Send>>;

/// What the endpoint tells.
///
/// | path | answer |
/// |---|---|
/// | `/livez` | 200: the program answers |
/// | `/readyz` | 200, or 503 with what is waited for, a line each |
/// | `/metrics` | the registry, as OpenMetrics text where `Accept` names that, else as Prometheus has it |
/// | `/status` | what the program says of itself, as JSON; 503 where others have asked for it for 2 s |
/// | `/` | the page, if there is one, else the paths |
///
/// GET and HEAD only; other methods are 405, other paths 404. `/status` and `/` are answered where the request names an IP
/// address, `localhost`, the host's name or nothing as its host (RFC 9110 §7.2), and are 421 (§15.5.20) elsewhere: a page in
/// a browser may have a name of its own lead here (DNS rebinding), and would read them. What probes and Prometheus ask by
/// names of all kinds tells nothing of that sort.
pub struct Admin {
    readiness: Readiness,
    registry: Registry,
    status: Box<dyn Fn() -> Telling + Send + Sync>,
    /// Whoever asks for the status costs the program no more than one that asks.
    turn: Semaphore,
    page: Option<&'static str>,
    /// `/status` and `/` are for this machine only.
    private: bool,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin").field("readiness", &self.readiness).finish_non_exhaustive()
    }
}

impl Admin {
    /// `status` gives a JSON text. It is asked for each request and must not block.
    pub fn new<T: Future<Output = String> + Send + 'static>(
        readiness: Readiness,
        registry: Registry,
        status: impl Fn() -> T + Send + Sync + 'static,
    ) -> Self {
        let status = Box::new(move || -> Telling { Box::pin(status()) });
        Self { readiness, registry, status, turn: Semaphore::new(1), page: None, private: false }
    }

    /// `/status` and `/` are answered to this machine alone, 403 to others; probes and metrics to everybody.
    pub fn private(self) -> Self {
        Self { private: true, ..self }
    }

    /// The page that `/` shows.
    pub fn with_page(self, html: &'static str) -> Self {
        Self { page: Some(html), ..self }
    }

    /// `from`: who asks, where that is known. `None`: the answer is the status.
    fn answer<B>(&self, request: &Request<B>, from: Option<IpAddr>) -> Option<Response<Full<Bytes>>> {
        let (method, path) = (request.method(), request.uri().path());
        if ![Method::GET, Method::HEAD].contains(method) {
            let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET or HEAD only\n");
            refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return Some(refusal);
        }
        if self.private
            && ["/", "/status"].contains(&path)
            && !from.is_some_and(|from| from.to_canonical().is_loopback())
        {
            let text = "available from this machine only: use 127.0.0.1\n";
            return Some(response(StatusCode::FORBIDDEN, TEXT, text));
        }
        if ["/", "/status"].contains(&path)
            && let Some(host) = foreign_host(request)
        {
            let text = format!(
                "{:?} is not a name of this endpoint; use an IP address or localhost\n",
                host.get(..MAX_HOST).unwrap_or(&host)
            );
            return Some(response(StatusCode::MISDIRECTED_REQUEST, TEXT, text));
        }
        Some(match path {
            "/livez" => response(StatusCode::OK, TEXT, "ok\n"),
            "/readyz" => self.ready(),
            "/metrics" => self.metrics(exposition::Format::of(request.headers())),
            "/status" => return None,
            "/" => match self.page {
                Some(page) => response(StatusCode::OK, HTML, page),
                None => response(StatusCode::OK, TEXT, PATHS),
            },
            _ => {
                let page = if self.page.is_some() { "/\n" } else { "" };
                response(StatusCode::NOT_FOUND, TEXT, format!("not found; available paths:\n{page}{PATHS}"))
            }
        })
    }

    async fn status(&self) -> Response<Full<Bytes>> {
        match timeout(TURN_TIMEOUT, self.turn.acquire()).await {
            Ok(turn) => {
                let _turn = turn;
                response(StatusCode::OK, JSON, (self.status)().await)
            }
            Err(_) => response(
                StatusCode::SERVICE_UNAVAILABLE,
                TEXT,
                "others are asking for the status; try again\n",
            ),
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

    fn metrics(&self, format: exposition::Format) -> Response<Full<Bytes>> {
        match format.text(&self.registry) {
            Ok(text) => response(StatusCode::OK, format.kind(), text),
            Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
        }
    }
}

/// Bytes of a host that an answer repeats.
const MAX_HOST: usize = 253;

/// The host that a request names, where it is neither an address nor a name that leads nowhere but here.
fn foreign_host<B>(request: &Request<B>) -> Option<String> {
    // Without a host it is no browser's.
    let named = request.headers().get_all(HOST).iter().map(|host| host.to_str().unwrap_or("?"));
    named
        .chain(request.uri().authority().map(Authority::as_str))
        .find(|host| !is_own(host))
        .map(str::to_owned)
}

fn is_own(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let own = rustix::system::uname();
    address.parse::<IpAddr>().is_ok()
        || host.eq_ignore_ascii_case("localhost")
        || own.nodename().to_str().is_ok_and(|own| host.eq_ignore_ascii_case(own))
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
pub async fn bind(addr: SocketAddr, admin: impl Into<Arc<Admin>>) -> io::Result<Serving> {
    let listener = TcpListener::bind(addr).await?;
    let addr = listener.local_addr()?;
    Ok(Serving { listener, addr, admin: admin.into() })
}

/// Serves the endpoint, once its address can be had: nothing that a program is for waits for that. `setting` names where
/// the address was said, for the log.
///
/// # Errors
/// Those of [`Serving::run`].
pub async fn serve(addr: SocketAddr, admin: impl Into<Arc<Admin>>, setting: &str) -> io::Result<()> {
    let admin = admin.into();
    let mut failed = false;
    let serving = loop {
        match bind(addr, admin.clone()).await {
            Ok(serving) => break serving,
            Err(error) if !failed => tracing::warn!(
                %addr, %error,
                "cannot serve the admin endpoint; retrying ({setting}; `off` disables it)"
            ),
            Err(_) => {}
        }
        failed = true;
        sleep(BIND_RETRY).await;
    };
    if failed {
        tracing::info!(%addr, "serving the admin endpoint");
    }
    serving.run().await
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
        let mut handles: BTreeMap<u64, AbortHandle> = BTreeMap::new();
        let (mut admission, mut next) = (Admission::default(), 0);
        let crowds = Throttle::new(1, TELL);
        loop {
            tokio::select! {
                biased;
                Some(ended) = connections.join_next(), if !connections.is_empty() => {
                    // One that was aborted has left already.
                    if let Ok(id) = ended {
                        admission.leave(id);
                        handles.remove(&id);
                    }
                }
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, from)) => {
                        let id = next;
                        next += 1;
                        for (gone, network) in admission.enter(id, from.ip(), false, CONNECTIONS) {
                            if let Some(connection) = handles.remove(&gone) {
                                connection.abort();
                            }
                            if let Some(suppressed) = crowds.permit() {
                                tracing::warn!(
                                    from = %network,
                                    limit = CONNECTIONS,
                                    suppressed,
                                    "too many admin connections; closing the oldest of the network with the most"
                                );
                            }
                        }
                        let admin = Arc::clone(&self.admin);
                        let connection = connections.spawn(async move {
                            exchange(stream, admin).await;
                            id
                        });
                        handles.insert(id, connection);
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
async fn exchange(stream: TcpStream, admin: Arc<Admin>) {
    let from = stream.peer_addr().ok().map(|from| from.ip());
    let answer = service_fn(|request: Request<Incoming>| {
        let (answer, admin) = (admin.answer(&request, from), &admin);
        async move {
            Ok::<_, Infallible>(match answer {
                Some(answer) => answer,
                None => admin.status().await,
            })
        }
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
