//! The static programs as images FROM scratch: two clusters in containers without root and capabilities, on a read-only
//! root. The pods have no network but their loopback, so what passes between them passes by the sockets that their
//! sidecars handed to the routers.
//!
//! `make test-images` runs it. It needs a Docker engine and busybox-static, and pulls nothing.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Contained, Engine, Node, NodeOptions, Pod, PodOptions, Stand, annotation, until};

const BUSYBOX: &str = "/bin/busybox";

/// The bytes of the server's page.
const CONTENT: u32 = 8 << 20;

/// What the server offers: a page, and over UDP the names that its own sidecar knows, since busybox has no UDP server.
const OFFERS: [(&str, &str, &str, u16, &str, u16); 2] = [
    ("simple-server", "default", "cluster-a.local", 8080, "TCP", 8080),
    ("names", "default", "cluster-a.local", 53, "UDP", 53),
];

/// A name that the server's sidecar alone knows, and an address of it.
const KNOWN_TO_SERVER: (&str, &str) = ("elsewhere.default", "127.0.77.1");

/// The two clusters of `examples/simple`. What uses something stands before it, so that it ends first.
struct Clusters {
    client: Pod,
    server: Pod,
    b: Node,
    a: Node,
    /// What the server's page holds.
    content: Vec<u8>,
    _stand: Stand,
    _engine: Engine,
}

/// Where `make build-sidecar` and the like put the programs.
fn bin() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bin")
}

impl Clusters {
    /// Starts them. The router of cluster-a.local trusts these clusters beside its own.
    async fn start(a_trusts: &[&str]) -> Result<Self> {
        let mut engine = Engine::connect().await?;
        let stand = Stand::new(&bin())?;
        let router = engine.image(&stand.program("servicekeel-router")).await?;
        let sidecar = engine.image(&stand.program("servicekeel-sidecar")).await?;
        let busybox =
            engine.image(Path::new(BUSYBOX)).await.context("Debian: apt-get install busybox-static")?;

        let options = NodeOptions { cluster: "cluster-a.local", node: "a-1", trusts: a_trusts, dials: None };
        let a = Node::start(&engine, &stand, &router, &options).await?;
        let options = NodeOptions {
            cluster: "cluster-b.local",
            node: "b-1",
            trusts: &["cluster-a.local"],
            dials: Some(a.name.clone()),
        };
        let b = Node::start(&engine, &stand, &router, &options).await?;

        let files = stand.dir().join("files");
        std::fs::create_dir(&files)?;
        let content: Vec<u8> = (0..CONTENT).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        std::fs::write(files.join("content"), &content)?;
        let server = PodOptions {
            name: "simple-server",
            application: (&busybox, &["httpd", "-f", "-p", "8080", "-h", "/srv"], &files),
            exports: annotation(&OFFERS),
            imports: annotation(&[("elsewhere", "default", "cluster-b.local", 80, "TCP", 80)]),
            variables: &[("SIDECAR_IP_RANGE", "127.0.77.0/24"), ("SIDECAR_POD_ADDRS", "127.0.0.2")],
        };
        let server = Pod::start(&engine, &stand, &a, &sidecar, &server).await?;
        let client = PodOptions {
            name: "simple-client",
            application: (&busybox, &["sleep", "3600"], &files),
            exports: String::new(),
            imports: annotation(&OFFERS),
            variables: &[],
        };
        let client = Pod::start(&engine, &stand, &b, &sidecar, &client).await?;
        Ok(Self { client, server, b, a, content, _stand: stand, _engine: engine })
    }

    /// Runs one of busybox's programs in the client's application.
    async fn client(&self, words: &[&str]) -> Result<Vec<u8>> {
        self.client.application.run(&[&["/busybox"], words].concat()).await
    }

