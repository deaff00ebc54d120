//! Upstreams that are silent, lie, truncate or know no EDNS, and those that are ourselves.

use std::time::Instant;

use super::fake::{Fake, answer, fine, reply};
use super::*;
use crate::dns::{UpstreamState, UpstreamStatus};

/// 60 addresses: over 1,232 bytes.
fn many(query: &Message) -> Message {
    let addresses: Vec<[u8; 4]> = (1..=100).map(|last| [192, 0, 2, last]).collect();
    answer(query, 60, &addresses)
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_over_tcp() {
    let upstream = Fake::new(|query, transport| {
        vec![match transport {
            Transport::Udp => many(query).truncate(),
            Transport::Tcp => many(query),
        }]
    })
    .await;
    let dns = dns(&[upstream.addr]);
    let small = ask(&dns, &query("many.example", RecordType::A)).await;
    // 12 bytes of header, 18 of question, and 16 for each record.
    assert!(small.truncation && small.answers.len() == (512 - 30) / 16, "what fits: {}", small.answers.len());
    let large = ask(&dns, &with_edns(query("many.example", RecordType::A), 4096)).await;
    assert_eq!((large.truncation, large.answers.len()), (false, 100));
    let stream = ask_over(&dns, &query("many.example", RecordType::A), Transport::Tcp).await;
    assert_eq!((stream.truncation, stream.answers.len()), (false, 100));
    let transports: Vec<Transport> = upstream.asked().into_iter().map(|(_, transport)| transport).collect();
    assert_eq!(transports, [Transport::Udp, Transport::Tcp]);
}

#[tokio::test]
async fn a_datagram_longer_than_announced_is_passed_on_whole() {
    for (records, length) in [(360, 8_500..10_000), (2_300, 60_000..65_500)] {
        let large = move |query: &Message| {
            let addresses: Vec<[u8; 4]> =
                (0..records).map(|i: u16| [192, 0, (i >> 8) as u8, i as u8]).collect();
            answer(query, 60, &addresses)
        };
        let upstream = Fake::new(move |query, _| vec![large(query)]).await;
        let dns = dns(&[upstream.addr]);
        let query = query("large.example", RecordType::A);
        let packet = dns.answer(&query.to_vec().unwrap(), CLIENT, Transport::Tcp).await.unwrap();
        assert!(length.contains(&packet.len()), "{} bytes", packet.len());
        let answer = Message::from_vec(&packet).unwrap();
        assert_eq!((answer.truncation, answer.answers.len()), (false, usize::from(records)));
        let transports: Vec<Transport> =
            upstream.asked().into_iter().map(|(_, transport)| transport).collect();
        assert_eq!(transports, [Transport::Udp], "asked again");
    }
}

#[tokio::test]
async fn a_silent_upstream_is_passed_over_and_then_asked_last() {
    let silent = Fake::new(|_, _| vec![]).await;
    let good = Fake::new(|query, _| fine(query)).await;
    let dns = dns(&[silent.addr, good.addr]);
    let started = Instant::now();
    assert_eq!(addresses(&ask_a(&dns, "one.example").await).len(), 1);
    assert!(started.elapsed() >= limits().one_try);
    assert_eq!(silent.asked().len(), 3, "sent again within its turn");
    let started = Instant::now();
    assert_eq!(addresses(&ask_a(&dns, "two.example").await).len(), 1);
    assert!(started.elapsed() < limits().one_try, "{:?}", started.elapsed());
    assert_eq!(silent.asked().len(), 3);
    let state = |fake: &Fake, state| UpstreamStatus { address: fake.addr, state };
    assert_eq!(
        dns.status().upstreams,
        [state(&silent, UpstreamState::Silent), state(&good, UpstreamState::Good)]
    );
}

#[tokio::test]
async fn all_silent_is_a_failure_in_time() {
    let silent = Fake::new(|_, _| vec![]).await;
    let dns = dns(&[silent.addr]);
    let started = Instant::now();
    assert_eq!(code(&ask_a(&dns, "example.com").await), ResponseCode::ServFail);
    let took = started.elapsed();
    assert!(took >= limits().all_tries - limits().one_try && took < limits().all_tries * 2, "{took:?}");
    assert_eq!(dns.metrics.upstream_failures.get(), 3);
}

/// Each of two upstreams answers a question's first datagram, when it has got its fourth: that is after its turn.
#[tokio::test]
async fn an_answer_after_its_turn_counts() {
    let slow = async || {
        let socket = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = socket.local_addr().unwrap();
        let serving = async move {
            let mut buf = [0; 4096];
            let (len, first) = socket.recv_from(&mut buf).await.unwrap();
            let answer = fine(&Message::from_vec(&buf[..len]).unwrap()).remove(0);
            for _ in 1..4 {
                socket.recv_from(&mut buf).await.unwrap();
            }
            socket.send_to(&answer.to_vec().unwrap(), first).await.unwrap();
            std::future::pending::<()>().await;
        };
        (addr, serving)
    };
    let mut serving = tokio::task::JoinSet::new();
    for others in [0, 1] {
        let (addr, job) = slow().await;
        serving.spawn(job);
        let silent = Fake::new(|_, _| vec![]).await;
        let upstreams = [&[addr][..], &[silent.addr][..others]].concat();
        let dns = dns_within(&upstreams, Limits { all_tries: Duration::from_secs(60), ..limits() });
        let answer = ask_a(&dns, "slow.example").await;
        assert_eq!(addresses(&answer), [Ipv4Addr::new(192, 0, 2, 1)], "{others} others");
        assert_eq!(dns.status().upstreams[0].state, UpstreamState::Good);
    }
}

#[tokio::test]
async fn a_lost_datagram_is_sent_again() {
    let count = std::sync::atomic::AtomicU32::new(0);
    let upstream = Fake::new(move |query, _| {
        if count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 { vec![] } else { fine(query) }
    })
    .await;
    let dns = dns(&[upstream.addr]);
    assert_eq!(addresses(&ask_a(&dns, "example.com").await).len(), 1);
    assert_eq!(dns.metrics.upstream_failures.get(), 0);
}

#[tokio::test]
async fn lies_are_not_believed() {
    let lies = |query: &Message| {
        let mut other_id = answer(query, 60, &[[203, 0, 113, 1]]);
        other_id.metadata.id ^= 1;
        let mut other_question = answer(query, 60, &[[203, 0, 113, 2]]);
        other_question.queries[0].set_name(name("victim.example"));
        let mut no_question = answer(query, 60, &[[203, 0, 113, 3]]);
        no_question.queries.clear();
        vec![other_id, other_question, no_question]
    };
    let liar_then_honest = Fake::new(move |query, _| [lies(query), fine(query)].concat()).await;
    let honest = dns(&[liar_then_honest.addr]);
    assert_eq!(addresses(&ask_a(&honest, "example.com").await), [Ipv4Addr::new(192, 0, 2, 1)]);
    assert_eq!(addresses(&ask_a(&honest, "other.example").await), [Ipv4Addr::new(192, 0, 2, 1)]);

    let liar = Fake::new(move |query, _| lies(query)).await;
    let lied_to = dns(&[liar.addr]);
    assert_eq!(code(&ask_a(&lied_to, "example.com").await), ResponseCode::ServFail);

    // Over TCP too.
    let liar = Fake::new(|query, transport| {
        let mut answer = many(query);
        match transport {
            Transport::Udp => vec![answer.truncate()],
            Transport::Tcp => {
                answer.queries[0].set_name(name("victim.example"));
                vec![answer]
            }
        }
    })
    .await;
    let lied_to = dns(&[liar.addr]);
    let answer = ask_a(&lied_to, "example.com").await;
    assert!(answer.truncation && answer.answers.is_empty(), "{answer}");
    assert_eq!(lied_to.status().cache_entries, 0);
}

#[tokio::test]
async fn a_better_answer_of_another_upstream_counts() {
    let refusing = Fake::new(|query, _| vec![reply(query, ResponseCode::Refused)]).await;
    let failing = Fake::new(|query, _| vec![reply(query, ResponseCode::ServFail)]).await;
    let good = Fake::new(|query, _| fine(query)).await;
    let three = dns(&[refusing.addr, failing.addr, good.addr]);
    assert_eq!(addresses(&ask_a(&three, "example.com").await).len(), 1);
    let two = dns(&[refusing.addr, failing.addr]);
    assert_eq!(code(&ask_a(&two, "example.com").await), ResponseCode::Refused);
    assert_eq!((refusing.asked().len(), failing.asked().len()), (4, 4), "once each, and once without EDNS");
    assert_eq!(two.status().upstreams[0].state, UpstreamState::Good);
    // An error in hand, the silent one gets one try and no more.
    let silent = Fake::new(|_, _| vec![]).await;
    let one = dns(&[silent.addr, failing.addr]);
    assert_eq!(code(&ask_a(&one, "example.com").await), ResponseCode::ServFail);
    assert_eq!(one.metrics.upstream_failures.get(), 1);
}

#[tokio::test]
async fn an_upstream_without_edns() {
    for bare in [false, true] {
        let old = Fake::new(move |query, _| match query.edns {
            Some(_) => {
                let mut answer = reply(query, ResponseCode::FormErr);
                answer.edns = None;
                if bare {
                    answer.queries.clear();
                }
                vec![answer]
            }
            None => fine(query),
        })
        .await;
        let dns = dns(&[old.addr]);
        let answer = ask(&dns, &with_edns(query("example.com", RecordType::A), 1232)).await;
        assert_eq!(addresses(&answer).len(), 1);
        assert_eq!(old.asked().len(), 2, "asked again at once");
        assert_eq!(dns.metrics.upstream_failures.get(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn never_a_loop_to_ourselves() {
    let own = SocketAddr::from(([127, 0, 0, 2], 53));
    let dns = dns(&[own]);
    dns.listens_at(own);
    let started = tokio::time::Instant::now();
    let answer = ask(&dns, &with_edns(query("example.com", RecordType::A), 1232)).await;
    assert_eq!((code(&answer), explanation(&answer)), (ResponseCode::ServFail, Some(0)));
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert_eq!(dns.status().upstreams, [UpstreamStatus { address: own, state: UpstreamState::Ourselves }]);
    assert_eq!(dns.metrics.upstream_failures.get(), 0);
}
