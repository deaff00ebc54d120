//! A sidecar dies and comes back, while the router lives on.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use sim::client::USES;
use sim::flow::{self, Outcome};
use sim::oracle::SETTLED;
use sim::random::{Random, seeds};
use sim::simulation::simulate;
use sim::stage::{CLUSTER_A, DATABASE, ECHO, METRICS, Port, SYSLOG, Stage, WEB, two_clusters};
use tokio::task::{JoinSet, yield_now};
use tokio::time::sleep;

/// How long a sidecar may take to be there again.
const BACK: Duration = Duration::from_secs(2);

const OTHERS: [Port; 3] =
    [Port::tcp("aa", CLUSTER_A, 80), Port::tcp("mm", CLUSTER_A, 80), Port::tcp("zz", CLUSTER_A, 80)];

#[test]
fn flows_live_on_and_addresses_stay() {
    for seed in seeds(20) {
        simulate(seed, &Stage { state: true, ..two_clusters() }, |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            // Addresses by a history that a start from nothing would not repeat.
            let exports = [METRICS, SYSLOG];
            let imports = |others: &[Port]| [&[WEB, DATABASE, ECHO], others].concat();
            for _ in 0..3 {
                let others: Vec<Port> = OTHERS.into_iter().filter(|_| random.chance(50)).collect();
                world.annotate("client", &exports, &imports(&others));
                sleep(Duration::from_millis(300)).await;
            }
            world.annotate("client", &exports, &imports(&OTHERS));
            sleep(Duration::from_millis(300)).await;
            let mut addresses = BTreeMap::new();
            for port in imports(&OTHERS) {
                addresses.insert(port, world.locate("client", &port).await);
            }

            let mut flows = JoinSet::new();
            for (pod, port) in [("client", WEB), ("near", METRICS), ("near", WEB)] {
                let to = world.locate(pod, &port).await;
                let plan = world.plan(&port, 500_000, 500_000).paced(Duration::from_millis(200));
                let world = world.clone();
                flows.spawn_local(async move { (plan, world.flow(pod, to, plan).await) });
            }
            sleep(random.millis(500..1500)).await;
            for pod in ["client", "server"] {
                match random.chance(70) {
                    true => world.kill_sidecar(pod).await,
                    false => world.stop_sidecar(pod).await,
                }
                sleep(random.millis(10..1500)).await;
                world.start_sidecar(pod).await;
                sleep(BACK).await;
                for port in imports(&OTHERS) {
                    assert_eq!(world.locate("client", &port).await, addresses[&port], "{port} has moved");
                }
                for (pod, port) in USES {
                    world.until_works(pod, &port, SETTLED).await;
                }
            }
            while let Some(ended) = flows.join_next().await {
                let (plan, outcome) = ended.unwrap();
                assert_eq!(outcome, Outcome::Complete, "{plan:?}");
            }
        });
    }
}

#[test]
fn of_a_killed_sidecar_no_flow_is_lost_and_no_consumer_is_refused() {
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut flows = JoinSet::new();
            let begin = |pod: &'static str, port: Port, to, bytes, pace| {
                let plan = world.plan(&port, bytes, bytes).paced(pace);
                let world = world.clone();
                async move { (port, plan, world.flow(pod, to, plan).await) }
            };
            let uses = [("client", WEB), ("near", METRICS), ("near", WEB)];
            let mut located = Vec::new();
            for (pod, port) in uses {
                let to = world.locate(pod, &port).await;
                located.push((pod, port, to));
                flows.spawn_local(begin(pod, port, to, 500_000, Duration::from_millis(200)));
            }
            let killed = *random.pick(&["client", "server", "near"]);
            world.kill_sidecar(killed).await;
            for _ in 0..5 {
                sleep(random.millis(0..400)).await;
                for (pod, port, to) in &located {
                    flows.spawn_local(begin(pod, *port, *to, 1000, Duration::ZERO));
                }
            }
            world.start_sidecar(killed).await;
            for _ in 0..10 {
                sleep(random.millis(0..400)).await;
                for (pod, port, to) in &located {
                    flows.spawn_local(begin(pod, *port, *to, 1000, Duration::ZERO));
                }
            }
            while let Some(ended) = flows.join_next().await {
                let (port, plan, outcome) = ended.unwrap();
                let exporter = if port == METRICS { "client" } else { "server" };
                // Without its sidecar a pod has only the sockets in stock for new flows to it.
                let may_fail = exporter == killed && plan.pace.is_zero();
                assert!(
                    outcome == Outcome::Complete || (may_fail && outcome == Outcome::Reset(0)),
                    "{killed} killed, {port}: {plan:?}: {outcome:?}"
                );
            }
        });
    }
}

