//! One question to one upstream, by hickory-net.
//!
//! UDP first, sent again while there is no answer, and each listens to the end; TCP where the answer is truncated.
//! hickory-net takes an answer only from the upstream's address, with the query's id and question.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_net::NetError;
use hickory_net::tcp::TcpClientStream;
use hickory_net::udp::UdpClientStream;
use hickory_net::xfer::{DnsExchange, DnsHandle, DnsMultiplexer, DnsRequestSender, FirstAnswer};
use hickory_proto::op::{DnsRequest, DnsRequestOptions, DnsResponse, Message, ResponseCode};

use super::question::Question;
use super::socket::{BareFormErr, Connected};

/// The size of answers over UDP that upstreams are asked for: what passes every network in one piece
/// (RFC 9715 §3).
pub(super) const UPSTREAM_UDP: u16 = 1232;
/// How often a datagram is sent at the most. Each has a socket of its own.
const SENT: u8 = 4;

/// Asks, and listens for so long. `one_try` is the time after which the next upstream is asked.
pub(super) async fn exchange(
    addr: SocketAddr,
    question: &Question,
    one_try: Duration,
    within: Duration,
) -> Result<DnsResponse, NetError> {
    let again = one_try * 2 / 5;
    let first = datagram(addr, question.message(true), again, within).await;
    let edns = !is_before_edns(&first);
    let response = if edns { first? } else { datagram(addr, question.message(false), again, within).await? };
    if response.truncation {
        return stream(addr, question.message(edns), within).await;
    }
    Ok(response)
}

/// Whether a server from before EDNS says this (RFC 6891 §7).
fn is_before_edns(response: &Result<DnsResponse, NetError>) -> bool {
    match response {
        Ok(response) => response.response_code == ResponseCode::FormErr && response.edns.is_none(),
        Err(NetError::Io(error)) => error.get_ref().is_some_and(|error| error.is::<BareFormErr>()),
        Err(_) => false,
    }
}

async fn datagram(
    addr: SocketAddr,
    query: Message,
    again: Duration,
    within: Duration,
) -> Result<DnsResponse, NetError> {
    let mut options = DnsRequestOptions::default();
    options.retry_interval = again;
    let mut client = UdpClientStream::builder(addr, Connected::default())
        .with_timeout(Some(within))
        .with_max_retries(SENT)
        .with_retry_interval_floor(again.as_millis() as u64)
        // The kernel's range, which servers of the pod keep clear of.
        .with_os_port_selection(true)
        .build();
    client.send_message(DnsRequest::new(query, options)).first_answer().await
}

async fn stream(addr: SocketAddr, query: Message, within: Duration) -> Result<DnsResponse, NetError> {
    let asked = query.queries.clone();
    let (connecting, sender) = TcpClientStream::new(addr, None, Some(within), Connected::default());
    let multiplexer = DnsMultiplexer::new(connecting.await?, sender).with_timeout(within);
    let (exchange, background) = DnsExchange::<Connected>::from_stream(multiplexer);
    let mut answer = exchange.send(DnsRequest::new(query, DnsRequestOptions::default())).first_answer();
    let response = tokio::select! {
        biased;
        response = &mut answer => response?,
        // The connection has ended; the answer may have come before that.
        () = background => answer.await?,
    };
    // hickory-net looks at the id alone here.
    if response.queries != asked {
        return Err(NetError::Message("the answer is to another question"));
    }
    if response.truncation {
        return Err(NetError::Truncated);
    }
    Ok(response)
}
