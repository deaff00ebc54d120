//! A router dies and comes back, while the sidecars live on.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::sync::Arc;
use std::time::Duration;

use sim::client::USES;
use sim::flow::{Outcome, Plan, Shape};
use sim::oracle::SETTLED;
use sim::random::{Random, seeds};
use sim::simulation::{Fault, simulate};
use sim::stage::{METRICS, WEB, two_clusters};
use sim::world::World;
use tokio::task::JoinSet;
use tokio::time::sleep;

type Flows = JoinSet<(&'static str, Plan, Outcome)>;

async fn begin(world: &Arc<World>, flows: &mut Flows, pod: &'static str, plan: Plan, port: sim::stage::Port) {
    let to = world.locate(pod, &port).await;
    let world = world.clone();
    flows.spawn_local(async move { (pod, plan, world.flow(pod, to, plan).await) });
}

/// Kills or stops a router, lets flows begin while it is away, and starts it again.
fn restart(node: &'static str, kill: bool) {
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), move |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let slow = |port| world.plan(&port, 600_000, 600_000).paced(Duration::from_millis(150));
            let (mut before, mut meanwhile) = (Flows::new(), Flows::new());
            for (pod, port) in [("client", WEB), ("near", METRICS), ("near", WEB)] {
                begin(&world, &mut before, pod, slow(port), port).await;
            }
            sleep(random.millis(500..2500)).await;
            let away = async {
                if kill {
                    world.kill_router(node).await;
                } else {
                    world.stop_router(node).await;
                }
            };
            let begin_meanwhile = async {
                // The others have heard its goodbye, and it is about to end for more than a second.
                sleep(Duration::from_millis(200)).await;
                for _ in 0..4 {
                    for (pod, port) in [("client", WEB), ("near", METRICS), ("near", WEB)] {
                        // Longer than an end may take: a router that ends must not begin to carry it.
                        let plan = world.plan(&port, 100_000, 100_000).paced(Duration::from_millis(300));
                        begin(&world, &mut meanwhile, pod, plan, port).await;
                    }
                    sleep(random.millis(0..300)).await;
                }
            };
            tokio::join!(biased; away, begin_meanwhile);
            world.start_router(node).await;

            // Nobody is refused. Whose own router was away waits for it, and is served then.
            while let Some(ended) = meanwhile.join_next().await {
                let (pod, plan, outcome) = ended.unwrap();
                let own = if pod == "client" { "b-1" } else { "a-1" };
                match outcome {
                    Outcome::Complete => {}
                    Outcome::Reset(0)
                        if own != node || plan.service != world.oracle.service(&WEB.to_string()) => {}
                    other => panic!("{pod}: {plan:?}: {other:?}"),
                }
            }
            // Flows of before went through the router that died; those that did not live on.
            while let Some(ended) = before.join_next().await {
                let (pod, plan, outcome) = ended.unwrap();
                let through = node == "a-1"
                    || pod == "client"
                    || plan.service == world.oracle.service(&METRICS.to_string());
                match outcome {
                    Outcome::Reset(_) if through => {}
                    Outcome::Complete if !through => {}
                    other => panic!("{pod}: {plan:?}: {other:?}"),
                }
            }
            sleep(SETTLED).await;
            for (pod, port) in USES {
                assert!(world.works(pod, &port).await, "{port} does not work for {pod}");
            }
        });
    }
}

#[test]
fn the_consumers_router_is_killed() {
    restart("b-1", true);
}

#[test]
fn the_consumers_router_is_stopped() {
    restart("b-1", false);
}

#[test]
fn the_exporters_router_is_killed() {
    restart("a-1", true);
}

#[test]
fn the_exporters_router_is_stopped() {
    restart("a-1", false);
}

/// Its connections say nothing, then or later: what is left of them at the other router is known to be dead by the new
/// run's number, long before they time out.
#[test]
fn the_exporters_node_loses_its_power() {
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut before = Flows::new();
            for shape in [Shape::Both, Shape::Answer, Shape::ServiceFirst] {
                let plan = world.plan(&WEB, 600_000, 600_000).shaped(shape).paced(Duration::from_millis(150));
                begin(&world, &mut before, "client", plan, WEB).await;
            }
            sleep(random.millis(500..2500)).await;
            world.fault(Fault::Forget("a-1", "b-1"));
            sleep(Duration::from_millis(20)).await;
            world.kill_router("a-1").await;
            sleep(random.millis(100..10_000)).await;
            world.start_router("a-1").await;
            sleep(SETTLED).await;
            let mut reset = 0;
            while let Some(ended) = before.try_join_next() {
                let (_, plan, outcome) = ended.unwrap();
                assert!(matches!(outcome, Outcome::Reset(_)), "{plan:?}: {outcome:?}");
                reset += 1;
            }
            assert_eq!(reset, 3, "flows of a router that restarted are not reset");
            for (pod, port) in USES {
                assert!(world.works(pod, &port).await, "{port} does not work for {pod}");
            }
        });
    }
}
