//! The endpoint over real sockets.

use std::future::ready;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// Runs `test` beside a serving endpoint, which is dropped after it.
async fn serving<T>(admin: Admin, test: impl AsyncFnOnce(SocketAddr) -> T) -> T {
    let serving = bind(([127, 0, 0, 1], 0).into(), admin).await.unwrap();
    let addr = serving.local_addr();
    tokio::select! {
        biased;
        ended = serving.run() => panic!("the endpoint ended: {ended:?}"),
        result = test(addr) => result,
    }
}

fn admin() -> Admin {
    Admin::new(Readiness::new(), Registry::default(), || ready(r#"{"routes":3}"#.to_owned()))
}

async fn ask(addr: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.to_ascii_lowercase()
}

#[tokio::test]
async fn answers_each_path() {
    let mut registry = Registry::default();
    let flows: Counter = Counter::default();
    registry.register("flows", "Flows that were opened", flows.clone());
    flows.inc_by(7);
    let admin = Admin::new(Readiness::new(), registry, || ready(r#"{"routes":3}"#.to_owned()));
    serving(admin, async |addr| {
        assert_eq!(get(addr, "/livez").await.unwrap(), (200, "ok\n".to_owned()));
        assert_eq!(get(addr, "/readyz").await.unwrap(), (200, "ok\n".to_owned()));
        assert_eq!(get(addr, "/status").await.unwrap(), (200, r#"{"routes":3}"#.to_owned()));
        assert_eq!(get(addr, "/").await.unwrap(), (200, PATHS.to_owned()));
        assert_eq!(get(addr, "/livez?verbose").await.unwrap().0, 200);
        let (status, text) = get(addr, "/nonsense").await.unwrap();
        assert_eq!((status, text.contains("/readyz\n/metrics\n")), (404, true), "{text}");
        let (status, text) = get(addr, "/metrics").await.unwrap();
        assert_eq!(status, 200);
        assert!(text.ends_with("\nflows_total 7\n"), "{text}");
        let request = "GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text\r\n\r\n";
        let text = ask(addr, request).await;
        assert!(text.contains("\r\ncontent-type: application/openmetrics-text; "), "{text}");
        assert!(text.ends_with("\nflows_total 7\n# eof\n"), "{text}");
    })
    .await;
}

#[tokio::test]
async fn a_private_status_is_for_this_machine() {
    let private = admin().private();
    let of = |path: &str, from: &str| {
        let request = Request::builder().uri(path).body(()).unwrap();
        let answer = private.answer(&request, Some(from.parse().unwrap()));
        answer.map_or(200, |answer| answer.status().as_u16())
    };
    for path in ["/status", "/"] {
        for (from, code) in [
            ("127.0.0.1", 200),
            ("::1", 200),
            ("::ffff:127.0.0.1", 200),
            ("192.0.2.1", 403),
            ("::ffff:192.0.2.1", 403),
        ] {
            assert_eq!(of(path, from), code, "{path} {from}");
        }
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(of(path, "192.0.2.1"), 200, "{path}");
    }
    let everybody = admin();
    let request = Request::builder().uri("/status").body(()).unwrap();
    assert!(everybody.answer(&request, Some("192.0.2.1".parse().unwrap())).is_none());
    serving(admin().private(), async |addr| assert_eq!(get(addr, "/status").await.unwrap().0, 200)).await;
}

#[tokio::test]
async fn says_what_it_is() {
    serving(admin().with_page("<!doctype html><title>links</title>"), async |addr| {
        assert!(get(addr, "/nonsense").await.unwrap().1.contains("\n/\n/livez\n"));
        for (path, kind) in [
            ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
            ("/status", "application/json"),
            ("/", "text/html; charset=utf-8"),
        ] {
            let answer = ask(addr, &format!("GET {path} HTTP/1.1\r\nHost: localhost:80\r\n\r\n")).await;
            assert!(answer.starts_with("http/1.1 200 ok\r\n"), "{answer}");
            assert!(answer.contains(&format!("\r\ncontent-type: {kind}\r\n")), "{path}: {answer}");
        }
        assert!(get(addr, "/").await.unwrap().1.contains("<title>links"));
    })
    .await;
}

#[tokio::test]
async fn is_ready_when_nothing_is_waited_for() {
    let readiness = Readiness::new();
    let router = readiness.wait_for("the router");
    let dns = readiness.wait_for("DNS");
    let admin = Admin::new(readiness, Registry::default(), || ready(String::new()));
    serving(admin, async |addr| {
        let waiting = "waiting for the router\nwaiting for DNS\n";
        assert_eq!(get(addr, "/readyz").await.unwrap(), (503, waiting.to_owned()));
        assert_eq!(get(addr, "/livez").await.unwrap().0, 200);
        drop((router, dns));
        assert_eq!(get(addr, "/readyz").await.unwrap().0, 200);
    })
    .await;
}

#[tokio::test]
async fn head_has_no_body_and_other_methods_are_refused() {
    serving(admin(), async |addr| {
        let head = ask(addr, "HEAD /livez HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(head.starts_with("http/1.1 200") && head.contains("\r\ncontent-length: 3\r\n"), "{head}");
        assert!(head.ends_with("\r\n\r\n"), "{head}");
        for method in ["POST", "DELETE", "BREW"] {
            let answer =
                ask(addr, &format!("{method} /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")).await;
            assert!(answer.starts_with("http/1.1 405"), "{answer}");
            assert!(answer.contains("\r\nallow: get, head\r\n"), "{answer}");
        }
    })
    .await;
}

#[tokio::test]
async fn rubbish_and_endless_heads_end_their_own_connection() {
    serving(admin(), async |addr| {
        assert!(ask(addr, "\x16\x03\x01 this is no HTTP\r\n\r\n").await.starts_with("http/1.1 400"));
        let mut endless = TcpStream::connect(addr).await.unwrap();
        let mut sent = endless.write_all(b"GET / HTTP/1.1\r\nX: ").await;
        let mut length = 0;
        while sent.is_ok() {
            length += 1024;
            assert!(length < 64 << 20, "{length} bytes of a header were taken");
            sent = endless.write_all(&[b'x'; 1024]).await;
        }
        assert_eq!(get(addr, "/livez").await.unwrap().0, 200);
    })
    .await;
}

#[tokio::test]
async fn a_name_of_a_browsers_page_reads_nothing() {
    serving(admin().with_page("<title>links</title>"), async |addr| {
        let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let asked = async |path: &str, lines: &str| {
            let answer = ask(addr, &format!("GET {path} HTTP/1.1\r\n{lines}\r\n")).await;
            answer.strip_prefix("http/1.1 ").unwrap()[..3].to_owned()
        };
        for path in ["/", "/status"] {
            for host in ["127.0.0.1", "10.0.0.7:7480", "[::1]:80", "localhost", "LOCALHOST:1", &own] {
                assert_eq!(asked(path, &format!("Host: {host}\r\n")).await, "200", "{host}");
            }
            for host in
                ["evil.example", "evil.example:7480", "127.0.0.1.evil.example", "localhost.evil.example"]
            {
                assert_eq!(asked(path, &format!("Host: {host}\r\n")).await, "421", "{host}");
            }
            assert_eq!(asked(path, "Host: localhost\r\nHost: evil.example\r\n").await, "421");
            assert_eq!(asked(&format!("http://evil.example{path}"), "Host: localhost\r\n").await, "421");
            let old = ask(addr, &format!("GET {path} HTTP/1.0\r\n\r\n")).await;
            assert!(old.starts_with("http/1.0 200"), "{old}");
        }
        // Probes, and Prometheus, ask by names of all kinds.
        for path in ["/livez", "/readyz", "/metrics"] {
            assert_eq!(asked(path, "Host: node-1.default.svc.cluster.local:7480\r\n").await, "200");
        }
        let told = ask(addr, "GET /status HTTP/1.1\r\nHost: evil.example\r\n\r\n").await;
        assert!(told.contains("not a name of this endpoint") && !told.contains("routes"), "{told}");
    })
    .await;
}

/// Connects from an address of its own.
async fn from(local: &str, addr: SocketAddr) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(local.parse().unwrap(), 0)).unwrap();
    socket.connect(addr).await.unwrap()
}

#[tokio::test]
async fn a_slow_client_is_kept_while_a_flood_comes_from_elsewhere() {
    serving(admin(), async |addr| {
        let mut slow = from("127.0.1.1", addr).await;
        slow.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS * 4 {
            silent.push(from("127.0.2.1", addr).await);
        }
        // Those of the flood made room.
        assert!(matches!(silent[0].read(&mut [0]).await, Ok(0) | Err(_)));
        slow.write_all(b"Host: a\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        slow.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn silent_peers_keep_nobody_from_an_answer() {
    serving(admin(), async |addr| {
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS + 1 {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }
        let start = Instant::now();
        assert_eq!(get(addr, "/livez").await.unwrap().0, 200);
        assert!(start.elapsed() < HEAD_TIMEOUT / 2, "{:?}", start.elapsed());
        // The first ones made room.
        let mut oldest = silent.swap_remove(0);
        assert!(matches!(oldest.read(&mut [0]).await, Ok(0) | Err(_)));
        assert!(start.elapsed() < HEAD_TIMEOUT / 2, "{:?}", start.elapsed());
        // The others have their time, and no more.
        let mut last = silent.pop().unwrap();
        let mut rest = Vec::new();
        timeout(HEAD_TIMEOUT * 2, last.read_to_end(&mut rest)).await.unwrap().unwrap();
        assert!(start.elapsed() >= HEAD_TIMEOUT / 2, "{:?}", start.elapsed());
    })
    .await;
}

#[tokio::test]
async fn a_dropped_endpoint_is_closed_with_its_connections() {
    let (addr, mut silent) = serving(admin(), async |addr| {
        let silent = TcpStream::connect(addr).await.unwrap();
        assert_eq!(get(addr, "/livez").await.unwrap().0, 200);
        (addr, silent)
    })
    .await;
    assert!(matches!(silent.read(&mut [0]).await, Ok(0) | Err(_)));
    assert_eq!(get(addr, "/livez").await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn two_do_not_share_a_port() {
    let first = bind(([127, 0, 0, 1], 0).into(), admin()).await.unwrap();
    let error = bind(first.local_addr(), admin()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
}

/// A peer that says `answer` to whatever it is asked.
async fn asking(answer: &[u8]) -> io::Error {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let peer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        drop(stream.read(&mut [0; 1024]).await);
        drop(stream.write_all(answer).await);
    };
    tokio::join!(get(addr, "/status"), peer).0.unwrap_err()
}

#[tokio::test]
async fn the_client_says_what_is_wrong() {
    assert_eq!(asking(b"SSH-2.0-OpenSSH_9.6\r\n").await.kind(), ErrorKind::InvalidData);
    assert_eq!(asking(b"").await.kind(), ErrorKind::ConnectionAborted);
    let cut = asking(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await;
    assert_eq!(cut.kind(), ErrorKind::UnexpectedEof, "{cut}");
    let mut endless = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
    endless.resize(17 * 1024 * 1024, b'x');
    let long = asking(&endless).await;
    assert_eq!(long.kind(), ErrorKind::InvalidData, "{long}");
    let binary = asking(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff").await;
    assert_eq!(binary.kind(), ErrorKind::InvalidData, "{binary}");
    let error = get(([127, 0, 0, 1], 1).into(), "no path").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

#[tokio::test]
async fn the_client_does_not_wait_for_ever() {
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = get(mute.local_addr().unwrap(), "/status").await.unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::TimedOut, "no answer within 5 s".to_owned()));
}

#[tokio::test]
async fn who_asks_for_the_status_again_and_again_is_told_it_once_at_a_time() {
    let (asked, asking) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let (go, most) = (asked.clone(), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let admin = Admin::new(Readiness::new(), Registry::default(), move || {
        let (go, asking, most) = (go.clone(), asking.clone(), most.clone());
        async move {
            most.fetch_max(asking.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            go.acquire().await.unwrap().forget();
            asking.fetch_sub(1, Ordering::Relaxed);
            "{}".to_owned()
        }
    });
    serving(admin, async |addr| {
        let mut all = JoinSet::new();
        for _ in 0..8 {
            all.spawn(async move { get(addr, "/status").await.unwrap() });
        }
        // Those that wait are sent away while the first is still being told, and the rest is answered meanwhile.
        for _ in 0..7 {
            let (code, text) = all.join_next().await.unwrap().unwrap();
            assert_eq!((code, text.as_str()), (503, "others are asking for the status; try again\n"));
        }
        assert_eq!(get(addr, "/livez").await.unwrap().0, 200);
        asked.add_permits(2);
        assert_eq!(all.join_next().await.unwrap().unwrap(), (200, "{}".to_owned()));
        assert_eq!(get(addr, "/status").await.unwrap().0, 200);
    })
    .await;
    assert_eq!(seen.load(Ordering::Relaxed), 1);
}
