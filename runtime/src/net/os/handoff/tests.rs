use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::time::Duration;

use servicekeel_core::handoff::DescriptorKind;
use tokio::time::timeout;

use super::*;
use crate::net::Descriptor;
use crate::net::os::closer::tests::lingering;

/// A conversation between the code and a peer that the test plays by hand.
async fn with_fake_peer() -> (OsHandoff, OwnedFd) {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    (OsHandoff::own(ours).unwrap(), theirs)
}

fn fake_send(peer: &OwnedFd, message: &[u8], rights: &[BorrowedFd<'_>]) {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(rights.len()))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !rights.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(rights)));
    }
    rustix::net::sendmsg(peer, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

/// Every recv of the code ends within a second here, or the test fails.
async fn recv(handoff: &OsHandoff) -> io::Result<Option<(Vec<u8>, Vec<OsDescriptor>)>> {
    timeout(Duration::from_secs(1), handoff.recv()).await.expect("nothing was received")
}

/// A pipe, whose far end tells when every handle of the near one is closed.
struct Canary {
    read: OwnedFd,
    write: Option<OwnedFd>,
}

impl Canary {
    fn new() -> Self {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        Self { read, write: Some(write) }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.write.as_ref().unwrap().as_fd()
    }

    /// Whether the test's own handle was the last one.
    fn all_closed(mut self) -> bool {
        drop(self.write.take());
        rustix::io::read(&self.read, &mut [0_u8; 1]) == Ok(0)
    }
}

#[tokio::test]
async fn messages_come_whole_with_live_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deeper/still/router.sock");
    let router = OsHandoffListener::listen(&path).await.unwrap();
    let sidecar = OsHandoff::connect(&path).await.unwrap();
    let (accepted, peer) = router.accept().await.unwrap();
    let listener = OsDescriptor::bound(DescriptorKind::TcpListener, "127.0.0.1:0".parse().unwrap()).unwrap();
    let (pid, uid) = (std::process::id() as i32, rustix::process::getuid().as_raw());
    assert_eq!(peer, PeerCredentials { pid, uid, network: listener.namespace().unwrap() });

    let addr = listener.local_addr().unwrap();
    sidecar.send(b"one", vec![listener.share().unwrap()]).await.unwrap();
    sidecar.send(&[7; MAX_MESSAGE], vec![]).await.unwrap();
    accepted.send(b"back", vec![]).await.unwrap();

    let (message, descriptors) = recv(&accepted).await.unwrap().unwrap();
    assert_eq!(message, b"one");
    descriptors[0].check(DescriptorKind::TcpListener).unwrap();
    assert_eq!(descriptors[0].local_addr().unwrap(), addr);
    let (message, descriptors) = recv(&accepted).await.unwrap().unwrap();
    assert_eq!((message.len(), descriptors.len()), (MAX_MESSAGE, 0));
    assert_eq!(recv(&sidecar).await.unwrap().unwrap().0, b"back");

    drop(sidecar);
    assert!(recv(&accepted).await.unwrap().is_none());
}

#[tokio::test]
async fn the_most_descriptors_come_in_order_and_close_on_exec() {
    let (handoff, peer) = with_fake_peer().await;
    let sockets: Vec<OsDescriptor> = (0..MAX_DESCRIPTORS)
        .map(|_| OsDescriptor::bound(DescriptorKind::UdpBound, "127.0.0.1:0".parse().unwrap()).unwrap())
        .collect();
    let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    fake_send(&peer, b"x", &fds);
    let (_, received) = recv(&handoff).await.unwrap().unwrap();
    let addrs = |d: &[OsDescriptor]| d.iter().map(|d| d.local_addr().unwrap()).collect::<Vec<_>>();
    assert_eq!(addrs(&received), addrs(&sockets));
    for descriptor in &received {
        let flags = rustix::io::fcntl_getfd(descriptor).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[tokio::test]
async fn too_many_descriptors_are_refused_and_closed() {
    let (handoff, peer) = with_fake_peer().await;
    let canary = Canary::new();
    fake_send(&peer, b"x", &[canary.fd(); MAX_DESCRIPTORS + 1]);
    let e = recv(&handoff).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::InvalidData, "{e}");
    assert!(canary.all_closed());
    // The conversation itself is not damaged.
    fake_send(&peer, b"next", &[]);
    assert_eq!(recv(&handoff).await.unwrap().unwrap().0, b"next");
}

#[tokio::test]
async fn far_too_many_descriptors_are_refused_and_closed() {
    let (handoff, peer) = with_fake_peer().await;
    let canary = Canary::new();
    fake_send(&peer, b"x", &[canary.fd(); 250]);
    let e = recv(&handoff).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::InvalidData, "{e}");
    assert!(canary.all_closed());
}

#[tokio::test]
async fn a_message_too_long_is_refused_and_its_descriptors_closed() {
    let (handoff, peer) = with_fake_peer().await;
    let canary = Canary::new();
    fake_send(&peer, &[1; MAX_MESSAGE + 1], &[canary.fd()]);
    let e = recv(&handoff).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::InvalidData, "{e}");
    assert!(canary.all_closed());
}

