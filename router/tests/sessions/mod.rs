//! UDP sessions of a client that keeps sending from one socket while its endpoint goes.

use std::net::SocketAddr;
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::stand::{Conversation, Router, Stand, port, say_hello, wait_for};

const LIMIT: Duration = Duration::from_secs(10);

fn udp(number: u16) -> ServicePort {
    ServicePort { protocol: Protocol::Udp, ..port(number) }
}

async fn greet(router: &Router, name: &str) -> Conversation {
    let pod = Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: name.into() };
    say_hello(&OsNet::new(), router.sidecars(), pod, Vec::new()).await
}

/// An application that answers each datagram by its name, or not at all.
struct Application {
    at: SocketAddr,
    tasks: JoinSet<()>,
}

impl Application {
    async fn start(name: &'static str, at: SocketAddr) -> Self {
        let socket = UdpSocket::bind(at).await.unwrap();
        let at = socket.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok((_, from)) = socket.recv_from(&mut [0; 64]).await {
                if !name.is_empty() {
                    let _ = socket.send_to(name.as_bytes(), from).await;
                }
            }
        });
        Self { at, tasks }
    }

    async fn end(mut self) {
        self.tasks.shutdown().await;
    }
}

/// A pod of a.local that exports an application, until it is told not to.
struct Exported {
    withdraw: Option<oneshot::Sender<()>>,
    _tasks: JoinSet<()>,
}

impl Exported {
    async fn start(stand: &Stand, name: &str, offered: ServicePort, target: u16) -> Self {
        let conversation = greet(&stand.a, name).await;
        let export = ToRouter::Export { id: 1, offered, target: target.try_into().unwrap(), allow: None };
        conversation.send(&export.encode(), Vec::new()).await.unwrap();
        let (withdraw, mut withdrawn) = oneshot::channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let net = OsNet::new();
            loop {
                let message = tokio::select! {
                    message = conversation.recv() => message,
                    _ = &mut withdrawn, if !withdrawn.is_terminated() => {
                        conversation.send(&ToRouter::Unexport { id: 1 }.encode(), Vec::new()).await.unwrap();
                        continue;
                    }
                };
                let Ok(Some((bytes, _))) = message else { return };
                if let Ok(ToSidecar::More { udp, .. }) = ToSidecar::decode(&bytes) {
                    let make = |_| net.make_unbound(DescriptorKind::UdpUnconnected).unwrap();
                    let sockets = (0..udp).map(make).collect();
                    conversation.send(&ToRouter::Stock { tcp: 0, udp }.encode(), sockets).await.unwrap();
                }
            }
        });
        Self { withdraw: Some(withdraw), _tasks: tasks }
    }

    fn withdraw(&mut self) {
        self.withdraw.take().unwrap().send(()).unwrap();
    }
}

/// A pod's import of a UDP Service, and a client with one socket.
struct Client {
    _importer: Conversation,
    socket: UdpSocket,
    at: SocketAddr,
}

impl Client {
    async fn start(router: &Router, wanted: ServicePort) -> Self {
        let made = OsNet::new().make_bound(DescriptorKind::UdpBound, ([127, 0, 0, 1], 0).into()).await;
        let imported = made.unwrap();
        let at = imported.local_addr().unwrap();
        let importer = greet(router, "asks").await;
        importer
            .send(&ToRouter::Import { id: 1, wanted: wanted.clone() }.encode(), vec![imported])
            .await
            .unwrap();
        wait_for(LIMIT, async || (!import(router, &wanted).await?["route"].is_null()).then_some(())).await;
        Self { _importer: importer, socket: UdpSocket::bind("127.0.0.1:0").await.unwrap(), at }
    }

    /// Who answers a datagram, if anybody does soon.
    async fn asks(&self) -> Option<String> {
        self.socket.send_to(b"?", self.at).await.unwrap();
        let mut buf = [0; 64];
        let (n, from) =
            timeout(Duration::from_millis(300), self.socket.recv_from(&mut buf)).await.ok()?.unwrap();
        assert_eq!(from, self.at);
        Some(String::from_utf8_lossy(&buf[..n]).into_owned())
    }

