//! Routers that may have few files open: what can't be carried waits, and what goes on goes on.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Echo, Pair, Router, annotation, ping, wait_for};

/// More than a router needs by itself, and far less than what comes.
const OPEN_FILES: u32 = 80;
/// Long before an unused connection is closed for its age.
const LIMIT: Duration = Duration::from_secs(30);

/// So many connections, each with a byte on its way.
fn connect(addr: SocketAddr, number: usize) -> Result<Vec<TcpStream>> {
    let connect = |_| {
        let mut stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(LIMIT))?;
        // One that is reset already is none that is served.
        let _ = stream.write_all(b"x");
        Ok(stream)
    };
    (0..number).map(connect).collect()
}

fn is_served(stream: &mut TcpStream) -> bool {
    stream.read_exact(&mut [0]).is_ok()
}

/// How often a router has said something.
fn told(router: &Router, text: &str) -> usize {
    router.process.log().matches(text).count()
}

#[test]
fn the_exporters_router_serves_on_when_its_flows_have_ended() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    pair.stand.limit_router(&mut pair.a, OPEN_FILES)?;
    wait_for("the service is back", LIMIT, || Ok(ping(web).ok()))?;
    let sidecars = told(&pair.a, "sidecar connected");
    let mut flows = connect(web, 300)?;
    // The admin endpoint has a descriptor meanwhile.
    pair.a.status().with_context(|| pair.a.process.log())?;
    let served = flows.iter_mut().filter_map(|flow| is_served(flow).then_some(())).count();
    ensure!((1..300).contains(&served), "{served} of 300 are served: the limit is not what it should be");
    drop(flows);
    wait_for("the service is back", LIMIT, || Ok(ping(web).ok())).with_context(|| pair.a.process.log())?;
    ensure!(
        told(&pair.a, "sidecar connected") == sidecars,
        "the sidecar was dropped: {}",
        pair.a.process.log()
    );
    ensure!(told(&pair.a, "allows few concurrent flows") == 1, "{}", pair.a.process.log());
    Ok(())
}

#[test]
fn at_the_consumers_router_connections_wait_for_one_another() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    let web = pair.resolve("web.default")?;
    pair.stand.limit_router(&mut pair.b, OPEN_FILES)?;
    wait_for("the service is back", LIMIT, || Ok(ping(web).ok()))?;
    let flows = connect(web, 100)?;
    pair.b.status().with_context(|| pair.b.process.log())?;
    // Each that ends lets another in.
    for (number, mut flow) in flows.into_iter().enumerate() {
        ensure!(is_served(&mut flow), "connection {number} was reset: {}", pair.b.process.log());
    }
    Ok(())
}

#[test]
fn an_import_that_was_refused_is_served_once_there_is_room() -> Result<()> {
    let mut pair = Pair::start()?;
    let _echo = Echo::start(pair.service)?;
    pair.stand.limit_router(&mut pair.b, OPEN_FILES)?;
    let names: Vec<String> = (0..40).map(|number| format!("other{number}")).collect();
    let mut entries: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), "default", "a.local", Pair::PORT, "TCP", Pair::PORT))
        .collect();
    pair.client.set_imports(&annotation(&entries))?;
    let refused = |pair: &Pair, name: &str| -> Result<Option<String>> {
        let status = pair.client.status()?;
        let warnings = status["warnings"].as_array().context("no warnings in the status")?;
        let told = warnings.iter().map(ToString::to_string);
        Ok(told.into_iter().find(|told| told.contains(name) && told.contains("as many as it may")))
    };
    wait_for("the last import is refused", LIMIT, || refused(&pair, "other39"))?;
    entries.push(("web", "default", "a.local", Pair::PORT, "TCP", Pair::PORT));
    pair.client.set_imports(&annotation(&entries))?;
    wait_for("web is refused", LIMIT, || refused(&pair, "web.default"))?;
    pair.client.set_imports(&annotation(&entries[35..]))?;
    let web = pair.resolve("web.default")?;
    wait_for("web is served", LIMIT, || Ok(ping(web).ok())).with_context(|| pair.client.process.log())?;
    wait_for("status knows", LIMIT, || Ok(refused(&pair, "web.default")?.is_none().then_some(())))?;
    let log = pair.client.process.log();
    ensure!(log.contains("accepted by the router after retrying"), "{log}");
    Ok(())
}
