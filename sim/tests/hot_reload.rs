//! Annotations change while flows run.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use sim::flow::Outcome;
use sim::oracle::now;
use sim::random::{Random, seeds};
use sim::simulation::simulate;
use sim::stage::{CLUSTER_A, DATABASE, ECHO, Port, WEB, two_clusters};
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

            let always = [WEB, DATABASE, ECHO];
            let mut addresses: BTreeMap<String, IpAddr> = BTreeMap::new();
            for port in always {
                addresses.insert(port.long_name(), world.locate("client", &port).await.ip());
            }
            let mut present: Vec<Port> = Vec::new();
            for _ in 0..5 {
                let next: Vec<Port> = EXTRA.into_iter().filter(|_| random.chance(50)).collect();
                let with = |extra: &[Port]| -> Vec<Port> { always.iter().chain(extra).copied().collect() };
                let exporter_first = random.chance(50);
                let client = |world: &sim::world::World| {
                    world.annotate("client", &[sim::stage::METRICS, sim::stage::SYSLOG], &with(&next));
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
                present = next;
            }
            let mut complete = 0;
            while let Some(ended) = flows.join_next().await {
                let (pod, outcome) = ended.unwrap();
                assert_eq!(outcome, Outcome::Complete, "of {pod}");
                complete += 1;
            }
            assert_eq!(complete, 3);
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
            assert!(world.works("client", &WEB).await && world.works("near", &sim::stage::METRICS).await);
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
