//! Annotations change while flows run.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use servicekeel_core::sidecar::REST;
use sim::flow::Outcome;
use sim::oracle::now;
use sim::random::{Random, seeds};
use sim::simulation::simulate;
use sim::stage::{CLUSTER_A, DATABASE, ECHO, METRICS, Port, SYSLOG, Stage, WEB, two_clusters};
use sim::world::World;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// How soon a change of the annotations must have taken effect, for consumer and exporter together.
const SOON: Duration = Duration::from_secs(2);

const EXTRA: [Port; 6] = [
    Port::tcp("extra-0", CLUSTER_A, 7000),
    Port::tcp("extra-1", CLUSTER_A, 7001),
    Port::udp("extra-2", CLUSTER_A, 7002),
    // The same port as WEB's, of another Service; and another port of WEB's own Service.
    Port { target: 7003, ..Port::tcp("extra-3", CLUSTER_A, 8080) },
    Port { target: 7004, ..Port::tcp("web", CLUSTER_A, 8443) },
    Port { target: 7005, ..Port::udp("web", CLUSTER_A, 8080) },
];

/// New flows to what no change concerns.
async fn begin_on_and_on(world: Arc<World>, pod: &'static str, port: Port, to: SocketAddr) {
    loop {
        let outcome = world.flow(pod, to, world.plan(&port, 500, 500)).await;
        if outcome != Outcome::Complete {
            world.oracle.violate(format_args!("a flow of {pod} to {port} in a reload: {outcome:?}"));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn running_flows_are_unharmed_and_each_change_takes_effect() {
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut flows = JoinSet::new();
            let load = |pod: &'static str, port: Port, to: SocketAddr| {
                let plan = world.plan(&port, 900_000, 900_000).paced(Duration::from_millis(100));
                let world = world.clone();
                async move { (pod, world.flow(pod, to, plan).await) }
            };
            for (pod, port) in [("client", WEB), ("client", DATABASE), ("near", WEB)] {
                flows.spawn_local(load(pod, port, world.locate(pod, &port).await));
            }
            for port in EXTRA {
                world.serve("server", port, random.chance(50)).await;
            }

            let mut steady = JoinSet::new();
            for (pod, port) in [("client", WEB), ("client", DATABASE), ("near", WEB)] {
                let to = world.locate(pod, &port).await;
                steady.spawn_local(begin_on_and_on(world.clone(), pod, port, to));
            }

            let always = [WEB, DATABASE, ECHO];
            let mut addresses: BTreeMap<String, IpAddr> = BTreeMap::new();
            for port in always {
                addresses.insert(port.long_name(), world.locate("client", &port).await.ip());
            }
            let mut present: Vec<Port> = Vec::new();
            let mut begun = flows.len();
            for _ in 0..5 {
                let next: Vec<Port> = EXTRA.into_iter().filter(|_| random.chance(50)).collect();
                let with = |extra: &[Port]| -> Vec<Port> { always.iter().chain(extra).copied().collect() };
                let exporter_first = random.chance(50);
                let client = |world: &World| {
                    world.annotate("client", &[METRICS, SYSLOG], &with(&next));
                };
                if exporter_first {
                    world.annotate("server", &with(&next), &[]);
                    sleep(random.millis(0..300)).await;
                    client(&world);
                } else {
                    client(&world);
                    sleep(random.millis(0..300)).await;
                    world.annotate("server", &with(&next), &[]);
                }
                let changed = now();
                for port in &next {
                    world.until_works("client", port, SOON).await;
                }
                // What went away has no name and no socket.
                let gone: Vec<&Port> = present.iter().filter(|port| !next.contains(port)).collect();
                sleep((changed + SOON).saturating_sub(now())).await;
                for port in gone {
                    let name_lives = with(&next).iter().any(|other| other.long_name() == port.long_name());
                    assert_eq!(world.resolve("client", port).await.is_some(), name_lives, "{port}");
                    if let Some(address) = addresses.get(&port.long_name())
                        && !port.udp
                    {
                        let to = SocketAddr::new(*address, port.port);
                        let outcome = world.flow("client", to, world.plan(port, 1, 1)).await;
                        assert!(
                            matches!(outcome, Outcome::NotConnected(_)),
                            "{port} is still there: {outcome:?}"
                        );
                    }
                }
                // Leases are stable, also those that were away for a while.
                for port in with(&next) {
                    let address = world.locate("client", &port).await.ip();
                    let before = addresses.insert(port.long_name(), address);
                    assert!(
                        before.is_none_or(|before| before == address),
                        "{port} moved from {before:?} to {address}"
                    );
                }
                // A flow of what may be gone with the next change outlives it.
                if let Some(port) = next.iter().find(|port| !port.udp) {
                    flows.spawn_local(load("client", *port, world.locate("client", port).await));
                    begun += 1;
                    sleep(Duration::from_secs(1)).await;
                }
                present = next;
            }
            steady.shutdown().await;
            let mut complete = 0;
            while let Some(ended) = flows.join_next().await {
                let (pod, outcome) = ended.unwrap();
                assert_eq!(outcome, Outcome::Complete, "of {pod}");
                complete += 1;
            }
            assert_eq!(complete, begun);
        });
    }
}