    /// How many datagrams it takes until an application answers.
    async fn until(&self, name: &str) -> usize {
        let mut sent = 0;
        wait_for(LIMIT, async || {
            sent += 1;
            (self.asks().await.as_deref() == Some(name)).then_some(())
        })
        .await;
        sent
    }
}

async fn import(router: &Router, wanted: &ServicePort) -> Option<serde_json::Value> {
    let status = router.status().await;
    let imports = status["imports"].as_array().unwrap();
    imports.iter().find(|import| import["service"] == wanted.to_string()).cloned()
}

fn any() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// The application dies, and its sidecar lives: the router of the endpoints goes on with the other, and the datagram that
/// was refused is not lost.
#[tokio::test]
async fn a_session_leaves_an_endpoint_that_refuses() {
    let stand = Stand::new().await;
    for (number, router) in [(94, &stand.a), (95, &stand.b)] {
        let (one, wanted) = (Application::start("one", any()).await, udp(number));
        let _one = Exported::start(&stand, "one", wanted.clone(), one.at.port()).await;
        let client = Client::start(router, wanted.clone()).await;
        client.until("one").await;
        let other = Application::start("other", any()).await;
        let _other = Exported::start(&stand, "other", wanted.clone(), other.at.port()).await;
        wait_for(LIMIT, async || {
            let exports = stand.a.status().await["exports"].as_array().unwrap().clone();
            (exports.iter().filter(|e| e["service"] == wanted.to_string()).count() == 2).then_some(())
        })
        .await;
        assert_eq!(client.asks().await.as_deref(), Some("one"), "it does not stick to what works");
        one.end().await;
        assert_eq!(client.until("other").await, 1, "{wanted}");
    }
}

/// The pod withdraws its export and its application goes on: a session stays while there is no other endpoint, and goes
/// there once there is. None of its datagrams is lost.
#[tokio::test]
async fn a_session_leaves_an_endpoint_that_is_withdrawn_where_there_is_another() {
    let stand = Stand::new().await;
    for (number, router) in [(94, &stand.a), (95, &stand.b)] {
        let (one, wanted) = (Application::start("one", any()).await, udp(number));
        let mut exported = Exported::start(&stand, "one", wanted.clone(), one.at.port()).await;
        let client = Client::start(router, wanted.clone()).await;
        client.until("one").await;
        exported.withdraw();
        wait_for(LIMIT, async || import(router, &wanted).await?["route"].is_null().then_some(())).await;
        assert_eq!(client.asks().await.as_deref(), Some("one"), "it does not stay where there is no other");
        let other = Application::start("other", any()).await;
        let _other = Exported::start(&stand, "other", wanted.clone(), other.at.port()).await;
        wait_for(LIMIT, async || (!import(router, &wanted).await?["route"].is_null()).then_some(())).await;
        assert_eq!(client.until("other").await, 1, "{wanted}");
        one.end().await;
    }
}

/// The only endpoint refuses: the import's own router says so, and that it is over, also where the application never
/// answers. The client's session goes on.
#[tokio::test]
async fn an_import_tells_that_its_only_endpoint_refuses() {
    let stand = Stand::new().await;
    for (number, router, name) in
        [(94, &stand.a, "one"), (95, &stand.b, "one"), (96, &stand.a, ""), (97, &stand.b, "")]
    {
        let (application, wanted) = (Application::start("one", any()).await, udp(number));
        let at = application.at;
        let _exported = Exported::start(&stand, "serves", wanted.clone(), at.port()).await;
        let client = Client::start(router, wanted.clone()).await;
        client.until("one").await;
        application.end().await;
        let reason = wait_for(LIMIT, async || {
            assert_eq!(client.asks().await, None);
            Some(import(router, &wanted).await?["failing"]["reason"].as_str()?.to_owned())
        })
        .await;
        assert!(reason.contains(&at.to_string()) && reason.contains("refused"), "{reason}");
        let _application = Application::start(name, at).await;
        wait_for(LIMIT, async || {
            let answer = client.asks().await;
            let works = import(router, &wanted).await?["failing"].is_null();
            (works && answer.as_deref().unwrap_or_default() == name).then_some(())
        })
        .await;
    }
}
