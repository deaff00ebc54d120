//! What one sidecar handed over: its imports are served, its exports offered.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use servicekeel_core::handoff::{SocketId, ToRouter};
use servicekeel_core::mesh::table::{Endpoint, EndpointId};
use servicekeel_core::name::{Protocol, ServicePort};
use servicekeel_runtime::net::{Descriptor, Net, PodThread};
use tokio::sync::oneshot;

use crate::endpoint::PodPort;
use crate::node::Node;
use crate::pods::{Pod, SessionError};
use crate::tasks::AbortOnDrop;
use crate::{datagrams, imports};

/// The most imports, and the most exports, of one sidecar.
pub(crate) const MAX_SOCKETS: usize = 4096;

/// One import in service. Dropped, its socket is closed at once; its flows go on.
pub(crate) struct Served {
    pub(crate) wanted: ServicePort,
    /// Where the pod's applications connect.
    pub(crate) at: SocketAddr,
    task: AbortOnDrop,
    /// For a listener, which then takes first what waits.
    close: Option<oneshot::Sender<AbortOnDrop>>,
}

impl Served {
    /// Closes its socket; what came before that is served.
    fn close(self) {
        if let Some(close) = self.close {
            // Where the task has ended already, so has its socket.
            let _ = close.send(self.task);
        }
    }
}

/// The sockets. Dropped, all of them are closed and withdrawn.
pub(crate) struct Sockets<N: Net> {
    node: Arc<Node<N>>,
    pod: Arc<Pod<N>>,
    exports: BTreeMap<SocketId, EndpointId>,
}

impl<N: Net> Sockets<N> {
    pub(crate) fn new(node: Arc<Node<N>>, pod: Arc<Pod<N>>) -> Self {
        Self { node, pod, exports: BTreeMap::new() }
    }

    /// Whether there is nothing that could be kept for the pod's next sidecar.
    pub(crate) fn is_empty(&self) -> bool {
        self.exports.is_empty() && self.pod.imports().is_empty()
    }

    /// Takes a message, on the pod's thread; says which socket is refused, and why, where one is.
    pub(crate) async fn handle(
        &mut self,
        message: ToRouter,
        mut descriptors: Vec<N::Descriptor>,
    ) -> Result<Option<(SocketId, String)>, SessionError> {
        let wrong = message.descriptors().zip(&descriptors).find_map(|(kind, d)| d.check(kind).err());
        match message {
            ToRouter::Import { id, wanted } => {
                if let Some(error) = wrong {
                    return Ok(Some((id, error.to_string())));
                }
                {
                    let imports = self.pod.imports();
                    if imports.len() >= MAX_SOCKETS && !imports.contains_key(&id) {
                        return Err(SessionError::TooMany);
                    }
                }
                let Some(descriptor) = descriptors.pop() else { return Ok(None) };
                if let Err(error) = self.import(id, wanted, descriptor).await {
                    return Ok(Some((id, error.to_string())));
                }
            }
            ToRouter::Unimport { id } => {
                let served = self.pod.imports().remove(&id);
                served.into_iter().for_each(Served::close);
            }
            ToRouter::Export { id, offered, target, allow } => {
                if offered.service.cluster != self.node.id.cluster {
                    let (theirs, ours) = (&offered.service.cluster, &self.node.id.cluster);
                    return Ok(Some((
                        id,
                        format!("{offered} is of the cluster {theirs}; this router serves {ours}"),
                    )));
                }
                if self.exports.len() >= MAX_SOCKETS && !self.exports.contains_key(&id) {
                    return Err(SessionError::TooMany);
                }
                let endpoint = *self.exports.entry(id).or_insert_with(|| self.node.next_id());
                self.node.endpoints().insert(endpoint, Arc::new(PodPort::new(self.pod.clone(), target)));
                self.node
                    .change_exports(|table| table.add(endpoint, Endpoint { port: offered, target, allow }));
            }
            ToRouter::Unexport { id } => {
                if let Some(endpoint) = self.exports.remove(&id) {
                    self.withdraw(endpoint);
                }
            }
            ToRouter::Stock { tcp, .. } => {
                if let Some(error) = wrong {
                    return Err(error.into());
                }
                let udp = descriptors.split_off(usize::from(tcp).min(descriptors.len()));
                self.pod.stock.put(descriptors, udp);
            }
            ToRouter::Hello { .. } | ToRouter::Bye => {}
        }
        Ok(None)
    }

    async fn import(
        &mut self,
        id: SocketId,
        wanted: ServicePort,
        descriptor: N::Descriptor,
    ) -> std::io::Result<()> {
        let at = descriptor.local_addr()?;
        for old in self.node.pods().values().filter(|old| old.came_before(&self.pod)) {
            old.give_way(at, &wanted);
        }
        let (node, thread) = (self.node.clone(), self.pod.thread.clone());
        let (task, close) = match wanted.protocol {
            Protocol::Tcp => {
                let listener = node.net.adopt_listener(descriptor).await?;
                let (close, closed) = oneshot::channel();
                let serving = imports::serve(node.clone(), listener, wanted.clone(), closed);
                let task = node.tasks.spawn(async move {
                    let _ = thread.run(serving).await;
                });
                (task, Some(close))
            }
            Protocol::Udp => {
                let socket = node.net.adopt_udp(descriptor).await?;
                let owner = self.pod.datagrams.clone();
                let serving = datagrams::import::serve(node.clone(), socket, wanted.clone(), owner);
                let task = node.tasks.spawn(async move {
                    let _ = thread.run(serving).await;
                });
                (task, None)
            }
        };
        let served = Served { wanted, at, task: AbortOnDrop(task), close };
        self.pod.imports().insert(id, served);
        Ok(())
    }

    /// The pod's UDP exports are withdrawn.
    pub(crate) fn withdraw_udp(&mut self) {
        let udp = |endpoint: EndpointId| {
            let routes = self.node.routes();
            routes.table.endpoint(endpoint).is_some_and(|e| e.port.protocol == Protocol::Udp)
        };
        let (gone, kept) = std::mem::take(&mut self.exports).into_iter().partition(|(_, e)| udp(*e));
        self.exports = kept;
        BTreeMap::into_values(gone).for_each(|endpoint| self.withdraw(endpoint));
    }

    /// The pod's exports are withdrawn; its imports go on.
    pub(crate) fn withdraw_all(&mut self) {
        for endpoint in std::mem::take(&mut self.exports).into_values() {
            self.withdraw(endpoint);
        }
    }

    fn withdraw(&self, endpoint: EndpointId) {
        self.node.endpoints().remove(&endpoint);
        self.node.change_exports(|table| table.remove(endpoint));
    }
}

impl<N: Net> Drop for Sockets<N> {
    fn drop(&mut self) {
        self.withdraw_all();
        let served = std::mem::take(&mut *self.pod.imports());
        served.into_values().for_each(Served::close);
        self.pod.stock.close();
        self.node.pods().remove(&self.pod.session);
    }
}
