//! A Service with several endpoints works as long as one of them does.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what these files hold is tests")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sim::datagram::Client;
use sim::flow::Outcome;
use sim::oracle::SETTLED;
use sim::random::{Random, seeds};
use sim::simulation::{Fault, simulate};
use sim::stage::{ECHO, WEB, three_endpoints};
use sim::world::World;
use tokio::task::JoinSet;
use tokio::time::sleep;

const ENDPOINTS: [&str; 3] = ["server", "twin", "far"];
const READY: Duration = Duration::from_secs(6);

/// What may be gone while another endpoint is left.
#[derive(Debug, Clone, Copy)]
enum Outage {
    /// Nobody listens at the port of a pod.
    Application(&'static str),
    /// A sidecar is killed, or ended.
    Sidecar(&'static str, bool),
    /// A router is killed, or ended, with all endpoints of its node.
    Router(&'static str, bool),
    /// The path from the consumer to a node.
    Path(&'static str),
}

impl Outage {
    fn draw(random: &mut Random) -> Self {
        let node = *random.pick(&["a-1", "a-2"]);
        let pod = *random.pick(&ENDPOINTS);
        match random.within(0..4) {
            0 => Self::Application(pod),
            1 => Self::Sidecar(pod, random.chance(50)),
            2 => Self::Router(node, random.chance(50)),
            _ => Self::Path(node),
        }
    }

    async fn begin(self, world: &World) {
        match self {
            Self::Application(pod) => world.unserve(pod, WEB).await,
            Self::Sidecar(pod, true) => world.kill_sidecar(pod).await,
            Self::Sidecar(pod, false) => world.stop_sidecar(pod).await,
            Self::Router(node, true) => world.kill_router(node).await,
            Self::Router(node, false) => world.stop_router(node).await,
            Self::Path(node) => world.fault(Fault::Cut(node, "b-1")),
        }
    }

    async fn end(self, world: &World) {
        match self {
            Self::Application(pod) => world.serve(pod, WEB, false).await,
            Self::Sidecar(pod, _) => world.start_sidecar(pod).await,
            Self::Router(node, _) => world.start_router(node).await,
            Self::Path(node) => world.fault(Fault::Heal(node, "b-1")),
        }
    }
}

async fn set_up(world: &World) {
    for pod in ENDPOINTS {
        world.annotate(pod, &[WEB], &[]);
        world.serve(pod, WEB, false).await;
    }
    for pod in ["near", "client"] {
        world.annotate(pod, &[], &[WEB]);
    }
    world.start().await;
    for pod in ["near", "client"] {
        world.until_works(pod, &WEB, READY).await;
    }
    // Each endpoint is known by now, not only the first.
    sleep(SETTLED).await;
}

/// Opens flows one after the other. Each that begins during the outage must find an endpoint that is left.
async fn flows(world: &Arc<World>, random: &mut Random, pod: &'static str) {
    let to = world.locate(pod, &WEB).await;
    let mut flows = JoinSet::new();
    for _ in 0..5 {
        let plan = world.plan(&WEB, random.within(1..60_000), random.within(1..60_000));
        let world = world.clone();
        flows.spawn_local(async move { (plan, world.flow(pod, to, plan).await) });
        sleep(random.millis(0..800)).await;
    }
    while let Some(ended) = flows.join_next().await {
        let (plan, outcome) = ended.unwrap();
        assert_eq!(outcome, Outcome::Complete, "{pod}: {plan:?}");
    }
}

#[test]
fn a_new_flow_goes_to_an_endpoint_that_is_left() {
    for seed in seeds(20) {
        simulate(seed, &three_endpoints(), |world| async move {
            set_up(&world).await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            for _ in 0..4 {
                let outage = Outage::draw(&mut random);
                outage.begin(&world).await;
                flows(&world, &mut random, "client").await;
                // Whose own router is gone waits for it.
                if !matches!(outage, Outage::Router("a-1", _)) {
                    flows(&world, &mut random, "near").await;
                }
                outage.end(&world).await;
                flows(&world, &mut random, "client").await;
                sleep(SETTLED).await;
            }
        });
    }
}

#[test]
fn the_last_endpoint_is_enough_and_without_it_a_flow_fails_fast() {
    for seed in seeds(20) {
        simulate(seed, &three_endpoints(), |world| async move {
            set_up(&world).await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let left = *random.pick(&ENDPOINTS);
            for pod in ENDPOINTS.into_iter().filter(|pod| *pod != left) {
                world.unserve(pod, WEB).await;
                flows(&world, &mut random, "client").await;
                flows(&world, &mut random, "near").await;
            }
            world.unserve(left, WEB).await;
            for pod in ["client", "near"] {
                let to = world.locate(pod, &WEB).await;
                let began = sim::oracle::now();
                assert_eq!(world.flow(pod, to, world.plan(&WEB, 10, 10)).await, Outcome::Reset(0));
                let took = sim::oracle::now() - began;
                assert!(took < Duration::from_secs(2), "{took:?}");
            }
            // One that failed again and again is tried again all the same.
            world.serve(left, WEB, false).await;
            for pod in ["client", "near"] {
                world.until_works(pod, &WEB, SETTLED).await;
            }
        });
    }
}

#[test]
fn datagrams_go_where_sockets_are_left_when_a_sidecar_does_not_come_back() {
    for seed in seeds(20) {
        simulate(seed, &three_endpoints(), |world| async move {
            for pod in ["server", "far"] {
                world.annotate(pod, &[ECHO], &[]);
                world.serve(pod, ECHO, false).await;
            }
            world.annotate("client", &[], &[ECHO]);
            world.start().await;
            world.until_works("client", &ECHO, READY).await;
            sleep(SETTLED).await;
            let to = world.locate("client", &ECHO).await;
            world.kill_sidecar("far").await;
            // Its exports are kept for 30 s, and it has two sockets in stock for datagrams.
            let (mut lost, end) = (0, sim::oracle::now() + Duration::from_secs(28));
            while sim::oracle::now() < end {
                lost += u32::from(!world.exchange("client", to, &ECHO, 100).await);
                sleep(Duration::from_millis(300)).await;
            }
            assert!(lost <= 1, "{lost} datagrams are lost");
        });
    }
}

/// Exchanges datagrams of one client until `end`; says how long none was answered at the most.
async fn longest_silence(
    world: &World,
    client: &mut Client,
    pod: &'static str,
    to: SocketAddr,
    end: Duration,
) -> Duration {
    let (mut answered, mut longest) = (sim::oracle::now(), Duration::ZERO);
    while sim::oracle::now() < end {
        let works = world.exchange_by(client, pod, to, &ECHO, 100).await;
        longest = longest.max(sim::oracle::now() - answered);
        if works {
            answered = sim::oracle::now();
        }
        sleep(Duration::from_millis(100)).await;
    }
    longest
}

#[test]
fn a_client_that_keeps_sending_follows_the_endpoints_that_are_left() {
    for seed in seeds(20) {
        simulate(seed, &three_endpoints(), |world| async move {
            for pod in ENDPOINTS {
                world.annotate(pod, &[ECHO], &[]);
                world.serve(pod, ECHO, false).await;
            }
            let pods = ["near", "client"];
            for pod in pods {
                world.annotate(pod, &[], &[ECHO]);
            }
            world.start().await;
            for pod in pods {
                world.until_works(pod, &ECHO, READY).await;
            }
            sleep(SETTLED).await;
            let mut random = Random::new(world.random.lock().unwrap().draw());
            let mut clients = Vec::new();
            for pod in pods {
                clients.push((pod, world.locate(pod, &ECHO).await, world.datagram_client(pod).unwrap()));
            }
            for (pod, to, client) in &mut clients {
                assert!(world.exchange_by(client, pod, *to, &ECHO, 100).await);
            }
            // One endpoint is left each time, so that each client has to go there, from wherever it is.
            for _ in 0..4 {
                let left = *random.pick(&ENDPOINTS);
                let gone = ENDPOINTS.into_iter().filter(|pod| *pod != left);
                let ways: Vec<_> = gone.map(|pod| (pod, random.within(0..3))).collect();
                for (pod, way) in &ways {
                    match way {
                        0 => {}
                        1 => world.kill_sidecar(pod).await,
                        _ => world.stop_sidecar(pod).await,
                    }
                    world.unserve(pod, ECHO).await;
                }
                for (pod, to, client) in &mut clients {
                    let end = sim::oracle::now() + SETTLED;
                    // Each endpoint that is gone may cost an answer, for which the client waits 1 s.
                    let longest = longest_silence(&world, client, pod, *to, end).await;
                    assert!(
                        longest < Duration::from_secs(4),
                        "{pod} had no answer for {longest:?}: {left} is left, {ways:?}"
                    );
                }
                for (pod, way) in &ways {
                    world.serve(pod, ECHO, false).await;
                    if *way > 0 {
                        world.start_sidecar(pod).await;
                    }
                }
                sleep(SETTLED).await;
            }
        });
    }
}