#[test]
fn a_sidecar_that_lost_its_leases_sends_no_flow_to_the_service_of_before() {
    const TWO: [Port; 2] = [
        Port { target: 7001, ..Port::tcp("aa", CLUSTER_A, 80) },
        Port { target: 7002, ..Port::tcp("zz", CLUSTER_A, 80) },
    ];
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            for port in TWO {
                world.serve("server", port, random.chance(50)).await;
            }
            let all = [&[WEB, DATABASE, ECHO], &TWO[..]].concat();
            world.annotate("server", &all, &[]);
            // One after the other, so that the addresses are not those of a start with all of them.
            for imports in [&[WEB, DATABASE, ECHO, TWO[1]][..], &all] {
                world.annotate("client", &[METRICS, SYSLOG], imports);
                world.until_works("client", &TWO[1], SETTLED).await;
            }
            world.until_works("client", &TWO[0], SETTLED).await;
            let before = world.locate("client", &TWO[0]).await;
            world.kill_sidecar("client").await;
            sleep(random.millis(10..1500)).await;
            world.start_sidecar("client").await;
            world.until_works("client", &TWO[1], SETTLED).await;
            assert_eq!(world.locate("client", &TWO[1]).await, before, "no address has another Service now");
            for _ in 0..20 {
                for port in TWO {
                    // The oracle looks at where they come.
                    world.until_works("client", &port, SETTLED).await;
                }
            }
        });
    }
}

/// The sockets of a killed sidecar stay beside those of the next one for a while, and the kernel shares new connections out
/// among them. One of them closes in the end: connections that come in that very turn are in its backlog.
#[test]
fn what_comes_in_the_turn_in_which_an_earlier_listener_closes_is_served() {
    const BESIDE: Duration = Duration::from_secs(2);
    const AROUND: Duration = Duration::from_millis(20);
    const TURNS: usize = 8;
    for seed in seeds(10) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let (pod, node) = *random.pick(&[("client", "b-1"), ("near", "a-1")]);
            let to = world.locate(pod, &WEB).await;
            let listeners = || world.open(node)["TCP listener"];
            let alone = listeners();
            world.kill_sidecar(pod).await;
            world.start_sidecar(pod).await;
            while listeners() <= alone {
                sleep(Duration::from_millis(5)).await;
            }
            sleep(BESIDE - AROUND).await;
            assert!(listeners() > alone, "the earlier sockets are there");
            let (net, oracle) = (world.net(pod).process(1000), world.oracle.clone());
            let plan = world.plan(&WEB, 10, 10);
            let outcomes = world.within(pod, async move {
                let mut flows = JoinSet::new();
                for _ in 0..2 * AROUND.as_millis() {
                    for _ in 0..TURNS {
                        let (net, oracle) = (net.clone(), oracle.clone());
                        let mut flow = Box::pin(async move { flow::run(&net, to, plan, &oracle).await });
                        // It connects in this turn already, and not behind the others.
                        let begun = poll_fn(|cx| Poll::Ready(flow.as_mut().poll(cx))).await;
                        assert!(begun.is_pending());
                        flows.spawn(flow);
                        yield_now().await;
                    }
                    sleep(Duration::from_millis(1)).await;
                }
                flows.join_all().await
            });
            let outcomes = outcomes.await;
            assert_eq!(listeners(), alone, "they are closed");
            let lost = outcomes.iter().filter(|outcome| **outcome != Outcome::Complete).count();
            assert_eq!(lost, 0, "of {} flows", outcomes.len());
        });
    }
}
