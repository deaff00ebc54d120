//! What one sidecar handed over: its imports are served, its exports offered.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::handoff::{SocketId, ToRouter};
use servicekeel_core::mesh::table::{Endpoint, EndpointId};
use servicekeel_core::name::{AllowRule, Protocol, ServicePort};
use servicekeel_runtime::net::{Descriptor, Net};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::warn;

use crate::bounds::Bound;
use crate::datagrams::outlet::Outlet;
use crate::endpoint::PodPort;
use crate::held::{Held, Share};
use crate::node::Node;
use crate::pods::{Pod, SessionError};
use crate::stock::Stocked;
use crate::successor::OVERLAP;
use crate::tasks::AbortOnDrop;
use crate::{bounds, datagrams, held, imports, strangers, successor};

/// The most imports, and the most exports, of one sidecar.
pub(crate) const MAX_SOCKETS: usize = 4096;

/// Within this time what is to close is closed.
const MOMENT: Duration = Duration::from_secs(1);

/// One import in service. Dropped, its socket is closed at once; its flows go on.
pub(crate) struct Served {
    pub(crate) wanted: ServicePort,
    /// Where the pod's applications connect.
    pub(crate) at: SocketAddr,
    task: AbortOnDrop,
    /// For a listener, which then takes first what waits.
    close: Option<oneshot::Sender<AbortOnDrop>>,
    _room: (Share, bounds::Held),
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

/// Why a socket is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "the router holds {0} sockets of this network namespace, as many as it may beside those of others, by its limit of open files"
)]
struct TooMany(u64);

/// Why an export is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "the router offers {0} exports of this network namespace, as many as it may beside those of others, by what one link tells"
)]
struct TooManyExports(u64);

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
    room: bounds::Held,
}

impl<N: Net> Sockets<N> {
    pub(crate) fn new(node: Arc<Node<N>>, pod: Arc<Pod<N>>) -> Self {
        let held = Held::new(node.rooms.offers.account_of_pod(&pod.party.owner));
        Self { node, pod, exports: BTreeMap::new(), held }
    }

    /// Whether there is nothing that could be kept for the pod's next sidecar.
    pub(crate) fn is_empty(&self) -> bool {
        self.exports.is_empty() && self.pod.imports().is_empty()
    }

    /// How many exports are offered.
    pub(crate) fn exports(&self) -> usize {
        self.exports.len()
    }

    /// Rooms for the sockets of a message, `want` at most.
    pub(crate) async fn rooms(&self, message: &ToRouter, want: usize) -> Vec<bounds::Held> {
        let (bound, owner) = (&self.node.sockets, &self.pod.party.owner);
        // By the first one the kernel says whose next sidecar it is: then there is room before long.
        if self.pod.namespace.get().is_none() && want > 0 && !bound.has_room(owner) {
            return vec![bound.owe(owner)];
        }
        match message {
            ToRouter::Import { .. } => self.room(bound).await.into_iter().collect(),
            _ => bound.take_up_to(owner, want),
        }
    }

