//! What the applications of a pod do with a Service: ask for its name, open flows, send datagrams.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use servicekeel_sidecar::dns::Transport;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::datagram;
use crate::dns::{self, Answer};
use crate::flow::{self, Outcome, Plan};
use crate::oracle::now;
use crate::stage::{DATABASE, ECHO, METRICS, Port, SYSLOG, WEB};
use crate::world::{DNS, World};

/// How long one try of a probe may take.
const PROBE: Duration = Duration::from_secs(4);
/// How long a flow may take that nothing holds up. Only a hang takes longer.
const FLOW: Duration = Duration::from_secs(150);

impl World {
    /// Asks the DNS of a pod.
    ///
    /// # Errors
    /// See [`dns::ask`].
    pub async fn ask(
        &self,
        pod: &str,
        name: &str,
        kind: RecordType,
        transport: Transport,
    ) -> io::Result<Answer> {
        let id = self.draw() as u16;
        let (net, name) = (self.net(pod).clone(), name.to_owned());
        self.within(pod, async move { dns::ask(&net, DNS, &name, kind, transport, id).await }).await
    }

    /// The address of a port's Service, by its long name; `None` where the name has none now.
    pub async fn resolve(&self, pod: &str, port: &Port) -> Option<IpAddr> {
        let transport = if self.draw().is_multiple_of(8) { Transport::Tcp } else { Transport::Udp };
        match self.ask(pod, &port.long_name(), RecordType::A, transport).await {
            Ok(Answer { code: ResponseCode::NoError, addresses, ttl, .. }) => {
                let address = *addresses.first()?;
                self.oracle.answer(pod, &port.long_name(), address, ttl);
                Some(address)
            }
            Ok(answer) => {
                debug!(pod, name = %port.long_name(), code = %answer.code, "no address");
                None
            }
            Err(error) => {
                debug!(pod, name = %port.long_name(), %error, "no answer of DNS");
                None
            }
        }
    }

    /// The socket address of a port, by DNS.
    ///
    /// # Panics
    /// Where its name has no address: for scripts in which it must have one.
    pub async fn locate(&self, pod: &str, port: &Port) -> SocketAddr {
        let address = self.resolve(pod, port).await;
        SocketAddr::new(address.unwrap_or_else(|| panic!("{pod} has no address of {port}")), port.port)
    }

    /// A plan for a flow to a port.
    pub fn plan(&self, port: &Port, up: u64, down: u64) -> Plan {
        Plan::new(self.oracle.service(&port.to_string()), up, down)
    }

