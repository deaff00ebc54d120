//! A pod that says it is another: the uid of a pod is no secret, and gives nobody its place.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use servicekeel_core::handoff::{DescriptorKind, Pod, SocketId, ToRouter, ToSidecar, VERSION};
use servicekeel_core::name::{Protocol, ServiceName, ServicePort};
use servicekeel_runtime::net::{Handoff, Net};
use sim::client::USES;
use sim::flow::Outcome;
use sim::net::SimNet;
use sim::oracle::SETTLED;
use sim::random::{Random, seeds};
use sim::simulation::simulate;
use sim::stage::{CLUSTER_A, DATABASE, METRICS, WEB, two_clusters};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// More than the old sockets of a pod stay beside those of its next sidecar, and far less than without one.
const REPLACED: Duration = Duration::from_secs(4);
/// The sidecars' user.
const USER: u32 = 1337;

/// What it says besides.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// It hands over no socket.
    Nothing,
    /// It hands over sockets of its own network namespace: what is asked for, and an import.
    Sockets,
}

fn unknown() -> ServicePort {
    let service = ServiceName {
        name: "unknown".parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: CLUSTER_A.parse().unwrap(),
    };
    ServicePort { service, port: 80.try_into().unwrap(), protocol: Protocol::Tcp }
}

/// A conversation that claims to be the sidecar of `victim`.
async fn claim(net: SimNet, victim: &str, deed: Deed, at: SocketAddr) {
    let router = net.handoff_connect(Path::new("/run/router.sock")).await.unwrap();
    let pod =
        Pod { name: victim.into(), namespace: "default".parse().unwrap(), uid: format!("uid-of-{victim}") };
    let hello = ToRouter::Hello { version: VERSION, pod, addresses: Vec::new() };
    router.send(&hello.encode(), Vec::new()).await.unwrap();
    if matches!(deed, Deed::Sockets) {
        let listener = net.make_bound(DescriptorKind::TcpListener, at).await.unwrap();
        let import = ToRouter::Import { id: 1, wanted: unknown() };
        router.send(&import.encode(), vec![listener]).await.unwrap();
    }
    while let Ok(Some((bytes, _))) = router.recv().await {
        if let (Ok(ToSidecar::More { tcp, udp }), Deed::Sockets) = (ToSidecar::decode(&bytes), deed) {
            router.send(&ToRouter::Stock { tcp, udp }.encode(), stock(&net, tcp, udp)).await.unwrap();
        }
    }
}

fn stock(net: &SimNet, tcp: u16, udp: u16) -> Vec<<SimNet as Net>::Descriptor> {
    let tcps = std::iter::repeat_n(DescriptorKind::TcpUnconnected, tcp.into());
    let udps = std::iter::repeat_n(DescriptorKind::UdpUnconnected, udp.into());
    tcps.chain(udps).map(|kind| net.make_unbound(kind).unwrap()).collect()
}

/// Both come from this node; `near` imports and `server` exports.
fn claims(victim: &'static str, claimer: &'static str, deed: Deed) {
    for seed in seeds(8) {
        simulate(seed, &two_clusters(), move |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let web = world.locate("near", &WEB).await;
            let db = world.locate("near", &DATABASE).await;
            let from_afar = world.locate("client", &WEB).await;
            let before = world.open("a-1");
            world.kill_sidecar(victim).await;
            sleep(random.millis(0..2000)).await;
            let net = world.net(claimer).process(USER);
            let (doing, mut tasks) = (world.clone(), JoinSet::new());
            let (stop, stopped) = oneshot::channel::<()>();
            // The address of an import of its victim, where it has one, for another Service.
            let at = if victim == "near" { web } else { SocketAddr::from(([127, 9, 9, 9], 80)) };
            let mallory = async move {
                tokio::select! {
                    biased;
                    _ = stopped => {}
                    () = claim(net, victim, deed, at) => panic!("its conversation was ended"),
                }
            };
            tasks.spawn_local(async move { doing.within(claimer, mallory).await });
            // Its own applications are served as before, or those of others by the sockets of it that are in stock.
            let uses = match victim {
                "near" => [("near", WEB, web), ("near", DATABASE, db)],
                _ => [("near", WEB, web), ("client", WEB, from_afar)],
            };
            for (pod, port, to) in uses.into_iter().cycle().take(4) {
                sleep(random.millis(1000..3000)).await;
                let outcome = world.flow(pod, to, world.plan(&port, 1000, 1000)).await;
                assert_eq!(outcome, Outcome::Complete, "{pod} to {port}, while {victim} is claimed");
            }
            // Its own next sidecar has its place as soon as ever: nothing of the former is left beside it.
            world.start_sidecar(victim).await;
            for (pod, port) in USES {
                world.until_works(pod, &port, SETTLED).await;
            }
            sleep(REPLACED).await;
            let of_claimer = usize::from(matches!(deed, Deed::Sockets));
            assert_eq!(world.open("a-1")["TCP listener"], before["TCP listener"] + of_claimer);
            drop(stop);
            tasks.join_next().await.unwrap().unwrap();
        });
    }
}