    /// Asks for a name, by the resolver settings of the client's pod, or a server that it finds by them.
    async fn look_up(&self, name: &str, server: &[&str]) -> Result<String> {
        let answer = self.client(&[&["nslookup", "-type=a", name], server].concat()).await?;
        Ok(String::from_utf8(answer)?)
    }

    /// Waits until the client's router knows both of the server's ports.
    async fn wait_for_offers(&self) -> Result<()> {
        until("the offers", async || {
            let status = self.b.status().await?;
            let offers = status["offers"].as_array().map_or(0, Vec::len);
            ensure!(offers == OFFERS.len(), "{offers} of {}: {status}", OFFERS.len());
            Ok(Some(()))
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_of_another_cluster_is_reached_by_its_name() -> Result<()> {
    let clusters = Clusters::start(&["cluster-b.local"]).await?;
    clusters.wait_for_offers().await?;
    let interfaces = clusters.client(&["ls", "/sys/class/net"]).await?;
    ensure!(interfaces == b"lo\n", "the pod has a network of its own: {interfaces:?}");

    let answer = clusters.look_up("simple-server.default", &[]).await?;
    ensure!(answer.contains("127.0.0.2") && answer.contains("Address: 127.0.66.1"), "{answer}");

    let got =
        clusters.client(&["wget", "-q", "-O", "-", "http://simple-server.default:8080/content"]).await?;
    ensure!(got == clusters.content, "{} bytes of {} came, or others", got.len(), clusters.content.len());

    let (name, address) = KNOWN_TO_SERVER;
    let answer = clusters.look_up(name, &["names.default"]).await?;
    ensure!(answer.contains(address), "{answer}");

    let (a, b) = (clusters.a.status().await?, clusters.b.status().await?);
    for (router, peer) in [(&a, "cluster-b.local/b-1"), (&b, "cluster-a.local/a-1")] {
        ensure!(router["peers"][0]["router"] == peer && router["sidecars"][0]["user"] == 65532, "{router}");
    }
    ensure!(b["flows"]["outbound"] == a["flows"]["inbound"] && b["flows"]["outbound"] != 0, "{b}\n{a}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_program_ends_when_told_to() -> Result<()> {
    let clusters = Clusters::start(&["cluster-b.local"]).await?;
    clusters.wait_for_offers().await?;
    let programs =
        [&clusters.client.sidecar, &clusters.server.sidecar, &clusters.b.router, &clusters.a.router];
    for program in programs {
        let (code, took) = program.terminate().await?;
        ensure!(
            code == 0 && took < Duration::from_secs(2),
            "exit {code} after {took:?}; {}",
            program.log().await
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_not_trusted_reaches_nothing() -> Result<()> {
    let clusters = Clusters::start(&[]).await?;
    let problem = until("a reason", async || {
        let status = clusters.b.status().await?;
        Ok(status["dials"][0]["problem"].as_str().map(str::to_owned))
    });
    let problem = problem.await?;
    ensure!(problem.contains("UnknownCA"), "{problem}");
    let log = clusters.a.router.log().await;
    ensure!(log.contains("cluster-b.local/b-1 is of a cluster that is not trusted"), "{log}");

    let answer = clusters.look_up("simple-server.default", &[]).await?;
    ensure!(answer.contains("Address: 127.0.66.1"), "{answer}");
    let start = Instant::now();
    let got = clusters.client(&["wget", "-q", "-O", "-", "http://simple-server.default:8080/content"]).await;
    ensure!(got.is_err() && start.elapsed() < Duration::from_secs(5), "{got:?} after {:?}", start.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_controller_says_what_it_lacks() -> Result<()> {
    let mut engine = Engine::connect().await?;
    let image = engine.image(&bin().join("servicekeel-controller")).await?;
    let controller = Contained::start(&engine, &image).await?;
    let code = until("the end", async || controller.ended().await).await?;
    let log = controller.log().await;
    ensure!(code == 1 && log.contains("no cluster configured"), "exit {code}: {log}");
    Ok(())
}