    /// Carries a flow from a pod to its end. A flow that hangs is a violation.
    pub async fn flow(&self, pod: &str, to: SocketAddr, plan: Plan) -> Outcome {
        let (net, oracle) = (self.net(pod).process(1000), self.oracle.clone());
        self.within(pod, async move {
            match timeout(FLOW + plan.pause, flow::run(&net, to, plan, &oracle)).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    oracle.violate(format_args!("a flow hangs: {plan:?}"));
                    Outcome::NotConnected(io::ErrorKind::TimedOut)
                }
            }
        })
        .await
    }

    /// Sends a datagram from a socket of its own and waits for the answer.
    pub async fn exchange(&self, pod: &str, to: SocketAddr, port: &Port, len: usize) -> bool {
        match self.datagram_client(pod) {
            Ok(mut client) => self.exchange_by(&mut client, pod, to, port, len).await,
            Err(_) => false,
        }
    }

    /// A socket of an application of a pod, for datagrams.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn datagram_client(&self, pod: &str) -> io::Result<datagram::Client> {
        datagram::Client::new(&self.net(pod).process(1000), &self.oracle)
    }

    /// Sends a datagram from a client of the pod and waits for the answer.
    pub async fn exchange_by(
        &self,
        client: &mut datagram::Client,
        pod: &str,
        to: SocketAddr,
        port: &Port,
        len: usize,
    ) -> bool {
        let service = self.oracle.service(&port.to_string());
        let mut by = client.clone();
        self.within(pod, async move { by.exchange(to, service, len, Duration::from_secs(1)).await })
            .await
            .unwrap_or(false)
    }

    /// Whether a port works for a pod now, from its name on: one short flow, or one datagram and its answer.
    pub async fn works(&self, pod: &str, port: &Port) -> bool {
        let Some(address) = self.resolve(pod, port).await else { return false };
        let to = SocketAddr::new(address, port.port);
        if port.udp {
            // A datagram may be lost.
            return self.exchange(pod, to, port, 600).await || self.exchange(pod, to, port, 600).await;
        }
        let plan = self.plan(port, 700, 900);
        let (net, oracle) = (self.net(pod).process(1000), self.oracle.clone());
        let outcome =
            self.within(pod, async move { timeout(PROBE, flow::run(&net, to, plan, &oracle)).await }).await;
        matches!(outcome, Ok(Outcome::Complete))
    }

    /// Waits until a port works for a pod.
    ///
    /// # Panics
    /// Where it does not within `patience`.
    pub async fn until_works(&self, pod: &str, port: &Port, patience: Duration) {
        let began = now();
        while !self.works(pod, port).await {
            let waited = now() - began;
            assert!(waited < patience, "{port} does not work for {pod} after {waited:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Whether datagrams of a client that there was before are answered.
    async fn works_for(&self, client: &mut datagram::Client, pod: &str, port: &Port) -> bool {
        let Some(address) = self.resolve(pod, port).await else { return false };
        let to = SocketAddr::new(address, port.port);
        // A datagram may be lost.
        for _ in 0..2 {
            if self.exchange_by(client, pod, to, port, 600).await {
                return true;
            }
        }
        false
    }

    /// Tries a port again and again. Where it is reachable and what changed last has had its time, [`SETTLED`] or
    /// [`FORGOTTEN`], it must work: over UDP also for a client that has had the same socket all the while.
    ///
    /// [`SETTLED`]: crate::oracle::SETTLED
    /// [`FORGOTTEN`]: crate::oracle::FORGOTTEN
    ///
    /// # Panics
    /// Where the pod has no socket for a client.
    pub async fn probe(self: Arc<Self>, pod: &'static str, port: Port, pause: Duration) {
        let mut client = self.datagram_client(pod).expect("a socket for a client");
        loop {
            let (began, before) = (now(), self.reachable(pod, &port));
            let works =
                self.works(pod, &port).await && (!port.udp || self.works_for(&mut client, pod, &port).await);
            if before && self.reachable(pod, &port) && self.oracle.must_have_worked(began) && !works {
                self.oracle.violate(format_args!("{port} does not work for {pod}, at {began:?}"));
            }
            sleep(pause).await;
        }
    }

    pub(crate) fn draw(&self) -> u64 {
        self.random.lock().unwrap_or_else(std::sync::PoisonError::into_inner).draw()
    }
}

/// How long the usual stage may take to be ready.
const READY: Duration = Duration::from_secs(6);

impl World {
    /// Starts everything of the usual stage ([`crate::stage::two_clusters`]): `server` exports to `client` and `near`,
    /// `client` exports to `near`; `near` reaches one over its node and the other across, by a dial back. Returns when
    /// all of it works.
    ///
    /// # Panics
    /// Where it takes too long.
    pub async fn set_up(&self) {
        let (of_a, of_b) = ([WEB, DATABASE, ECHO], [METRICS, SYSLOG]);
        self.annotate("server", &of_a, &[]);
        self.annotate("client", &of_b, &of_a);
        self.annotate("near", &[], &[WEB, DATABASE, ECHO, METRICS, SYSLOG]);
        for port in of_a {
            self.serve("server", port, port == DATABASE).await;
        }
        for port in of_b {
            self.serve("client", port, false).await;
        }
        self.start().await;
        for (pod, port) in USES {
            self.until_works(pod, &port, READY).await;
        }
    }
}

/// Who uses what in the usual stage.
pub const USES: [(&str, Port); 8] = [
    ("client", WEB),
    ("client", DATABASE),
    ("client", ECHO),
    ("near", WEB),
    ("near", DATABASE),
    ("near", ECHO),
    ("near", METRICS),
    ("near", SYSLOG),
];