    /// Takes a message, on the pod's thread, with as many of its sockets as there is room for; says which one is refused,
    /// and why, where one is.
    pub(crate) async fn handle(
        &mut self,
        message: ToRouter,
        mut descriptors: Vec<(N::Descriptor, bounds::Held)>,
    ) -> Result<Option<(SocketId, String)>, SessionError> {
        let check = |(kind, socket): (_, &N::Descriptor)| {
            socket.check(kind).and_then(|()| successor::identify(&self.node, &self.pod, socket))
        };
        let sockets = descriptors.iter().map(|(socket, _)| socket);
        let wrong = message.descriptors().zip(sockets).find_map(|each| check(each).err());
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
                let Some((descriptor, held)) = descriptors.pop() else {
                    let held = self.node.sockets.held(&self.pod.party.owner);
                    return Ok(Some((id, TooMany(held).to_string())));
                };
                let share = match self.held.share(held::of_import(&wanted)) {
                    Ok(share) => share,
                    Err(full) => return Ok(Some((id, full.to_string()))),
                };
                if let Err(error) = self.import(id, wanted, descriptor, (share, held)).await {
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
                // What is free for what comes in its place.
                let (earlier, kept) =
                    self.exports.remove(&id).map(|export| (export.endpoint, export.room)).unzip();
                let room = match kept {
                    Some(room) => Some(room),
                    None => self.room(&self.node.exported).await,
                };
                let Some(room) = room else {
                    let held = self.node.exported.held(&self.pod.party.owner);
                    return Ok(Some((id, TooManyExports(held).to_string())));
                };
                if let Err(reason) = self.export(id, (earlier, room), offered, target, allow) {
                    return Ok(Some((id, reason)));
                }
            }
            ToRouter::Unexport { id } => {
                if let Some(export) = self.exports.remove(&id) {
                    self.withdraw(export.endpoint);
                }
            }
            ToRouter::Stock { tcp, udp: udps } => {
                if let Some(error) = wrong {
                    return Err(error.into());
                }
                let came = (tcp.into(), udps.into());
                let udp = descriptors.split_off(usize::from(tcp).min(descriptors.len()));
                // What there was no room for is asked for again after a while.
                let stocked = |(socket, held)| Stocked { socket, _held: held };
                let [tcp, udp] = [descriptors, udp].map(|sockets| sockets.into_iter().map(stocked).collect());
                self.pod.stock.put(came, tcp, udp);
            }
            ToRouter::Hello { .. } | ToRouter::Bye | ToRouter::Ping => {}
        }
        Ok(None)
    }

    /// Room for one more socket or export of the pod. What an earlier sidecar of it left counts for a moment beside what its
    /// next one has: that is waited for, since a socket that is refused comes again only after a while.
    async fn room(&self, bound: &Arc<Bound>) -> Option<bounds::Held> {
        let owner = &self.pod.party.owner;
        let held = bound.take(owner);
        let is_left = || self.node.pods().values().any(|old| old.came_before(&self.pod));
        if held.is_some() || !is_left() {
            return held;
        }
        timeout(OVERLAP + MOMENT, bound.taken(owner)).await.ok()
    }

    /// Offers a port, or says why not; what it replaces is offered no more in either case.
    fn export(
        &mut self,
        id: SocketId,
        (earlier, room): (Option<EndpointId>, bounds::Held),
        offered: ServicePort,
        target: NonZeroU16,
        allow: Option<Vec<AllowRule>>,
    ) -> Result<(), String> {
        let (theirs, ours) = (&offered.service.cluster, &self.node.id.cluster);
        let share = if theirs == ours {
            let bytes = held::of_export(&offered, allow.as_deref());
            self.held.share(bytes).map_err(|full| full.to_string())
        } else {
            Err(format!("{offered} belongs to cluster {theirs}; this router serves {ours}"))
        };
        let share = match share {
            Ok(share) => share,
            Err(reason) => {
                earlier.into_iter().for_each(|endpoint| self.withdraw(endpoint));
                return Err(reason);
            }
        };
        let strangers = self.node.settings().mesh().map(|mesh| strangers::of(allow.as_deref(), &mesh));
        for reason in strangers.into_iter().flatten() {
            if let Some(suppressed) = self.pod.party.log.permit() {
                let pod = &self.pod.claim.name;
                warn!(service = %offered, %pod, suppressed, "`allow` of an export: {reason}");
            }
        }
        let endpoint = earlier.unwrap_or_else(|| self.node.next_id());
        self.exports.insert(id, Export { endpoint, _share: share, room });
        self.node.endpoints().insert(endpoint, Arc::new(PodPort::new(self.pod.clone(), target)));
        self.node.change_exports(|table| table.add(endpoint, Endpoint { port: offered, target, allow }));
        Ok(())
    }

    async fn import(
        &mut self,
        id: SocketId,
        wanted: ServicePort,
        descriptor: N::Descriptor,
        room: (Share, bounds::Held),
    ) -> std::io::Result<()> {
        let at = descriptor.local_addr()?;
        let (node, thread) = (self.node.clone(), self.pod.thread.clone());
        let (task, close) = match wanted.protocol {
            Protocol::Tcp => {
                let listener = node.net.adopt_listener(descriptor).await?;
                let (close, closed) = oneshot::channel();
                let (party, on) = (self.pod.party.clone(), thread.clone());
                let serving = imports::serve(node.clone(), listener, wanted.clone(), party, on, closed);
                (node.tasks.spawn_on(&thread, serving), Some(close))
            }
            Protocol::Udp => {
                let socket = node.net.adopt_udp(descriptor).await?;
                let party = self.pod.party.clone();
                let outlet = Outlet::new(&node, &thread);
                let serving = datagrams::import::serve(node.clone(), socket, wanted.clone(), party, outlet);
                (node.tasks.spawn_on(&thread, serving), None)
            }
        };
        let served = Served { wanted: wanted.clone(), at, task: AbortOnDrop(task), close, _room: room };
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