#[test]
fn a_claimed_uid_takes_no_imports_while_a_sidecar_restarts() {
    claims("near", "server", Deed::Sockets);
    claims("near", "server", Deed::Nothing);
}

#[test]
fn a_claimed_uid_takes_no_exports_while_a_sidecar_restarts() {
    claims("server", "near", Deed::Sockets);
    claims("server", "near", Deed::Nothing);
}

#[test]
fn all_sockets_of_a_sidecar_are_of_one_network_namespace() {
    for seed in seeds(4) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let (own, other) = (world.net("near").process(USER), world.net("server").process(USER));
            let job = async move {
                let router = own.handoff_connect(Path::new("/run/router.sock")).await.unwrap();
                let pod = Pod { name: "p".into(), namespace: "default".parse().unwrap(), uid: String::new() };
                let hello = ToRouter::Hello { version: VERSION, pod, addresses: Vec::new() };
                router.send(&hello.encode(), Vec::new()).await.unwrap();
                for (id, net) in [(1, &own), (2, &other), (3, &own)] {
                    let at = SocketAddr::from(([127, 9, 9, 9], 1000 + id as u16));
                    let listener = net.make_bound(DescriptorKind::TcpListener, at).await.unwrap();
                    let import = ToRouter::Import { id, wanted: unknown() };
                    router.send(&import.encode(), vec![listener]).await.unwrap();
                }
                // One of another namespace in the stock ends the conversation, as any that is not what it should be.
                let mixed = [stock(&own, 1, 0), stock(&other, 0, 1)].concat();
                router.send(&ToRouter::Stock { tcp: 1, udp: 1 }.encode(), mixed).await.unwrap();
                let mut refused: Vec<(Option<SocketId>, String)> = Vec::new();
                while let Ok(Ok(Some((bytes, _)))) = timeout(SETTLED, router.recv()).await {
                    if let Ok(ToSidecar::Refused { id, reason }) = ToSidecar::decode(&bytes) {
                        refused.push((id, reason));
                    }
                }
                refused
            };
            let refused = world.within("near", job).await;
            let reason =
                "the socket belongs to another network namespace than this sidecar's first one".to_owned();
            assert_eq!(refused, [(Some(2), reason.clone()), (None, reason)]);
        });
    }
}

/// A kernel that does not say it: a restart goes well nevertheless, and what is left is kept for its time alone.
#[test]
fn on_an_older_kernel_a_sidecar_restarts() {
    for seed in seeds(8) {
        simulate(seed, &two_clusters(), |world| async move {
            world.age_kernel("a-1");
            world.age_kernel("b-1");
            world.set_up().await;
            let before = world.open("a-1");
            let to = [("near", WEB), ("near", METRICS), ("client", WEB)];
            for restarts in ["near", "server"] {
                world.kill_sidecar(restarts).await;
                world.start_sidecar(restarts).await;
                for (pod, port) in USES {
                    world.until_works(pod, &port, SETTLED).await;
                }
                for _ in 0..5 {
                    for (pod, port) in to {
                        let at = world.locate(pod, &port).await;
                        let outcome = world.flow(pod, at, world.plan(&port, 1000, 1000)).await;
                        assert_eq!(outcome, Outcome::Complete, "{pod} to {port}, after {restarts} restarted");
                    }
                }
                sleep(Duration::from_secs(31)).await;
                assert_eq!(world.open("a-1")["TCP listener"], before["TCP listener"], "{restarts}");
            }
        });
    }
}
