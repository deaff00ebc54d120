//! What one sidecar handed over: its imports are served, its exports offered.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use servicekeel_core::handoff::{SocketId, ToRouter};
use servicekeel_core::mesh::table::{Endpoint, EndpointId};
use servicekeel_core::name::{AllowRule, Protocol, ServicePort};
use servicekeel_runtime::net::{Descriptor, Net, PodThread};
use tokio::sync::oneshot;

use crate::endpoint::PodPort;
use crate::held::{Held, Share};
use crate::node::Node;
use crate::pods::{Pod, SessionError};
use crate::tasks::AbortOnDrop;
use crate::{datagrams, held, imports, successor};

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
    _share: Share,
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
    exports: BTreeMap<SocketId, Export>,
    held: Arc<Held>,
}

/// One export that is offered.
struct Export {
    endpoint: EndpointId,
    _share: Share,
}

impl<N: Net> Sockets<N> {
    pub(crate) fn new(node: Arc<Node<N>>, pod: Arc<Pod<N>>) -> Self {
        let held = Held::new(node.held.clone());
        Self { node, pod, exports: BTreeMap::new(), held }
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
        let check = |(kind, socket): (_, &N::Descriptor)| {
            socket.check(kind).and_then(|()| successor::identify(&self.node, &self.pod, socket))
        };
        let wrong = message.descriptors().zip(&descriptors).find_map(|each| check(each).err());
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
                let share = match self.held.share(held::of_import(&wanted)) {
                    Ok(share) => share,
                    Err(full) => return Ok(Some((id, full.to_string()))),
                };
                if let Err(error) = self.import(id, wanted, descriptor, share).await {
                    return Ok(Some((id, error.to_string())));
                }
            }
            ToRouter::Unimport { id } => {
                let served = self.pod.imports().remove(&id);
                served.into_iter().for_each(Served::close);
            }
            ToRouter::Export { id, offered, target, allow } => {
                if self.exports.len() >= MAX_SOCKETS && !self.exports.contains_key(&id) {
                    return Err(SessionError::TooMany);
                }
                if let Err(reason) = self.export(id, offered, target, allow) {
                    return Ok(Some((id, reason)));
                }
            }
            ToRouter::Unexport { id } => {
                if let Some(export) = self.exports.remove(&id) {
                    self.withdraw(export.endpoint);
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

    /// Offers a port, or says why not; what it replaces is offered no more in either case.
    fn export(
        &mut self,
        id: SocketId,
        offered: ServicePort,
        target: NonZeroU16,
        allow: Option<Vec<AllowRule>>,
    ) -> Result<(), String> {
        // Its share is free for what comes in its place.
        let earlier = self.exports.remove(&id).map(|export| export.endpoint);
        let (theirs, ours) = (&offered.service.cluster, &self.node.id.cluster);
        let share = if theirs == ours {
            let bytes = held::of_export(&offered, allow.as_deref());
            self.held.share(bytes).map_err(|full| full.to_string())
        } else {
            Err(format!("{offered} is of the cluster {theirs}; this router serves {ours}"))
        };
        let share = match share {
            Ok(share) => share,
            Err(reason) => {
                earlier.into_iter().for_each(|endpoint| self.withdraw(endpoint));
                return Err(reason);
            }
        };
        let endpoint = earlier.unwrap_or_else(|| self.node.next_id());
        self.exports.insert(id, Export { endpoint, _share: share });
        self.node.endpoints().insert(endpoint, Arc::new(PodPort::new(self.pod.clone(), target)));
        self.node.change_exports(|table| table.add(endpoint, Endpoint { port: offered, target, allow }));
        Ok(())
    }

    async fn import(
        &mut self,
        id: SocketId,
        wanted: ServicePort,
        descriptor: N::Descriptor,
        share: Share,
    ) -> std::io::Result<()> {
        let at = descriptor.local_addr()?;
        let (node, thread) = (self.node.clone(), self.pod.thread.clone());
        let (task, close) = match wanted.protocol {
            Protocol::Tcp => {
                let listener = node.net.adopt_listener(descriptor).await?;
                let (close, closed) = oneshot::channel();
                let serving =
                    imports::serve(node.clone(), listener, wanted.clone(), self.pod.log.clone(), closed);
                let task = node.tasks.spawn(async move {
                    let _ = thread.run(serving).await;
                });
                (task, Some(close))
            }
            Protocol::Udp => {
                let socket = node.net.adopt_udp(descriptor).await?;
                let (owner, log) = (self.pod.datagrams.clone(), self.pod.log.clone());
                let serving = datagrams::import::serve(node.clone(), socket, wanted.clone(), owner, log);
                let task = node.tasks.spawn(async move {
                    let _ = thread.run(serving).await;
                });
                (task, None)
            }
        };
        let served = Served { wanted: wanted.clone(), at, task: AbortOnDrop(task), close, _share: share };
        self.pod.imports().insert(id, served);
        // Those whose end is not seen yet look at what is served here when it is.
        for old in self.node.pods().values().filter(|old| old.came_before(&self.pod)) {
            old.give_way(at, &wanted);
        }
        Ok(())
    }

    /// The pod's UDP exports are withdrawn.
    pub(crate) fn withdraw_udp(&mut self) {
        let udp = |endpoint: EndpointId| {
            let routes = self.node.routes();
            routes.table.endpoint(endpoint).is_some_and(|e| e.port.protocol == Protocol::Udp)
        };
        let (gone, kept) = std::mem::take(&mut self.exports).into_iter().partition(|(_, e)| udp(e.endpoint));
        self.exports = kept;
        BTreeMap::into_values(gone).for_each(|export: Export| self.withdraw(export.endpoint));
    }

    /// The pod's exports are withdrawn; its imports go on.
    pub(crate) fn withdraw_all(&mut self) {
        for export in std::mem::take(&mut self.exports).into_values() {
            self.withdraw(export.endpoint);
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
