//! A pod or a peer that means harm: whoever may reach the router's sockets hurts nobody but itself.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::time::Duration;

use sim::client::USES;
use sim::oracle::SETTLED;
use sim::random::{Random, seeds};
use sim::simulation::{Fault, simulate};
use sim::stage::{
    CLUSTER_A, DATABASE, ECHO, METRICS, NodeSpec, PodSpec, Port, SYSLOG, Stage, WEB, three_endpoints,
    two_clusters,
};
use tokio::task::JoinSet;
use tokio::time::sleep;

const PORTS: [Port; 5] = [WEB, DATABASE, ECHO, METRICS, SYSLOG];
/// A stranger to both clusters, whom they trust.
const MALLORY: NodeSpec =
    NodeSpec { name: "m-1", cluster: "cluster-m.local", dials: &["a-1", "b-1"], listens: false };

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
            for number in 0..40 {
                let doing = world.clone();
                let most = random.within(1..6000);
                deeds.spawn_local(async move {
                    doing.harm_by_pod("near", &["server", "client"], &PORTS, most).await;
                });
                for _ in 0..20 {
                    let doing = world.clone();
                    deeds.spawn_local(async move {
                        doing.exchange("near", to, &ECHO, 1200).await;
                    });
                }
                sleep(Duration::from_millis(400)).await;
                // Meanwhile the others live on: what a sidecar withdrew and offers again is there again.
                match number {
                    4 => world.stop_sidecar("server").await,
                    6 => world.start_sidecar("server").await,
                    _ => {}
                }
            }
            while deeds.join_next().await.is_some() {}
            sleep(SETTLED).await;
            probes.shutdown().await;
        });
        assert!(report.tally.probes > 0, "{:?}", report.tally);
    }
}

#[test]
fn one_process_that_takes_every_seat_leaves_a_sidecar_its_own() {
    for seed in seeds(2) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let doing = world.clone();
            let mut crowd = JoinSet::new();
            crowd.spawn_local(async move {
                doing.crowd_by_pod("near", 6000, 2 * SETTLED).await;
            });
            sleep(Duration::from_secs(2)).await;
            world.stop_sidecar("server").await;
            world.start_sidecar("server").await;
            for (pod, port) in USES.into_iter().filter(|(pod, _)| *pod == "client") {
                world.until_works(pod, &port, SETTLED).await;
            }
            crowd.join_next().await.unwrap().unwrap();
        });
    }
}

#[test]
fn a_peer_that_is_not_polite_hurts_nobody_else() {
    for seed in seeds(8) {
        let stage = Stage { hostile: vec![MALLORY], ..two_clusters() };
        let report = simulate(seed, &stage, |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut probes = JoinSet::new();
            for (pod, port) in USES {
                probes.spawn_local(world.clone().probe(pod, port, Duration::from_millis(200)));
            }
            let mut deeds = JoinSet::new();
            for _ in 0..40 {
                let doing = world.clone();
                let (to, most) = ("a-1", random.within(1..3000));
                deeds.spawn_local(async move { doing.harm_by_peer("m-1", to, &PORTS, most).await });
                sleep(random.millis(0..800)).await;
            }
            while deeds.join_next().await.is_some() {}
            sleep(SETTLED).await;
            probes.shutdown().await;
        });
        assert!(report.tally.probes > 0, "{:?}", report.tally);
    }
}

#[test]
fn a_peer_that_offers_what_is_anothers_gets_none_of_it() {
    for seed in seeds(4) {
        let stage = Stage { hostile: vec![MALLORY], ..two_clusters() };
        let report = simulate(seed, &stage, |world| async move {
            world.set_up().await;
            sleep(SETTLED).await;
            let mut probes = JoinSet::new();
            for port in [METRICS, SYSLOG] {
                probes.spawn_local(world.clone().probe("near", port, Duration::from_millis(100)));
            }
            for port in [METRICS, SYSLOG] {
                world.steal_by_peer("m-1", "a-1", port, SETTLED).await;
            }
            sleep(SETTLED).await;
            probes.shutdown().await;
        });
        assert!(report.tally.probes > 0, "{:?}", report.tally);
    }
}

/// What waits for a path that is too slow for it counts against who sent it.
#[test]
fn a_pod_that_floods_a_slow_path_leaves_its_neighbour_the_others() {
    const SLOW: Port = Port::udp("slow", CLUSTER_A, 9100);
    for seed in seeds(6) {
        let mut stage = three_endpoints();
        let address = [10, 2, 0, 9].into();
        stage.pods.push(PodSpec { name: "mallory", namespace: "default", node: "b-1", address });
        let report = simulate(seed, &stage, |world| async move {
            for (pod, port) in [("server", ECHO), ("far", SLOW)] {
                world.annotate(pod, &[port], &[]);
                world.serve(pod, port, false).await;
            }
            world.annotate("client", &[], &[ECHO]);
            world.start_all_but(&["mallory"]).await;
            world.fault(Fault::Latency("a-2", "b-1", Duration::from_millis(800)));
            world.until_works("client", &ECHO, SETTLED).await;
            sleep(SETTLED).await;
            let mut probes = JoinSet::new();
            probes.spawn_local(world.clone().probe("client", ECHO, Duration::from_millis(50)));
            world.flood_by_pod("mallory", SLOW, SETTLED).await;
            probes.shutdown().await;
        });
        assert!(report.tally.probes > 0 && report.tally.datagrams_received > 100, "{:?}", report.tally);
    }
}