#[test]
fn a_bad_annotation_leaves_the_last_good_one_in_service() {
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let address = world.locate("client", &WEB).await;
            world.annotate_raw("client", "services: [", "services:\n  - name: [broken\n");
            sleep(SOON).await;
            assert_eq!(world.locate("client", &WEB).await, address);
            assert!(world.works("client", &WEB).await && world.works("near", &METRICS).await);
            // One bad entry does not hold up the good one.
            world.annotate_raw(
                "client",
                "services: []",
                "services:\n  - name: Not_A_Label\n    ports: [{ port: 1 }]\n  - name: db\n    cluster: cluster-a.local\n    ports: [{ port: 5432 }]\n",
            );
            world.until_works("client", &DATABASE, SOON).await;
            assert!(world.resolve("client", &WEB).await.is_none());
        });
    }
}

#[test]
fn what_is_no_longer_exported_is_reset_though_it_still_listens() {
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            world.annotate("server", &[WEB, ECHO], &[]);
            sleep(SOON).await;
            for pod in ["client", "near"] {
                let to = world.locate(pod, &DATABASE).await;
                let outcome = world.flow(pod, to, world.plan(&DATABASE, 10, 10)).await;
                assert_eq!(outcome, Outcome::Reset(0), "of {pod}");
                assert!(world.works(pod, &WEB).await);
            }
            world.annotate("server", &[WEB, DATABASE, ECHO], &[]);
            for pod in ["client", "near"] {
                world.until_works(pod, &DATABASE, SOON).await;
            }
        });
    }
}

/// More Services than a narrow range has addresses.
const MANY: [Port; 9] = [
    Port::tcp("many-0", CLUSTER_A, 80),
    Port::tcp("many-1", CLUSTER_A, 80),
    Port::tcp("many-2", CLUSTER_A, 80),
    Port::tcp("many-3", CLUSTER_A, 80),
    Port::tcp("many-4", CLUSTER_A, 80),
    Port::tcp("many-5", CLUSTER_A, 80),
    Port::tcp("many-6", CLUSTER_A, 80),
    Port::tcp("many-7", CLUSTER_A, 80),
    Port::tcp("many-8", CLUSTER_A, 80),
];

#[test]
fn where_addresses_are_short_a_freed_one_rests_before_another_service_has_it() {
    for seed in seeds(20) {
        simulate(seed, &Stage { narrow: true, ..two_clusters() }, |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut short = 0;
            for _ in 0..30 {
                let wanted: Vec<Port> = MANY.into_iter().filter(|_| random.chance(50)).collect();
                world.annotate("client", &[], &wanted);
                sleep(random.millis(100..2500)).await;
                for port in &wanted {
                    // The oracle looks at whose the address was.
                    short += u32::from(world.resolve("client", port).await.is_none());
                }
            }
            assert!(short > 0, "addresses were never short");
            // Rested, they are given to those that wait for one.
            let wanted = &MANY[3..];
            world.annotate("client", &[], wanted);
            sleep(REST + SOON).await;
            for port in wanted {
                assert!(world.resolve("client", port).await.is_some(), "{port} has no address");
            }
        });
    }
}