#[tokio::test]
async fn an_empty_message_ends_the_conversation_and_leaks_nothing() {
    let (handoff, peer) = with_fake_peer().await;
    let canary = Canary::new();
    fake_send(&peer, b"", &[canary.fd()]);
    assert!(recv(&handoff).await.unwrap().is_none());
    assert!(canary.all_closed());
}

#[tokio::test]
async fn what_a_peer_sent_before_it_died_still_comes() {
    let (handoff, peer) = with_fake_peer().await;
    // Left unread, it makes the kernel report a reset.
    handoff.send(b"unread", vec![]).await.unwrap();
    fake_send(&peer, b"last words", &[]);
    drop(peer);
    assert_eq!(recv(&handoff).await.unwrap().unwrap().0, b"last words");
    assert!(recv(&handoff).await.unwrap().is_none());
    assert_eq!(handoff.send(b"x", vec![]).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_cancelled_recv_loses_nothing() {
    let (handoff, peer) = with_fake_peer().await;
    for i in 0..200_u8 {
        let canary = Canary::new();
        tokio::select! {
            biased;
            _ = handoff.recv() => panic!("nothing was sent"),
            () = tokio::task::yield_now() => {}
        }
        fake_send(&peer, &[i], &[canary.fd()]);
        let (message, descriptors) = recv(&handoff).await.unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (vec![i], 1));
    }
}

#[tokio::test]
async fn a_slow_receiver_stops_the_sender_and_loses_nothing() {
    let (handoff, peer) = with_fake_peer().await;
    let mut sent = 0_u32;
    loop {
        let message = [&sent.to_be_bytes()[..], &[0; 8000]].concat();
        match timeout(Duration::from_millis(50), handoff.send(&message, vec![])).await {
            Ok(outcome) => outcome.unwrap(),
            Err(_) => break,
        }
        sent += 1;
        assert!(sent < 10_000, "the sender is never stopped");
    }
    let (outcome, ()) = tokio::join!(handoff.send(&[255; 4], vec![]), async {
        let mut buf = [0; 9000];
        for i in 0..sent {
            let (n, _) = rustix::net::recv(&peer, &mut buf, RecvFlags::empty()).unwrap();
            assert_eq!((n, &buf[..4]), (8004, &i.to_be_bytes()[..]));
            tokio::task::yield_now().await;
        }
    });
    outcome.unwrap();
}

#[tokio::test]
async fn what_is_too_large_is_not_sent() {
    let (handoff, _peer) = with_fake_peer().await;
    let socket = OsDescriptor::unbound(DescriptorKind::TcpUnconnected).unwrap();
    let many = (0..=MAX_DESCRIPTORS).map(|_| socket.share().unwrap()).collect();
    for (message, descriptors) in [(vec![], vec![]), (vec![0; MAX_MESSAGE + 1], vec![]), (vec![0], many)] {
        let e = handoff.send(&message, descriptors).await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
    }
}

#[tokio::test]
async fn any_user_may_connect_and_the_file_goes_with_the_listener() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("router.sock");
    let router = OsHandoffListener::listen(&path).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
    drop(router);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("router.sock");
    // Rust's own listener leaves its file behind, as a killed router does.
    drop(StdUnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let router = OsHandoffListener::listen(&path).await.unwrap();

    let e = OsHandoffListener::listen(&path).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::AddrInUse);
    assert!(e.to_string().contains("another router is listening"), "{e}");
    // And the first one has taken no harm, from the question least of all.
    let (_probe, _) = router.accept().await.unwrap();
    let sidecar = OsHandoff::connect(&path).await.unwrap();
    let (accepted, _) = router.accept().await.unwrap();
    sidecar.send(b"x", vec![]).await.unwrap();
    assert!(recv(&accepted).await.unwrap().is_some());
}

#[tokio::test]
async fn what_is_no_socket_of_ours_stays() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let e = OsHandoffListener::listen(&file).await.unwrap_err();
    assert!(e.to_string().contains("not a socket"), "{e}");
    assert_eq!(fs::read(&file).unwrap(), b"precious");

    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    assert!(OsHandoffListener::listen(&link).await.is_err());
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

    let stream = dir.path().join("stream");
    let _served = StdUnixListener::bind(&stream).unwrap();
    let e = OsHandoffListener::listen(&stream).await.unwrap_err();
    assert!(e.to_string().contains("another program is listening"), "{e}");
}

