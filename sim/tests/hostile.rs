//! A pod that means harm: whoever may reach the router's socket hurts nobody but itself.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::path::Path;
use std::time::Duration;

use servicekeel_core::handoff::{Pod, ToRouter, VERSION};
use servicekeel_core::name::{Protocol, ServiceName, ServicePort};
use servicekeel_runtime::net::{Handoff, Net};
use sim::client::USES;
use sim::net::SimNet;
use sim::oracle::SETTLED;
use sim::random::{Random, seeds};
use sim::simulation::simulate;
use sim::stage::{ECHO, two_clusters};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long one of its deeds may take.
const DEED: Duration = Duration::from_millis(500);

fn port(number: u64, protocol: Protocol) -> ServicePort {
    let service = ServiceName {
        name: format!("flood-{number}").parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: "cluster-a.local".parse().unwrap(),
    };
    ServicePort { service, port: 80.try_into().unwrap(), protocol }
}

/// One conversation with the router that is not polite, and never reads.
async fn conversation(net: SimNet, mut random: Random) {
    let Ok(router) = net.handoff_connect(Path::new("/run/router.sock")).await else { return };
    let pod = Pod { name: "mallory".into(), namespace: "default".parse().unwrap(), uid: String::new() };
    let hello = ToRouter::Hello { version: VERSION, pod, addresses: vec![[10, 1, 0, 3].into(); 20] };
    if random.chance(80) && router.send(&hello.encode(), Vec::new()).await.is_err() {
        return;
    }
    let (kind, until) = (random.within(0..4), random.within(1..6000));
    for number in 0..until {
        let message = match kind {
            0 => (0..random.within(1..200)).map(|_| random.draw() as u8).collect(),
            1 => ToRouter::Export {
                id: number,
                offered: port(number, Protocol::Tcp),
                target: 1.try_into().unwrap(),
                allow: None,
            }
            .encode(),
            // Imports and stock that come without the sockets that they speak of.
            2 => ToRouter::Import { id: number, wanted: port(number, Protocol::Udp) }.encode(),
            _ => hello.encode(),
        };
        if !matches!(timeout(DEED, router.send(&message, Vec::new())).await, Ok(Ok(()))) {
            break;
        }
    }
    // It stays, and says nothing more.
    sleep(random.millis(0..8000)).await;
}

#[test]
fn a_pod_that_is_not_polite_hurts_nobody_else() {
    for seed in seeds(8) {
        let report = simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut probes = JoinSet::new();
            for (pod, port) in USES.into_iter().filter(|(pod, _)| *pod != "near") {
                probes.spawn_local(world.clone().probe(pod, port, Duration::from_millis(200)));
            }
            let to = world.locate("near", &ECHO).await;
            let mut deeds = JoinSet::new();
            for _ in 0..40 {
                let (net, random) = (world.net("near").process(1000), random.fork());
                let doing = world.clone();
                deeds.spawn_local(async move {
                    doing.within("near", conversation(net, random)).await;
                });
                for _ in 0..20 {
                    let doing = world.clone();
                    deeds.spawn_local(async move {
                        doing.exchange("near", to, &ECHO, 1200).await;
                    });
                }
                sleep(Duration::from_millis(400)).await;
            }
            while deeds.join_next().await.is_some() {}
            sleep(SETTLED).await;
            probes.shutdown().await;
        });
        assert!(report.tally.probes > 0, "{:?}", report.tally);
    }
}
