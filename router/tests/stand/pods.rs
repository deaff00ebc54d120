//! Pods without a sidecar of ours: what they say to their router, and what they serve.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter, ToSidecar};
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Handoff, Net};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinSet;

use super::port;

/// A pod that exports.
pub(crate) struct Exporter(pub(super) Conversation);

impl Exporter {
    pub(crate) async fn export(&mut self, id: u64, offered: ServicePort, allow: Option<&[&str]>) {
        let allow = allow.map(|rules| rules.iter().map(|rule| rule.parse().unwrap()).collect());
        let export = ToRouter::Export { id, target: offered.port, offered, allow };
        self.0.send(&export.encode(), Vec::new()).await.unwrap();
    }
}

pub(super) async fn echo(listener: TcpListener) {
    let mut tasks = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        tasks.spawn(async move {
            let (mut reader, mut writer) = stream.split();
            // However it ends, the test's side tells.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
    }
}

pub(super) async fn echo_datagrams(socket: UdpSocket) {
    let mut buf = vec![0; 70_000];
    while let Ok((n, from)) = socket.recv_from(&mut buf).await {
        let _ = socket.send_to(&buf[..n], from).await;
    }
}

pub(crate) type Conversation = <OsNet as Net>::Handoff;

pub(super) async fn meet(net: &OsNet, socket: &Path, pod: &str) -> Conversation {
    let pod = Pod { name: pod.into(), namespace: "default".parse().unwrap(), uid: pod.into() };
    say_hello(net, socket, pod, Vec::new()).await
}

pub(crate) async fn say_hello(net: &OsNet, socket: &Path, pod: Pod, addresses: Vec<IpAddr>) -> Conversation {
    let conversation = loop {
        match net.handoff_connect(socket).await {
            Ok(conversation) => break conversation,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let hello = ToRouter::Hello { version: 1, pod, addresses };
    conversation.send(&hello.encode(), Vec::new()).await.unwrap();
    conversation
}

pub(super) async fn exporter(net: OsNet, socket: &Path, tcp: u16, udp: u16) {
    let conversation = meet(&net, socket, "server").await;
    for (id, protocol, target) in [(1, Protocol::Tcp, tcp), (2, Protocol::Udp, udp)] {
        let offered = ServicePort { protocol, ..port(80) };
        let export = ToRouter::Export { id, offered, target: target.try_into().unwrap(), allow: None };
        conversation.send(&export.encode(), Vec::new()).await.unwrap();
    }
    stock(net, conversation).await;
}

/// Gives the router the sockets that it asks for.
pub(crate) async fn stock(net: OsNet, conversation: Conversation) {
    while let Ok(Some((bytes, _))) = conversation.recv().await {
        if let Ok(ToSidecar::More { tcp, udp }) = ToSidecar::decode(&bytes) {
            let tcps = std::iter::repeat_n(DescriptorKind::TcpUnconnected, tcp.into());
            let udps = std::iter::repeat_n(DescriptorKind::UdpUnconnected, udp.into());
            let sockets = tcps.chain(udps).map(|kind| net.make_unbound(kind).unwrap()).collect();
            conversation.send(&ToRouter::Stock { tcp, udp }.encode(), sockets).await.unwrap();
        }
    }
}

pub(super) async fn importer(
    net: OsNet,
    socket: &Path,
    listener: <OsNet as Net>::Descriptor,
    datagrams: <OsNet as Net>::Descriptor,
) {
    use servicekeel_runtime::net::Descriptor;
    let conversation = meet(&net, socket, "client").await;
    for (id, protocol, socket) in [(1, Protocol::Tcp, &listener), (2, Protocol::Udp, &datagrams)] {
        let import = ToRouter::Import { id, wanted: ServicePort { protocol, ..port(80) } };
        conversation.send(&import.encode(), vec![socket.share().unwrap()]).await.unwrap();
    }
    // The sockets are held for as long as the pod lives.
    while let Ok(Some(_)) = conversation.recv().await {}
    std::future::pending().await
}
