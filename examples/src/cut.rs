//! What the demo shows of a path that goes away and comes back.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::wait_for;
use servicekeel_core::name::Protocol;

use crate::ending::Ending;
use crate::fetch::Download;
use crate::pods::Pods;
use crate::report::{Report, size, time};
use crate::stage::Stage;
use crate::steps::{address, hostname};

/// Three missed answers of a link that is asked every second, and the patience of a flow without a route.
const FIRST_FAILURE: Duration = Duration::from_secs(5);
/// The patience of a flow without a route is 1 s.
const NEXT_FAILURE: Duration = Duration::from_secs(2);
/// A dial every 2 s at most, with jitter.
const HEALING: Duration = Duration::from_secs(5);

/// The download that runs over the cut: 67 MB, of which the server gives 16 MB a second.
const BLOCKS: u64 = 1024;
const MB_PER_SECOND: u32 = 16;

/// Cuts the path between the routers, and joins it again.
///
/// # Errors
/// Where something passes, hangs or does not come back.
pub fn cut_and_heal(
    at: Ipv4Addr,
    stage: &Stage,
    pods: &Pods,
    report: &mut Report,
    ending: &Ending,
) -> Result<()> {
    let (port, _) = pods.shared(Protocol::Tcp)?;
    let addr = SocketAddr::from((at, port.port.get()));
    let name = format!("{}.{}", port.service.name, port.service.namespace);

    report.step("Cut the routers apart while a download runs: no byte passes, and nobody is told");
    let download = Download::start(addr, BLOCKS, Some(MB_PER_SECOND));
    wait_for("the download to begin", Duration::from_secs(10), || {
        Ok((download.received() > 1 << 20).then_some(()))
    })?;
    stage.uplink.cut();
    let cut = Instant::now();
    let took = fails(addr, FIRST_FAILURE)?;
    report.measured("a new connection is reset, once the silence is noticed", time(took));
    let standing = download.received();
    wait_for("router b-1 to call the link down", FIRST_FAILURE.saturating_sub(cut.elapsed()), || {
        Ok(is_down(stage)?.then_some(()))
    })?;
    ending.check()?;
    let took = fails(addr, NEXT_FAILURE)?;
    report.measured("the next one is reset, as there is no route", time(took));
    let started = Instant::now();
    let found = address(stage, &name)?;
    ensure!(found == at, "expected {name} to stay {at}; it is {found}");
    report.measured(format_args!("DNS answers as before: {name} is {found}"), time(started.elapsed()));
    ensure!(!download.is_over(), "expected the download to wait; it ended: {:?}", download.finish());
    let passed = download.received() - standing;
    ensure!(passed == 0, "expected nothing to pass a path that is cut; {passed} bytes did");
    report.measured("the download stands still, at", size(standing));

    report.step("Join them again");
    let apart = cut.elapsed();
    stage.uplink.join();
    let joined = Instant::now();
    wait_for("an answer of the server", HEALING, || {
        ending.check()?;
        Ok(hostname(addr, &pods.server.name).ok())
    })?;
    let took = joined.elapsed();
    ensure!(
        took < HEALING,
        "expected an answer within {} of the joining; it took {}",
        time(HEALING),
        time(took)
    );
    report.measured(format_args!("after {} apart, the first answer came in", time(apart)), time(took));
    let got = download.finish().context("the download over the cut")?;
    ensure!(got.longest_pause + Duration::from_secs(1) > apart, "expected the download to have stood still");
    report.measured(
        format_args!("the download went on and ends with {}, every byte right", size(got.bytes)),
        format_args!("paused {}", time(got.longest_pause)),
    );
    Ok(())
}

/// A new connection is reset, and how soon.
fn fails(addr: SocketAddr, limit: Duration) -> Result<Duration> {
    let started = Instant::now();
    let outcome = e2e::get(addr, "/hostname");
    let took = started.elapsed();
    let error = match outcome {
        Ok((code, _)) => anyhow::bail!("expected a reset; got an answer with the code {code}"),
        Err(error) => error,
    };
    let reset = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::ConnectionReset);
    ensure!(reset, "expected a reset; after {} there was: {error:#}", time(took));
    ensure!(took < limit, "expected a reset within {}; it took {}", time(limit), time(took));
    Ok(took)
}

/// Whether the client's router has no link to any peer.
fn is_down(stage: &Stage) -> Result<bool> {
    let status = stage.near.status()?;
    let peers = status["peers"].as_array().context("no peers in the router's status")?;
    Ok(peers.iter().all(|peer| peer["state"] == "down"))
}
