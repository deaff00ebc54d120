//! The production server on the kernel's sockets, with hickory-net as the client.

use hickory_net::client::{Client, ClientHandle};
use hickory_net::runtime::TokioRuntimeProvider;
use hickory_net::tcp::TcpClientStream;
use hickory_net::udp::UdpClientStream;
use hickory_proto::op::DnsResponse;
use hickory_proto::rr::DNSClass;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::fake::{Fake, fine};
use super::*;
use crate::dns::{Bound, OsDns, Serve, UpstreamState};

const SECOND: Duration = Duration::from_secs(1);

async fn serve(dns: &Dns) -> (SocketAddr, JoinSet<()>) {
    let bound = OsDns.bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = bound.local_addr();
    let mut serving = JoinSet::new();
    let dns = dns.clone();
    serving.spawn(async move { bound.run(dns).await.unwrap() });
    (addr, serving)
}

async fn ask_all(mut client: Client<TokioRuntimeProvider>) -> [DnsResponse; 3] {
    let mut ask = async |text: &str, qtype| client.query(name(text), DNSClass::IN, qtype).await.unwrap();
    [
        ask("simple-server.default", RecordType::A).await,
        ask("simple-server.default", RecordType::AAAA).await,
        ask("example.com", RecordType::A).await,
    ]
}

#[tokio::test]
async fn udp_and_tcp() {
    let upstream = Fake::new(|query, _| fine(query)).await;
    let dns = dns(&[upstream.addr]);
    let (addr, mut serving) = serve(&dns).await;
    let provider = TokioRuntimeProvider::new();
    let mut background = JoinSet::new();

    let (udp, running) = Client::from_sender(UdpClientStream::builder(addr, provider.clone()).build());
    background.spawn(running);
    let over_udp = ask_all(udp).await;

    let (connecting, sender) = TcpClientStream::new(addr, None, None, provider);
    let (tcp, running) = Client::new(connecting.await.unwrap(), sender);
    background.spawn(running);
    let over_tcp = ask_all(tcp).await;

    for [own, none, foreign] in [over_udp, over_tcp] {
        assert_eq!(addresses(&own), [OWN]);
        assert!(own.authoritative && own.recursion_available && own.edns.is_some());
        assert_eq!(code(&none), ResponseCode::NoError);
        assert_eq!((none.answers.len(), none.authorities.len()), (0, 1));
        assert_eq!(addresses(&foreign), [Ipv4Addr::new(192, 0, 2, 1)]);
        assert!(!foreign.authoritative);
    }
    assert_eq!(upstream.asked().len(), 1);

    // Dropped, it is gone, and the address free.
    serving.shutdown().await;
    drop(dns);
    OsDns.bind(addr).await.unwrap();
}

/// Both ways in answer alike, byte for byte.
#[tokio::test]
async fn the_socket_answers_as_the_function_does() {
    let dns = dns(&[]);
    let (addr, _serving) = serve(&dns).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(addr).await.unwrap();
    let long = with_edns(query("_http._tcp.simple-server", RecordType::SRV), 4096);
    let mut class = query("simple-server", RecordType::A);
    class.queries[0].set_query_class(DNSClass::CH);
    let mut version = with_edns(query("simple-server", RecordType::A), 1232);
    version.edns.as_mut().unwrap().set_version(3);
    let mut update = query("simple-server", RecordType::A);
    update.metadata.op_code = hickory_proto::op::OpCode::Update;
    let mut none = query("simple-server", RecordType::A);
    none.queries.clear();
    let mut packets: Vec<Vec<u8>> = [
        query("Simple-Server", RecordType::A),
        query("simple-server", RecordType::HTTPS),
        with_edns(query("example.com", RecordType::A), 512),
        long,
        class,
        version,
        update,
        none,
    ]
    .iter()
    .map(|message| message.to_vec().unwrap())
    .collect();
    packets.push(packets[0][..20].to_vec());
    for packet in packets {
        socket.send(&packet).await.unwrap();
        let mut buf = [0; 4096];
        let len = timeout(SECOND, socket.recv(&mut buf)).await.unwrap().unwrap();
        let expected = dns.answer(&packet, CLIENT, Transport::Udp).await.unwrap();
        assert_eq!(buf[..len], expected, "to {packet:02x?}");
    }
}

