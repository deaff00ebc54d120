use std::os::fd::AsRawFd;

use servicekeel_core::handoff::DescriptorKind::{TcpListener, TcpUnconnected, UdpBound, UdpUnconnected};

use super::*;

const KINDS: [DescriptorKind; 4] = [TcpListener, TcpUnconnected, UdpBound, UdpUnconnected];

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn make(kind: DescriptorKind) -> OsDescriptor {
    match kind {
        TcpListener | UdpBound => OsDescriptor::bound(kind, loopback()).unwrap(),
        TcpUnconnected | UdpUnconnected => OsDescriptor::unbound(kind).unwrap(),
    }
}

#[test]
fn each_kind_is_itself_and_no_other() {
    for made in KINDS {
        let descriptor = make(made).share().unwrap();
        for asked in KINDS {
            assert_eq!(descriptor.check(asked).is_ok(), asked == made, "{made:?} as {asked:?}");
        }
    }
}

#[test]
fn what_it_is_instead_is_said() {
    let connected = std::net::UdpSocket::bind(loopback()).unwrap();
    connected.connect("127.0.0.1:9").unwrap();
    let listener = std::net::TcpListener::bind(loopback()).unwrap();
    let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let bound_tcp = tcp(Domain::IPV4).unwrap();
    bound_tcp.bind(&loopback().into()).unwrap();
    let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let (pipe, _write) = rustix::pipe::pipe().unwrap();
    let file = tempfile::tempfile().unwrap();
    let directory = std::fs::File::open("/").unwrap();
    let device = std::fs::File::open("/dev/null").unwrap();
    let raw = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4));
    let cases: Vec<(OwnedFd, &str)> = vec![
        (connected.into(), "connected to 127.0.0.1:9"),
        (stream.into(), "a TCP socket connected to"),
        (listener.into(), "listens on 127.0.0.1:"),
        (bound_tcp.into(), "a TCP socket bound to"),
        (unix.into(), "a Unix socket"),
        (pipe, "a pipe"),
        (file.into(), "a regular file"),
        (directory.into(), "a directory"),
        (device.into(), "a device"),
    ];
    let cases = cases.into_iter().chain(raw.ok().map(|raw| (raw.into(), "a socket of")));
    for (fd, says) in cases {
        let e = OsDescriptor::from(fd).check(TcpUnconnected).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
        let text = e.to_string();
        assert!(text.contains(says) && text.contains("should be an unconnected TCP socket"), "{text}");
    }
}

#[test]
fn a_restarted_sidecar_binds_beside_its_earlier_socket() {
    for kind in [TcpListener, UdpBound] {
        let held = make(kind);
        let again = OsDescriptor::bound(kind, held.local_addr().unwrap()).unwrap();
        assert_eq!(again.local_addr().unwrap(), held.local_addr().unwrap());
    }
}

#[test]
fn an_address_of_others_is_refused_by_name() {
    let foreign = std::net::TcpListener::bind(loopback()).unwrap();
    let addr = foreign.local_addr().unwrap();
    let e = OsDescriptor::bound(TcpListener, addr).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::AddrInUse);
    assert!(e.to_string().contains(&addr.to_string()), "{e}");
}

#[test]
fn an_address_goes_with_the_kinds_that_have_one() {
    for kind in KINDS {
        let has_one = matches!(kind, TcpListener | UdpBound);
        assert_eq!(OsDescriptor::bound(kind, loopback()).is_ok(), has_one);
        assert_eq!(OsDescriptor::unbound(kind).is_ok(), !has_one);
    }
}

#[test]
fn sockets_do_not_block_and_close_on_exec() {
    for kind in KINDS {
        let descriptor = make(kind);
        assert!(SockRef::from(&descriptor).nonblocking().unwrap());
        let flags = rustix::io::fcntl_getfd(&descriptor).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[test]
fn the_last_descriptors_are_kept_free() {
    let socket = tcp(Domain::IPV4).unwrap();
    let number = u64::from(socket.as_raw_fd().unsigned_abs());
    for (limit, fits) in
        [(None, true), (Some(number + 33), true), (Some(number + 32), false), (Some(8), false)]
    {
        assert_eq!(leaves(&socket, RESERVE, limit).is_ok(), fits, "{number} of {limit:?}");
    }
}
