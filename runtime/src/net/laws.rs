//! The laws of [`Net`](super::Net): what the programs rely on, as tests that any network runs. The kernel's does in
//! this crate's tests and the simulation's in its own, by [`net_laws`](crate::net_laws).

#![allow(missing_docs, reason = "a law is its name")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "what this module holds is tests")]

pub mod splices;
pub mod streams;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::{Listener, Net};

const SOON: Duration = Duration::from_secs(10);
/// Nothing that can move stays for so long.
const STILL: Duration = Duration::from_millis(200);

/// Makes a test of each law, for the network that the expression makes.
#[macro_export]
macro_rules! net_laws {
    ($net:expr) => {
        $crate::net_laws! {
            @ $net;
            streams:
                a_handed_over_socket_connects_and_a_handed_over_listener_accepts,
                a_socket_says_where_it_was_made_whoever_holds_it,
                connections_wait_while_nobody_polls_the_listener,
                an_end_goes_behind_the_bytes_and_the_other_direction_goes_on,
                reset_is_seen_as_a_reset,
                an_applications_stream_resets_when_it_is_dropped,
                an_applications_stream_that_is_closed_ends_after_all_that_was_written,
                a_close_with_unread_bytes_resets,
                refusals_say_where,
                a_reserved_name_is_one_programs_at_a_time,
                datagrams_keep_their_boundaries_and_report_refusals,
                a_refusal_is_told_without_another_datagram;
            splices:
                bytes_go_both_ways_at_once_and_are_counted,
                an_end_is_passed_on_and_the_other_direction_of_a_splice_goes_on,
                a_reset_is_passed_on_either_way,
                a_reset_after_an_end_is_passed_on_to_a_silent_side,
                a_reset_of_a_blocked_sender_is_passed_on,
                a_receiver_that_closes_resets_the_sender,
                what_a_sender_said_before_its_reset_is_passed_on,
                an_early_answer_comes_before_the_reset_of_a_request_that_is_not_read,
                a_slow_reader_stops_the_writer_and_gets_everything,
                a_blocked_direction_does_not_hold_up_the_other,
                a_dropped_splice_resets_both_sides
        }
    };
    (@ $net:expr; $($room:ident: $($law:ident),+);+) => {
        $($(
            #[tokio::test]
            async fn $law() {
                $crate::net::laws::$room::$law($net).await;
            }
        )+)+
    };
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

async fn pair<N: Net>(net: &N) -> (N::TcpStream, N::TcpStream) {
    let listener = net.listen(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (near, far) = tokio::join!(net.connect(&address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(SOON, future).await.expect("stuck")
}

/// The byte at a place, so that what is lost, doubled or swapped is seen.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// Writes the pattern until nothing has moved for a while; returns how much went in.
async fn fill_up(stream: &mut (impl AsyncWriteExt + Unpin)) -> usize {
    let mut written = 0;
    while let Ok(n) = timeout(STILL, stream.write(&pattern(written, 64 << 10))).await {
        written += n.unwrap();
        assert!(written < 200 << 20, "the sender is never stopped");
    }
    written
}