#[tokio::test]
async fn the_file_of_a_successor_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("router.sock");
    let first = OsHandoffListener::listen(&path).await.unwrap();
    fs::remove_file(&path).unwrap();
    let second = OsHandoffListener::listen(&path).await.unwrap();
    drop(first);
    OsHandoff::connect(&path).await.unwrap();
    drop(second);
    assert!(!path.exists());
}

#[test]
fn of_routers_that_start_at_once_one_serves() {
    for after_a_crash in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.sock");
        if after_a_crash {
            drop(StdUnixListener::bind(&path).unwrap());
        }
        let barrier = &std::sync::Barrier::new(8);
        let served: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    let path = &path;
                    scope.spawn(move || {
                        let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                        barrier.wait();
                        rt.block_on(OsHandoffListener::listen(path)).map(|listener| (rt, listener))
                    })
                })
                .collect();
            threads.into_iter().filter_map(|t| t.join().unwrap().ok()).collect()
        });
        assert_eq!(served.len(), 1, "after a crash: {after_a_crash}");
        served[0].0.block_on(OsHandoff::connect(&path)).unwrap();
        assert_eq!(names(dir.path()), ["router.sock"]);
    }
}

/// What lies in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn whoever_can_read_the_directory_has_no_say_in_whether_a_router_starts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("router.sock");
    // First on a free path, then after a clean end, then after a crash.
    for round in 0..3 {
        if round == 2 {
            drop(StdUnixListener::bind(&path).unwrap());
        }
        // As a pod with a read-only mount may: the directory itself, and whatever file in it can be opened.
        let files = names(dir.path()).into_iter().map(|name| dir.path().join(name));
        let locked: Vec<fs::File> =
            files.chain([dir.path().to_owned()]).filter_map(|file| fs::File::open(file).ok()).collect();
        assert!(!locked.is_empty());
        for file in &locked {
            file.lock().unwrap();
        }
        let started = timeout(Duration::from_secs(1), OsHandoffListener::listen(&path)).await;
        let router = started.expect("it waits for the lock").unwrap();
        OsHandoff::connect(&path).await.unwrap();
        // What it has made meanwhile can't be locked either, so that its next start is as free.
        assert_eq!(names(dir.path()), ["router.sock"]);
        assert!(fs::File::open(&path).is_err());
        drop(router);
    }
}

#[tokio::test]
async fn errors_name_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(120));
    assert!(OsHandoff::connect(&long).await.unwrap_err().to_string().contains("107 bytes"));
    let absent = dir.path().join("absent");
    let e = OsHandoff::connect(&absent).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::NotFound);
    assert!(e.to_string().contains("absent"), "{e}");
}

#[tokio::test]
async fn what_lingers_in_a_conversation_that_is_refused_keeps_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("router.sock");
    let router = OsHandoffListener::listen(&path).await.unwrap();
    let mut deaf = Vec::new();
    for _ in 0..3 {
        for number in 0..MAX_REFUSED {
            let sidecar = OsHandoff::connect(&path).await.unwrap();
            if number % 8 == 0 {
                let (stock, reader) = lingering();
                let stock = OsDescriptor::from(stock);
                sidecar.send(b"x", vec![stock]).await.unwrap();
                deaf.push(reader);
            }
            drop(sidecar);
            drop(timeout(Duration::from_secs(5), router.accept()).await.expect("there is room").unwrap());
        }
    }
}

#[tokio::test]
async fn what_is_refused_has_no_thread_and_the_closes_that_wait_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("router.sock");
    let router = OsHandoffListener::listen(&path).await.unwrap();
    let accept = async || timeout(Duration::from_millis(300), router.accept()).await;
    // As a close that waits.
    let (release, waits) = std::sync::mpsc::channel::<()>();
    router.closing.call(move || assert!(waits.recv().is_err()));
    let mut closers = Vec::new();
    for _ in 0..MAX_REFUSED {
        let _sidecar = OsHandoff::connect(&path).await.unwrap();
        let (refused, _) = accept().await.expect("there is room").unwrap();
        closers.push(refused.thread());
    }
    // No thread was made for any of them.
    assert!(closers.iter().all(|thread| *thread == router.closing));
    let _next = OsHandoff::connect(&path).await.unwrap();
    assert!(accept().await.is_err(), "more are accepted than can be closed");
    drop(release);
    let (seated, _) = accept().await.expect("all are closed").unwrap();
    let seated = seated.with_own_thread(Arc::new(|_| None)).unwrap_or_else(|(_, error)| panic!("{error}"));
    assert!(seated.thread() != router.closing);
    // One with a thread of its own counts no more.
    let all_closed = async {
        while router.refused.available_permits() < MAX_REFUSED {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(5), all_closed).await.expect("those that are closed give their place back");
}
