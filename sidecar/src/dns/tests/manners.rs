//! Upstreams that do not bear EDNS or a random case, and what no two queries share.

use std::collections::BTreeSet;
use std::time::Instant;

use super::fake::{Fake, answer, fine, reply};
use super::*;

/// What an upstream does to a query that it does not bear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dislikes {
    Silence,
    Says(ResponseCode),
}

const ALL: [Dislikes; 5] = [
    Dislikes::Silence,
    Dislikes::Says(ResponseCode::FormErr),
    Dislikes::Says(ResponseCode::NotImp),
    Dislikes::Says(ResponseCode::ServFail),
    Dislikes::Says(ResponseCode::Refused),
];

impl Dislikes {
    fn react(self, query: &Message) -> Vec<Message> {
        match self {
            Self::Silence => vec![],
            Self::Says(code) => vec![reply(query, code)],
        }
    }
}

fn is_mixed(query: &Message) -> bool {
    let name = query.queries[0].name();
    !name.eq_case(&name.to_lowercase())
}

#[tokio::test]
async fn an_upstream_that_does_not_bear_edns() {
    for dislikes in ALL {
        let upstream = Fake::new(move |query, _| match query.edns {
            Some(_) => dislikes.react(query),
            None => fine(query),
        })
        .await;
        let dns = dns(&[upstream.addr]);
        let started = Instant::now();
        let answer = ask(&dns, &with_edns(query("one.example", RecordType::A), 1232)).await;
        assert_eq!(addresses(&answer).len(), 1, "{dislikes:?}");
        assert!(started.elapsed() < limits().one_try, "{dislikes:?}: {:?}", started.elapsed());
        // It is remembered.
        let asked = upstream.asked().len();
        let started = Instant::now();
        for text in ["two.example", "three.example"] {
            assert_eq!(addresses(&ask_a(&dns, text).await).len(), 1);
        }
        assert!(started.elapsed() < limits().one_try / 4, "{dislikes:?}: {:?}", started.elapsed());
        assert_eq!(upstream.asked().len(), asked + 2, "{dislikes:?}");
        assert!(upstream.asked()[asked..].iter().all(|(query, _)| query.edns.is_none()));
        assert_eq!(dns.metrics.upstream_failures.get(), 0, "{dislikes:?}");
    }
}

#[tokio::test]
async fn an_upstream_that_does_not_bear_a_random_case() {
    for dislikes in ALL {
        let upstream =
            Fake::new(move |query, _| if is_mixed(query) { dislikes.react(query) } else { fine(query) })
                .await;
        let dns = dns(&[upstream.addr]);
        let text = |number: u32| format!("a-name-with-many-letters-{number}.example");
        for number in 0..3 {
            assert_eq!(addresses(&ask_a(&dns, &text(number)).await).len(), 1, "{dislikes:?}");
        }
        let asked = upstream.asked().len();
        assert_eq!(addresses(&ask_a(&dns, &text(9)).await).len(), 1);
        assert_eq!(upstream.asked().len(), asked + 1, "{dislikes:?} is remembered");
    }
}

/// It answers in lower case, whatever it is asked. TCP shows that this is its way, and no forger's.
#[tokio::test]
async fn an_upstream_that_changes_the_case() {
    for over_tcp in [true, false] {
        let script = |query: &[u8], _| {
            let mut query = Message::from_vec(query).unwrap();
            let lower = query.queries[0].name().to_lowercase();
            query.queries[0].set_name(lower);
            vec![fine(&query)[0].to_vec().unwrap()]
        };
        let upstream = if over_tcp { Fake::raw(script).await } else { Fake::without_tcp(script).await };
        let dns = dns(&[upstream.addr]);
        let text = |number: u32| format!("A-Name-With-Many-Letters-{number}.example");
        let answer = ask_a(&dns, &text(0)).await;
        assert_eq!(addresses(&answer).len(), 1, "TCP: {over_tcp}");
        assert!(answer.answers[0].name.eq_case(&name(&text(0))));
        let transports: Vec<Transport> =
            upstream.asked().into_iter().map(|(_, transport)| transport).collect();
        let expected = [Transport::Udp, if over_tcp { Transport::Tcp } else { Transport::Udp }];
        assert_eq!(transports, expected);
        assert_eq!(addresses(&ask_a(&dns, &text(1)).await).len(), 1);
        assert_eq!(upstream.asked().len(), 3, "it is remembered");
    }
}

/// Whoever sees one try, or guesses its id, knows nothing of the next.
#[tokio::test]
async fn each_try_is_a_new_query() {
    let upstream = Fake::new(|_, _| vec![]).await;
    let dns = dns(&[upstream.addr]);
    let text = "a-name-with-so-many-letters-that-no-two-are-alike.example";
    assert_eq!(code(&ask_a(&dns, text).await), ResponseCode::ServFail);
    let packets = upstream.packets();
    assert!(packets.len() >= 3, "{}", packets.len());
    let distinct = |count: usize, what: &str| assert_eq!(count, packets.len(), "{what}");
    distinct(packets.iter().map(|(query, ..)| &query[..2]).collect::<BTreeSet<_>>().len(), "ids");
    distinct(packets.iter().map(|(_, from, _)| from.port()).collect::<BTreeSet<_>>().len(), "ports");
    distinct(packets.iter().map(|(query, ..)| &query[12..60]).collect::<BTreeSet<_>>().len(), "cases");
}

/// Everything is right but the case: a forger's guess.
#[tokio::test]
async fn an_answer_in_another_case_is_not_believed() {
    let upstream = Fake::new(|query, transport| {
        let mut forged = answer(query, 3600, &[[203, 0, 113, 1]]);
        let lower = query.queries[0].name().to_lowercase();
        forged.queries[0].set_name(lower);
        match transport {
            Transport::Udp => vec![forged, answer(query, 3600, &[[192, 0, 2, 1]])],
            Transport::Tcp => vec![answer(query, 3600, &[[192, 0, 2, 1]])],
        }
    })
    .await;
    let dns = dns(&[upstream.addr]);
    for number in 0..3 {
        let answer = ask_a(&dns, &format!("a-name-with-many-letters-{number}.example")).await;
        assert_eq!(addresses(&answer), [Ipv4Addr::new(192, 0, 2, 1)]);
    }
    // And it teaches nothing: the case is random as before.
    assert!(upstream.asked().iter().all(|(query, _)| is_mixed(query)));
}
