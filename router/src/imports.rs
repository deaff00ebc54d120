//! Imports: the listening sockets of pods, on which the router accepts.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use servicekeel_core::name::ServicePort;
use servicekeel_runtime::net::{Listener, Net};
use servicekeel_runtime::throttle::Throttle;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::yield_now;
use tokio::time::sleep;
use tracing::warn;

use crate::node::Node;
use crate::outbound;
use crate::tasks::AbortOnDrop;

/// How long to wait where the system can't give another descriptor.
const PAUSE: Duration = Duration::from_millis(50);

/// How many connections are taken at the last moment, before a socket closes.
const LAST: usize = 1024;

/// How often it is told that the flows of an import find no endpoint, and that its socket fails.
const TELL: Duration = Duration::from_secs(10);

/// One import.
pub(crate) struct Import {
    pub(crate) wanted: ServicePort,
    /// For the log: flows, or UDP sessions, that found no endpoint.
    pub(crate) failures: Throttle,
    /// For the log: its socket fails.
    pub(crate) faults: Throttle,
}

impl Import {
    /// Its lines in the log are its pod's too.
    pub(crate) fn new(wanted: ServicePort, of_pod: &Arc<Throttle>) -> Arc<Self> {
        let throttle = || Throttle::new(1, TELL).under(of_pod);
        Arc::new(Self { wanted, failures: throttle(), faults: throttle() })
    }

    /// Says that a UDP session found no endpoint.
    pub(crate) fn tell_no_session(&self, reason: impl FnOnce() -> String) {
        if let Some(suppressed) = self.failures.permit() {
            warn!(wanted = %self.wanted, reason = reason(), suppressed, "no endpoint accepted the datagrams; dropped");
        }
    }
}

/// Accepts on one import until it is to close. At the bound of flows connections wait in the backlog.
pub(crate) async fn serve<N: Net>(
    node: Arc<Node<N>>,
    listener: N::TcpListener,
    wanted: ServicePort,
    log: Arc<Throttle>,
    close: oneshot::Receiver<AbortOnDrop>,
) {
    let import = Import::new(wanted, &log);
    let wanted = &import.wanted;
    let mut draining = node.draining.subscribe();
    let accept = async {
        loop {
            node.room_for_flow().await;
            match listener.accept().await {
                Ok((app, _)) => {
                    let Ok(permit) = node.flows.clone().acquire_owned().await else { return };
                    begin(&node, app, &import, permit);
                }
                Err(error) => {
                    // Such as EMFILE: what waits stays in the backlog meanwhile.
                    node.relieve();
                    if let Some(suppressed) = import.faults.permit() {
                        warn!(%wanted, %error, suppressed, "cannot accept connections; retrying");
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    };
    let _this = tokio::select! {
        biased;
        // What comes from now on waits in the backlog for the next router.
        _ = draining.wait_for(|draining| *draining) => return,
        closing = close => closing,
        () = accept => return,
    };
    // A listener that closes resets what waits in its backlog (tcp(7)), also where another socket of its address would
    // have taken it.
    for _ in 0..LAST {
        yield_now().await;
        let Some(Ok((app, _))) = listener.accept().now_or_never() else { return };
        let Ok(permit) = node.flows.clone().try_acquire_owned() else { return };
        begin(&node, app, &import, permit);
    }
}

fn begin<N: Net>(node: &Arc<Node<N>>, app: N::TcpStream, import: &Arc<Import>, permit: OwnedSemaphorePermit) {
    let flow = outbound::flow(node.clone(), app, import.clone());
    node.tasks.spawn(async move {
        flow.await;
        drop(permit);
    });
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};
    use std::net::TcpStream;

    use servicekeel_core::name::{Protocol, RouterId, ServiceName};
    use servicekeel_runtime::net::os::OsNet;

    use super::*;
    use crate::settings::{Config, Listen, Settings};

    /// Whether a connection that comes in the moment before the listener closes is still there after it.
    #[tokio::test]
    async fn what_waits_when_a_listener_closes_is_served() {
        let id = RouterId { cluster: "a.local".parse().unwrap(), node: "n".parse().unwrap() };
        let listen = Listen { sidecars: "/nowhere".into(), peers: None, admin: None };
        let (cluster, name) = (id.cluster.clone(), id.node.clone());
        let config = Arc::new(Config { cluster, node: name, listen, peers: Vec::new(), revoked: Vec::new() });
        let (_, settings) = tokio::sync::watch::channel(Arc::new(Settings {
            config,
            identity: None,
            untimely: None,
            pending: Default::default(),
        }));
        let wanted = ServicePort {
            service: ServiceName {
                name: "web".parse().unwrap(),
                namespace: "default".parse().unwrap(),
                cluster: id.cluster.clone(),
            },
            port: 80.try_into().unwrap(),
            protocol: Protocol::Tcp,
        };
        let node = Node::new(OsNet::new(), id, 1, settings);
        let listener = node.net.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let log = Arc::new(Throttle::new(1, TELL));
        let (close, closing) = oneshot::channel();
        let task = node.tasks.spawn(serve(node.clone(), listener, wanted, log, closing));
        yield_now().await;
        // One thread: the router has no turn between the two.
        let mut app = TcpStream::connect(addr).unwrap();
        close.send(AbortOnDrop(task)).map_err(|_| "it has ended").unwrap();
        sleep(PAUSE).await;
        assert!(TcpStream::connect(addr).is_err(), "the listener is open");
        app.set_nonblocking(true).unwrap();
        let read = app.read(&mut [0]).unwrap_err();
        assert_eq!(read.kind(), io::ErrorKind::WouldBlock, "{read}");
    }
}
