//! UDP endpoints that refuse: by ICMP, at one address of the pod or at all.

use std::net::SocketAddr;
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, Pod, ToRouter};
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::net::os::OsNet;
use servicekeel_runtime::net::{Descriptor, Handoff, Net};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::stand::{Conversation, Stand, port, say_hello, stock, wait_for};

const LIMIT: Duration = Duration::from_secs(10);
/// A client's pause before it asks again.
const SLOWLY: Duration = Duration::from_millis(1500);
/// An address of a pod where nothing listens.
const NOBODY: &str = "127.77.0.1";

/// A pod of a.local that exports a port, for UDP and TCP, and has an address besides its loopback; and another pod's import
/// of the UDP one.
async fn offered(stand: &mut Stand, number: u16, target: u16, address: &str) -> (Conversation, SocketAddr) {
    let net = OsNet::new();
    let wanted = ServicePort { protocol: Protocol::Udp, ..port(number) };
    let pod = |name: &str| Pod { name: name.into(), namespace: "default".parse().unwrap(), uid: name.into() };
    let addresses = vec![address.parse().unwrap()];
    let conversation = say_hello(&net, stand.a.sidecars(), pod("serves"), addresses).await;
    for (id, offered) in [(1, wanted.clone()), (2, port(number))] {
        let export = ToRouter::Export { id, offered, target: target.try_into().unwrap(), allow: None };
        conversation.send(&export.encode(), Vec::new()).await.unwrap();
    }
    stand.spawn(stock(net.clone(), conversation));
    let socket = net.make_bound(DescriptorKind::UdpBound, ([127, 0, 0, 1], 0).into()).await.unwrap();
    let at = socket.local_addr().unwrap();
    let importer = say_hello(&net, stand.a.sidecars(), pod("asks"), Vec::new()).await;
    importer.send(&ToRouter::Import { id: 1, wanted: wanted.clone() }.encode(), vec![socket]).await.unwrap();
    wait_for(LIMIT, async || {
        let imports = stand.a.status().await["imports"].as_array().unwrap().clone();
        imports.iter().any(|i| i["service"] == wanted.to_string() && !i["route"].is_null()).then_some(())
    })
    .await;
    (importer, at)
}

#[tokio::test]
async fn a_server_on_loopback_alone_answers_the_first_datagram_of_each_client() {
    let mut stand = Stand::new().await;
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let target = server.local_addr().unwrap().port();
    stand.spawn(async move {
        while let Ok((_, from)) = server.recv_from(&mut [0; 9]).await {
            let _ = server.send_to(b"here", from).await;
        }
    });
    let (_importer, at) = offered(&mut stand, 91, target, NOBODY).await;
    for _ in 0..3 {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(b"once", at).await.unwrap();
        let answered = timeout(LIMIT, client.recv_from(&mut [0; 9])).await;
        assert_eq!(answered.expect("it never came").unwrap(), (4, at));
    }
}

#[tokio::test]
async fn a_server_that_is_gone_is_told_and_counted_for_clients_that_retry_slowly() {
    let mut stand = Stand::new().await;
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let target = server.local_addr().unwrap();
    drop(server);
    let (_importer, at) = offered(&mut stand, 92, target.port(), NOBODY).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for times in 1..=2 {
        if times > 1 {
            tokio::time::sleep(SLOWLY).await;
        }
        client.send_to(b"once", at).await.unwrap();
        wait_for(LIMIT, async || {
            (stand.a.metric("endpoint_failures_total").await >= f64::from(times)).then_some(())
        })
        .await;
        let status = stand.a.status().await;
        assert!(status["exports"].to_string().contains("Connection refused"), "{status}");
    }
    // It comes up and answers, and goes while its client has a session.
    let server = UdpSocket::bind(target).await.unwrap();
    let failures = stand.a.metric("endpoint_failures_total").await;
    client.send_to(b"once", at).await.unwrap();
    let (_, from) = timeout(LIMIT, server.recv_from(&mut [0; 9])).await.unwrap().unwrap();
    server.send_to(b"here", from).await.unwrap();
    timeout(LIMIT, client.recv_from(&mut [0; 9])).await.unwrap().unwrap();
    // An answer is a success, which is counted too.
    wait_for(LIMIT, async || {
        (!stand.a.status().await["exports"].to_string().contains("Connection refused")).then_some(())
    })
    .await;
    drop(server);
    client.send_to(b"once", at).await.unwrap();
    wait_for(LIMIT, async || (stand.a.metric("endpoint_failures_total").await > failures).then_some(()))
        .await;
    assert!(stand.a.status().await["exports"].to_string().contains("Connection refused"));
}

#[tokio::test]
async fn an_address_that_is_not_dialled_is_named() {
    let mut stand = Stand::new().await;
    let free = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let target = free.local_addr().unwrap().port();
    drop(free);
    let (_importer, at) = offered(&mut stand, 93, target, "fd00::5").await;
    let (_flows, flow_at) = stand.nameless(port(93), ([127, 0, 0, 1], 0).into()).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for protocol in ["UDP", "TCP"] {
        wait_for(LIMIT, async || {
            match protocol {
                "UDP" => drop(client.send_to(b"once", at).await.unwrap()),
                _ => drop(TcpStream::connect(flow_at).await),
            }
            let exports = stand.a.status().await["exports"].as_array().unwrap().clone();
            let export =
                exports.iter().find(|e| e["service"] == format!("web.default.a.local:93/{protocol}"))?;
            let reason = export["failing"]["reason"].as_str()?;
            assert!(reason.contains(&format!("127.0.0.1:{target}")), "{reason}");
            assert!(reason.contains("fd00::5: not dialled"), "{reason}");
            Some(())
        })
        .await;
    }
}
