//! Between nodes: what [`Network`] does to connections.

#![allow(
    clippy::type_complexity,
    clippy::let_and_return,
    reason = "a story of faults reads best where it stands"
)]

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use servicekeel_runtime::net::Stream;
use servicekeel_runtime::net::tcp::BETWEEN_ROUTERS;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep};

use super::wire::{CAPACITY, WINDOWS, Wires};
use super::*;
use crate::network::Network;

type Log = Arc<Mutex<Vec<(u64, String)>>>;

/// A server that sends back what it gets, a client, and a network that does something at given seconds. Returns what
/// the client said, with the second.
fn play<C, F>(faults: &[(u64, fn(&mut Network, &turmoil::Sim<'_>))], client: C) -> Vec<(u64, String)>
where
    C: FnOnce(SimNet, Log) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let mut sim = turmoil::Builder::new()
        .rng_seed(1)
        .simulation_duration(Duration::from_secs(2000))
        .tick_duration(Duration::from_millis(2))
        .tcp_capacity(CAPACITY)
        .min_message_latency(Duration::from_millis(5))
        .max_message_latency(Duration::from_millis(20))
        .build();
    let mut network = Network::new(BETWEEN_ROUTERS);
    let kernels = [Kernel::new(0), Kernel::new(0)];
    let nets =
        kernels.clone().map(|kernel| SimNet::node(&kernel, Wires::new(network.wires(), &kernel, WINDOWS[0])));
    let [server, client_net] = nets;
    sim.host("server", move || {
        let net = server.clone();
        async move {
            let listener = net.listen("0.0.0.0:7443".parse().unwrap()).await?;
            let mut echoes = tokio::task::JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await?;
                echoes.spawn(async move {
                    let mut buf = vec![0; 20_000];
                    while let Ok(n @ 1..) = stream.read(&mut buf).await {
                        if buf.starts_with(b"reset") {
                            return stream.reset();
                        }
                        if stream.write_all(&buf[..n]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
    });
    let log = Log::default();
    let said = log.clone();
    sim.client("client", async move {
        client(client_net, log).await;
        sleep(Duration::from_secs(1)).await;
        Ok(())
    });
    let mut faults: Vec<_> = faults.to_vec();
    loop {
        let finished = sim.step().unwrap();
        network.step(&sim);
        while faults.first().is_some_and(|(at, _)| Duration::from_secs(*at) <= sim.elapsed()) {
            (faults.remove(0).1)(&mut network, &sim);
        }
        if finished {
            break;
        }
    }
    drop(sim);
    for kernel in kernels {
        let left: Vec<_> = kernel.open().into_keys().filter(|kind| *kind != "listener for nodes").collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let said = said.lock().unwrap().clone();
    said
}

fn say(log: &Log, what: impl std::fmt::Display) {
    let at = turmoil::sim_elapsed().unwrap().as_secs();
    log.lock().unwrap().push((at, what.to_string()));
}

/// Sends a byte each second until something breaks, and says what comes back or breaks.
async fn tick(net: SimNet, log: Log, seconds: u64) {
    let mut stream = net.connect("server:7443").await.unwrap();
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        sleep(Duration::from_secs(1)).await;
        let exchanged = async {
            stream.write_all(b"x").await?;
            stream.read_exact(&mut [0]).await
        };
        match exchanged.await {
            Ok(_) => say(&log, "echo"),
            Err(error) => return say(&log, error.kind()),
        }
    }
}

fn ips(sim: &turmoil::Sim<'_>) -> (IpAddr, IpAddr) {
    (sim.lookup("server"), sim.lookup("client"))
}

fn cut(network: &mut Network, sim: &turmoil::Sim<'_>) {
    let (a, b) = ips(sim);
    network.cut(sim, a, b);
}

fn heal(network: &mut Network, sim: &turmoil::Sim<'_>) {
    let (a, b) = ips(sim);
    network.heal(sim, a, b);
}

fn forget(network: &mut Network, sim: &turmoil::Sim<'_>) {
    let (a, b) = ips(sim);
    network.forget(a, b);
}

#[test]
fn bytes_come_back_whole_and_an_end_and_a_reset_as_themselves() {
    let said = play(&[], |net, log| async move {
        let mut stream = net.connect("server:7443").await.unwrap();
        let bytes: Vec<u8> = (0..2_000_000_u32).map(|i| (i * 7 / 3) as u8).collect();
        let (mut reader, mut writer) = tokio::io::split(&mut stream);
        let mut back = Vec::new();
        let writing = async {
            writer.write_all(&bytes).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let (read, ()) = tokio::join!(reader.read_to_end(&mut back), writing);
        read.unwrap();
        assert!(back == bytes);
        let mut stream = net.connect("server:7443").await.unwrap();
        stream.write_all(b"reset").await.unwrap();
        say(&log, stream.read(&mut [0]).await.unwrap_err().kind());
        say(&log, net.connect("server:1").await.err().unwrap().kind());
    });
    let kinds: Vec<_> = said.into_iter().map(|(_, kind)| kind).collect();
    assert_eq!(kinds, ["connection reset", "connection refused"]);
}

#[test]
fn a_short_cut_delays() {
    let said = play(&[(3, cut), (6, heal)], |net, log| tick(net, log, 20));
    let echoes: Vec<_> = said.iter().map(|(at, _)| *at).collect();
    assert!(said.iter().all(|(_, what)| what == "echo"), "{said:?}");
    let gap = echoes.windows(2).find(|pair| pair[1] - pair[0] > 2).expect("a gap");
    assert!(gap[0] <= 3 && (6..=10).contains(&gap[1]), "{said:?}");
}

#[test]
fn the_longer_a_cut_the_later_the_next_retransmission() {
    let said = play(&[(3, cut), (20, heal)], |net, log| tick(net, log, 60));
    assert!(said.iter().all(|(_, what)| what == "echo"), "{said:?}");
    // 0.2 s doubled: after 12.6 s and 25.4 s.
    let first = said.iter().map(|(at, _)| *at).find(|at| *at > 5).unwrap();
    assert!((28..32).contains(&first), "{said:?}");
}

/// Sends a byte after `pause`, and then says each second whether the kernel finds no answer to it, until it breaks.
async fn wait(net: SimNet, log: Log, pause: Duration) {
    let mut stream = net.connect("server:7443").await.unwrap();
    let watching = async {
        sleep(pause).await;
        stream.write_all(b"x").await.unwrap();
        loop {
            sleep(Duration::from_secs(1)).await;
            if stream.is_dead() {
                return say(&log, "dead");
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(130), watching).await.unwrap_or_else(|_| say(&log, "alive"));
    let error = timeout(Duration::from_secs(2000), stream.read(&mut [0])).await.unwrap().unwrap_err();
    say(&log, error.kind());
}

#[test]
fn what_is_sent_on_a_cut_path_is_sent_again_for_15_minutes_and_known_to_be_dead_after_two() {
    let said = play(&[(3, cut)], |net, log| wait(net, log, Duration::from_secs(4)));
    let [(dead, one), (over, other)] = &said[..] else { panic!("{said:?}") };
    // The first retransmission after a minute is sent after 102 s here.
    assert!((106..110).contains(dead) && one == "dead", "{said:?}");
    assert!((928..931).contains(over) && other == "timed out", "{said:?}");
}

#[test]
fn an_idle_connection_on_a_cut_path_is_broken_by_its_probes() {
    let said = play(&[(3, cut), (90, heal)], |net, log| async move {
        let mut stream = net.connect("server:7443").await.unwrap();
        let error = stream.read(&mut [0]).await.unwrap_err();
        say(&log, error.kind());
        tick(net, log, 5).await;
    });
    assert!((77..80).contains(&said[0].0) && said[0].1 == "timed out", "{said:?}");
    assert!(said.len() > 2 && said[1..].iter().all(|(_, what)| what == "echo"), "{said:?}");
}

#[test]
fn a_forgotten_connection_is_silent_and_a_new_one_works() {
    let said = play(&[(3, forget)], |net, log| async move {
        let silent = wait(net.clone(), log.clone(), Duration::from_secs(4));
        let fresh = async {
            sleep(Duration::from_secs(5)).await;
            let mut stream = net.connect("server:7443").await.unwrap();
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            say(&log, "fresh");
        };
        tokio::join!(silent, fresh);
    });
    let what: Vec<_> = said.iter().map(|(_, what)| what.as_str()).collect();
    assert_eq!((what, said[0].0), (vec!["fresh", "dead", "timed out"], 5), "{said:?}");
}

#[test]
fn a_slow_reader_stops_the_writer_and_its_close_frees_it() {
    let said = play(&[], |net, log| async move {
        let listener = net.listen("0.0.0.0:1".parse().unwrap()).await.unwrap();
        drop(listener);
        let mut stream = net.connect("server:7443").await.unwrap();
        // The echo waits for us to read.
        let mut written = 0;
        while let Ok(n) = timeout(Duration::from_secs(1), stream.write(&[1; 8192])).await {
            written += n.unwrap();
            assert!(written < 100 << 20, "the sender is never stopped");
        }
        say(&log, "stopped");
        let mut back = vec![0; written];
        stream.read_exact(&mut back).await.unwrap();
        say(&log, "all back");
    });
    assert_eq!(said.len(), 2, "{said:?}");
}

#[test]
fn a_dial_that_is_given_up_leaves_nothing() {
    let done = Rc::new(RefCell::new(false));
    let seen = done.clone();
    play(&[(1, cut), (6, heal)], |net, _| async move {
        sleep(Duration::from_secs(2)).await;
        assert!(timeout(Duration::from_secs(1), net.connect("server:7443")).await.is_err());
        sleep(Duration::from_secs(10)).await;
        *seen.borrow_mut() = true;
    });
    assert!(*done.borrow());
}