/// At an unspecified address an answer comes from the address that was asked at; a client takes none from elsewhere.
#[tokio::test]
async fn an_answer_comes_from_where_it_was_asked() {
    for (bind, addresses) in
        [("0.0.0.0:0", &["127.0.0.1", "127.0.0.77", "127.1.2.3"][..]), ("[::]:0", &["::1", "127.0.0.78"])]
    {
        let bound = OsDns.bind(bind.parse().unwrap()).await.unwrap();
        let port = bound.local_addr().port();
        let upstream = Fake::new(|query, _| fine(query)).await;
        let dns = dns(&[upstream.addr]);
        let mut serving = JoinSet::new();
        serving.spawn(async move { bound.run(dns).await.unwrap() });
        for ip in addresses {
            let server = SocketAddr::new(ip.parse().unwrap(), port);
            let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let client = UdpSocket::bind(any).await.unwrap();
            // One of ours is answered at once, another after the upstream.
            for text in ["simple-server", &format!("for-{}.example", ip.len())] {
                client.send_to(&query(text, RecordType::A).to_vec().unwrap(), server).await.unwrap();
                let (_, from) = timeout(SECOND, client.recv_from(&mut [0; 512])).await.unwrap().unwrap();
                assert_eq!(from, server, "{bind}");
            }
        }
    }
}

#[tokio::test]
async fn what_a_stream_brings() {
    let dns = dns(&[]);
    let (addr, _serving) = serve(&dns).await;
    let packet = query("simple-server", RecordType::A).to_vec().unwrap();

    // Several at once, in pieces.
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let mut framed = (packet.len() as u16).to_be_bytes().to_vec();
    framed.extend(&packet);
    let three = framed.repeat(3);
    for piece in three.chunks(7) {
        stream.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    for _ in 0..3 {
        let len = timeout(SECOND, stream.read_u16()).await.unwrap().unwrap();
        let mut answer = vec![0; len.into()];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(addresses(&Message::from_vec(&answer).unwrap()), [OWN]);
    }
    // Half closed, then the rest of nothing.
    stream.shutdown().await.unwrap();
    assert_eq!(timeout(SECOND, stream.read(&mut [0])).await.unwrap().unwrap(), 0);

    // What is no query ends the connection: noise, and a length that no query has.
    for noise in [b"\x00\x04oops".as_slice(), b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(noise).await.unwrap();
        let end = timeout(SECOND, stream.read(&mut [0])).await.unwrap();
        assert!(matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    }
}

#[tokio::test]
async fn silent_streams_keep_nobody_out() {
    let dns = dns(&[]);
    let (addr, _serving) = serve(&dns).await;
    let packet = query("simple-server", RecordType::A).to_vec().unwrap();
    let ask = async |stream: &mut TcpStream| {
        stream.write_u16(packet.len() as u16).await?;
        stream.write_all(&packet).await?;
        let mut answer = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut answer).await
    };
    let mut kept = TcpStream::connect(addr).await.unwrap();
    let mut silent = Vec::new();
    for number in 0..300 {
        silent.push(TcpStream::connect(addr).await.unwrap());
        // One that goes on asking is not the one that goes.
        if number % 30 == 0 {
            timeout(SECOND / 2, ask(&mut kept)).await.expect("it waits").unwrap();
        }
    }
    let mut fresh = TcpStream::connect(addr).await.unwrap();
    timeout(SECOND / 2, ask(&mut fresh)).await.expect("it waits").unwrap();
    timeout(SECOND / 2, ask(&mut kept)).await.expect("it waits").unwrap();
    // The oldest are closed, and no more of them than need be.
    assert_eq!(timeout(SECOND, silent[0].read(&mut [0])).await.unwrap().unwrap(), 0);
    assert!(timeout(SECOND / 2, silent[299].read(&mut [0])).await.is_err());
}

#[tokio::test]
async fn errors_say_what_to_do() {
    let taken = OsDns.bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let text = OsDns.bind(taken.local_addr()).await.unwrap_err().to_string();
    assert!(text.contains(&taken.local_addr().to_string()) && text.contains("another sidecar"), "{text}");
    let text = OsDns.bind("192.0.2.1:53".parse().unwrap()).await.unwrap_err().to_string();
    assert!(text.contains("no such address"), "{text}");
}

#[tokio::test]
async fn a_server_that_is_its_own_upstream() {
    let bound = OsDns.bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = bound.local_addr();
    let dns = dns(&[addr]);
    let mut serving = JoinSet::new();
    serving.spawn({
        let dns = dns.clone();
        async move { bound.run(dns).await.unwrap() }
    });
    let refused = async {
        while dns.status().upstreams[0].state != UpstreamState::Ourselves {
            tokio::task::yield_now().await;
        }
    };
    timeout(SECOND, refused).await.unwrap();
    assert_eq!(code(&ask_a(&dns, "example.com").await), ResponseCode::ServFail);
}
