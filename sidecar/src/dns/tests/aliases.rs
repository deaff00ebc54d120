//! Aliases that lead to names of ours, and names that both we and the upstreams have.

use std::time::Instant;

use hickory_proto::rr::rdata::CNAME;

use super::fake::{Fake, fine, negative, reply};
use super::*;
use crate::dns::metrics::Outcome;

/// A response that leads from the name that was asked for along these.
fn chain(query: &Message, code: ResponseCode, targets: &[&str]) -> Message {
    let mut answer = match code {
        ResponseCode::NXDomain => negative(query, code, 60),
        code => reply(query, code),
    };
    let mut owner = query.queries[0].name().clone();
    for target in targets {
        let target = name(target);
        answer.add_answer(Record::from_rdata(owner, 300, RData::CNAME(CNAME(target.clone()))));
        owner = target;
    }
    answer
}

const OURS: &str = "Simple-Server.default.svc.cluster-b.local";

#[tokio::test]
async fn an_alias_to_a_name_of_ours_is_followed() {
    for code_said in [ResponseCode::NoError, ResponseCode::NXDomain] {
        for hops in [&[OURS][..], &["one.example", "two.example", OURS]] {
            let upstream = Fake::new(move |query, _| vec![chain(query, code_said, hops)]).await;
            let dns = dns(&[upstream.addr]);
            // From the upstream, then from the cache where it is kept.
            for _ in 0..2 {
                let answer = ask_a(&dns, "Shop.example.com").await;
                assert_eq!(code(&answer), ResponseCode::NoError);
                assert!(!answer.authoritative);
                assert_eq!(answer.answers.len(), hops.len() + 1);
                assert!(answer.answers[0].name.eq_case(&name("Shop.example.com")));
                for (record, target) in answer.answers.iter().zip(hops) {
                    let RData::CNAME(alias) = &record.data else { panic!("{record}") };
                    assert!(alias.0.eq_case(&name(target)));
                }
                let last = answer.answers.last().unwrap();
                assert_eq!(last, &a_record(&name(OURS), 5, OWN));
                assert!(answer.authorities.is_empty(), "what the upstream said of it is void");

                let answer = ask(&dns, &query("shop.example.com", RecordType::AAAA)).await;
                assert_eq!((code(&answer), answer.answers.len()), (ResponseCode::NoError, hops.len()));
                let [soa] = answer.authorities.as_slice() else { panic!("{answer}") };
                assert!(matches!(soa.data, RData::SOA(_)) && soa.name == name(OURS));
            }
        }
    }
}

#[tokio::test]
async fn an_alias_that_is_asked_for_is_not_followed() {
    let upstream = Fake::new(|query, _| vec![chain(query, ResponseCode::NoError, &[OURS])]).await;
    let answer = ask(&dns(&[upstream.addr]), &query("shop.example.com", RecordType::CNAME)).await;
    assert_eq!(answer.answers.len(), 1);
    assert!(matches!(answer.answers[0].data, RData::CNAME(_)));
}

#[tokio::test]
async fn an_alias_that_is_asked_for_is_there_whatever_the_upstream_says_of_its_target() {
    let upstream = Fake::new(|query, _| vec![chain(query, ResponseCode::NXDomain, &[OURS])]).await;
    let dns = dns(&[upstream.addr]);
    for rtype in [RecordType::CNAME, RecordType::ANY] {
        let answer = ask(&dns, &query("shop.example.com", rtype)).await;
        assert_eq!((code(&answer), answer.answers.len()), (ResponseCode::NoError, 1), "{rtype}");
    }
}

#[tokio::test]
async fn a_chain_that_goes_round_ends() {
    let upstream = Fake::new(|query, _| {
        vec![chain(query, ResponseCode::NoError, &["a.example", "b.example", "a.example", "b.example"])]
    })
    .await;
    let answer = ask_a(&dns(&[upstream.addr]), "shop.example.com").await;
    assert_eq!((code(&answer), answer.answers.len()), (ResponseCode::NoError, 4), "it is passed on as it is");
}

const PUBLIC: &str = "simple-server.corp.example";

#[tokio::test]
async fn a_public_name_under_another_search_domain_is_the_publics() {
    let upstream = Fake::new(|query, _| fine(query)).await;
    let public = dns(&[upstream.addr]);
    assert_eq!(addresses(&ask_a(&public, PUBLIC).await), [Ipv4Addr::new(192, 0, 2, 1)]);
    assert_eq!(public.metrics.counted(Outcome::Forwarded), 1);
    // A name that exists without such a record exists, too.
    let upstream = Fake::new(|query, _| vec![negative(query, ResponseCode::NoError, 60)]).await;
    let empty = ask_a(&dns(&[upstream.addr]), PUBLIC).await;
    assert_eq!((code(&empty), empty.answers.len()), (ResponseCode::NoError, 0));
    // Under the cluster's own domains nobody is asked.
    let upstream = Fake::new(|query, _| fine(query)).await;
    let own = dns(&[upstream.addr]);
    for text in ["simple-server", "simple-server.default", "simple-server.default.svc.cluster-a.local"] {
        assert_eq!(addresses(&ask_a(&own, text).await), [OWN], "{text}");
    }
    assert!(upstream.asked().is_empty());
}

#[tokio::test]
async fn where_the_public_has_no_such_name_it_is_ours() {
    let upstream = Fake::new(|query, _| vec![negative(query, ResponseCode::NXDomain, 60)]).await;
    let dns = dns(&[upstream.addr]);
    for _ in 0..2 {
        let answer = ask_a(&dns, PUBLIC).await;
        assert_eq!(addresses(&answer), [OWN]);
        assert!(answer.authoritative);
        let answer = ask(&dns, &query(PUBLIC, RecordType::AAAA)).await;
        assert_eq!((code(&answer), answer.authorities.len()), (ResponseCode::NoError, 1));
        let answer = ask(&dns, &query(&format!("_http._tcp.{PUBLIC}"), RecordType::SRV)).await;
        assert_eq!(answer.answers.len(), 1);
    }
    assert_eq!(upstream.asked().len(), 3, "what the upstream says is kept");
    assert_eq!(code(&ask_a(&dns, "other.corp.example").await), ResponseCode::NXDomain);
}

#[tokio::test]
async fn offline_it_is_ours_soon() {
    let silent = Fake::new(|_, _| vec![]).await;
    let gone = Fake::new(|_, _| vec![]).await.addr;
    let failing = Fake::new(|query, _| vec![reply(query, ResponseCode::ServFail)]).await;
    for upstreams in [&[][..], &[silent.addr], &[gone], &[failing.addr]] {
        let started = Instant::now();
        assert_eq!(addresses(&ask_a(&dns(upstreams), PUBLIC).await), [OWN], "{upstreams:?}");
        assert!(started.elapsed() < limits().patience * 2, "{upstreams:?}: {:?}", started.elapsed());
    }
}
