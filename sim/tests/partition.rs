//! The path between two nodes is cut in mid-transfer, and comes back.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::time::Duration;

use sim::client::USES;
use sim::flow::{Outcome, Shape};
use sim::oracle::SETTLED;
use sim::random::{Random, seeds};
use sim::simulation::{Fault, simulate};
use sim::stage::{METRICS, WEB, two_clusters};
use tokio::task::JoinSet;
use tokio::time::sleep;

const CUT: Fault = Fault::Cut("a-1", "b-1");
const HEAL: Fault = Fault::Heal("a-1", "b-1");

/// Flows across that are under way when the path is cut, some in each direction. They take 4 s at least.
async fn under_way(
    world: &std::sync::Arc<sim::world::World>,
    random: &mut Random,
) -> JoinSet<(sim::flow::Plan, Outcome)> {
    let mut flows = JoinSet::new();
    for (pod, port) in [("client", WEB), ("near", METRICS), ("client", WEB)] {
        let to = world.locate(pod, &port).await;
        let shape = *random.pick(&[Shape::Both, Shape::Answer, Shape::ServiceFirst]);
        let plan = world
            .plan(&port, random.within(200_000..500_000), random.within(400_000..700_000))
            .shaped(shape)
            .paced(Duration::from_millis(200));
        let world = world.clone();
        flows.spawn_local(async move { (plan, world.flow(pod, to, plan).await) });
    }
    sleep(random.millis(300..3000)).await;
    assert!(!flows.is_empty() && flows.try_join_next().is_none());
    flows
}

#[test]
fn a_cut_that_heals_in_time_costs_no_flow_a_byte() {
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut flows = under_way(&world, &mut random).await;
            world.fault(CUT);
            sleep(random.millis(100..50_000)).await;
            world.fault(HEAL);
            sleep(SETTLED).await;
            for (pod, port) in USES {
                assert!(world.works(pod, &port).await, "{port} does not work for {pod}");
            }
            while let Some(ended) = flows.join_next().await {
                let (plan, outcome) = ended.unwrap();
                assert_eq!(outcome, Outcome::Complete, "{plan:?}");
            }
        });
    }
}

#[test]
fn a_long_cut_resets_flows_and_new_ones_work_after_it() {
    for seed in seeds(20) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut flows = under_way(&world, &mut random).await;
            world.fault(CUT);
            sleep(Duration::from_secs(10)).await;
            // Meanwhile new flows fail fast, and those of the node work.
            let to = world.locate("client", &WEB).await;
            let began = sim::oracle::now();
            let outcome = world.flow("client", to, world.plan(&WEB, 10, 10)).await;
            assert_eq!(outcome, Outcome::Reset(0));
            let took = sim::oracle::now() - began;
            assert!(took < Duration::from_secs(5), "{took:?}");
            assert!(world.works("near", &WEB).await);
            sleep(random.millis(56_000..66_000)).await;
            let mut cut = 0;
            while let Some(ended) = flows.try_join_next() {
                let (plan, outcome) = ended.unwrap();
                assert!(matches!(outcome, Outcome::Reset(_)), "{plan:?}: {outcome:?}");
                cut += 1;
            }
            assert_eq!(cut, 3, "flows without a path are not reset");
            world.fault(HEAL);
            sleep(SETTLED).await;
            for (pod, port) in USES {
                assert!(world.works(pod, &port).await, "{port} does not work for {pod}");
            }
        });
    }
}

#[test]
fn a_path_that_forgets_its_connections_does_not_stop_new_flows() {
    for seed in seeds(20) {
        let report = simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut probes = JoinSet::new();
            for (pod, port) in USES {
                probes.spawn_local(world.clone().probe(pod, port, Duration::from_millis(300)));
            }
            let mut flows = under_way(&world, &mut random).await;
            world.fault(Fault::Forget("a-1", "b-1"));
            while let Some(ended) = flows.join_next().await {
                let (plan, outcome) = ended.unwrap();
                assert!(matches!(outcome, Outcome::Reset(_) | Outcome::Complete), "{plan:?}: {outcome:?}");
            }
            sleep(SETTLED).await;
            probes.shutdown().await;
        });
        assert!(report.tally.probes > 0, "{:?}", report.tally);
    }
}

#[test]
fn a_path_that_forgets_a_new_connection_does_not_hold_up_the_link() {
    for seed in seeds(4) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            // A step longer each time: some fall between the SYN and the last word of the handshake, and some between
            // that and the first word of the link.
            for step in 1..40 {
                world.kill_router("b-1").await;
                world.start_router("b-1").await;
                sleep(Duration::from_millis(5) * step).await;
                world.fault(Fault::Forget("a-1", "b-1"));
                world.until_works("client", &WEB, SETTLED).await;
            }
        });
    }
}

/// Of a flow that is under way one direction mostly is idle, and its kernel probes the path (SO_KEEPALIVE).
#[test]
fn a_flow_whose_client_only_listens_outlives_a_cut_of_almost_a_minute() {
    for seed in seeds(4) {
        simulate(seed, &two_clusters(), |world| async move {
            world.set_up().await;
            // The kernel's retransmission that finds the path again comes soon behind the shorter one, and long behind the other.
            for (shape, cut) in
                [Shape::Answer, Shape::ServiceFirst].into_iter().flat_map(|shape| [(shape, 50), (shape, 56)])
            {
                let to = world.locate("client", &WEB).await;
                let plan = world.plan(&WEB, 100, 300_000).shaped(shape).paced(Duration::from_millis(200));
                let flow = tokio::task::spawn_local({
                    let world = world.clone();
                    async move { world.flow("client", to, plan).await }
                });
                sleep(Duration::from_secs(1)).await;
                world.fault(CUT);
                sleep(Duration::from_secs(cut)).await;
                world.fault(HEAL);
                assert_eq!(flow.await.unwrap(), Outcome::Complete, "{shape:?} and {cut} s");
            }
        });
    }
}
