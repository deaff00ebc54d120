//! Names of others: cache, stale answers, sharing, bounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use hickory_proto::rr::rdata::{CNAME, TXT};
use servicekeel_core::dns::cache;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::fake::{Fake, answer, fine, negative, reply};
use super::*;
use crate::dns::UpstreamState;
use crate::dns::metrics::Outcome;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_name_of_others_is_forwarded_and_kept() {
    let upstream = Fake::new(|query, _| fine(query)).await;
    let dns = dns(&[upstream.addr]);
    let first = ask_a(&dns, "WWW.example.com").await;
    assert_eq!(code(&first), ResponseCode::NoError);
    assert!(!first.authoritative);
    assert_eq!(first.answers[0].ttl, 3600);
    sleep(SECOND + Duration::from_millis(100)).await;
    let second = ask_a(&dns, "www.EXAMPLE.com").await;
    assert_eq!(second.answers, first.answers);
    assert_eq!(second.answers[0].ttl, 3599, "a TTL loses its age");
    assert!(second.answers[0].name.eq_case(&name("www.EXAMPLE.com")));
    assert_eq!(upstream.asked().len(), 1);
    assert_eq!([Outcome::Forwarded, Outcome::Cached].map(|outcome| dns.metrics.counted(outcome)), [1, 1]);
    assert_eq!(dns.status().cache_entries, 1);
}

#[tokio::test]
async fn what_a_client_wants_reaches_the_upstream() {
    let upstream = Fake::new(|query, _| {
        let mut answer = answer(query, 3600, &[[192, 0, 2, 1]]);
        answer.metadata.authentic_data = !query.checking_disabled;
        vec![answer]
    })
    .await;
    let dns = dns(&[upstream.addr]);
    let mut asked = 0;
    for recursion in [true, false] {
        for no_checking in [true, false] {
            for signatures in [true, false] {
                let mut query = with_edns(query("example.com", RecordType::A), 4096);
                query.metadata.recursion_desired = recursion;
                query.metadata.checking_disabled = no_checking;
                query.edns.as_mut().unwrap().set_dnssec_ok(signatures);
                for _ in 0..2 {
                    let answer = ask(&dns, &query).await;
                    assert_eq!(answer.authentic_data, signatures && !no_checking);
                    assert_eq!(answer.checking_disabled, no_checking);
                }
                // Without DO, AD asks for AD (RFC 6840 §5.7).
                query.metadata.authentic_data = true;
                assert_eq!(ask(&dns, &query).await.authentic_data, !no_checking);
                asked += 1;
                let (last, _) = upstream.asked().pop().unwrap();
                assert_eq!(upstream.asked().len(), asked, "kept apart, and kept");
                assert_ne!(last.id, query.id);
                assert_eq!(last.recursion_desired, recursion);
                assert_eq!(last.checking_disabled, no_checking);
                let edns = last.edns.unwrap();
                assert_eq!((edns.flags().dnssec_ok, edns.max_payload()), (signatures, 1232));
            }
        }
    }
    ask(&dns, &query("example.com", RecordType::AAAA)).await;
    assert_eq!(upstream.asked().len(), asked + 1);
}

#[tokio::test]
async fn negative_answers_are_kept_as_their_soa_says() {
    let upstream = Fake::new(|query, _| {
        // It came in a random case.
        let text = query.queries[0].name().to_lowercase().to_string();
        vec![match text.split('.').next().unwrap() {
            "gone" => negative(query, ResponseCode::NXDomain, 60),
            "empty" => negative(query, ResponseCode::NoError, 60),
            "brief" => negative(query, ResponseCode::NXDomain, 0),
            "alias" => {
                let mut answer = negative(query, ResponseCode::NXDomain, 60);
                let owner = query.queries[0].name().clone();
                let alias = RData::CNAME(CNAME(name("gone.example")));
                answer.add_answer(Record::from_rdata(owner, 0, alias));
                answer
            }
            _ => reply(query, ResponseCode::NXDomain),
        }]
    })
    .await;
    let dns = dns(&[upstream.addr]);
    let mut asked = 0;
    for (text, expected, kept) in [
        ("gone.example.com", ResponseCode::NXDomain, true),
        ("empty.example.com", ResponseCode::NoError, true),
        ("brief.example.com", ResponseCode::NXDomain, false),
        ("alias.example.com", ResponseCode::NXDomain, false),
        ("bare.example.com", ResponseCode::NXDomain, false),
    ] {
        for _ in 0..2 {
            let answer = ask_a(&dns, text).await;
            assert_eq!(code(&answer), expected, "{text}");
            assert!(!answer.authoritative);
        }
        asked += if kept { 1 } else { 2 };
        assert_eq!(upstream.asked().len(), asked, "{text}");
    }
}

#[tokio::test]
async fn names_above_ours_exist() {
    let upstream = Fake::new(|query, _| vec![negative(query, ResponseCode::NXDomain, 60)]).await;
    let dns = dns(&[upstream.addr]);
    for above in ["default", "svc", "cluster-b.local", "svc.cluster-b.local", "local", "0.127.in-addr.arpa"] {
        // From the upstream, then from the cache.
        for _ in 0..2 {
            let answer = ask_a(&dns, above).await;
            assert_eq!(code(&answer), ResponseCode::NoError, "{above}");
            assert!(answer.answers.is_empty() && answer.authorities.len() == 1);
        }
    }
    for beside in ["other.default", "example.com", "cluster-c.local"] {
        assert_eq!(code(&ask_a(&dns, beside).await), ResponseCode::NXDomain, "{beside}");
    }
    // What is kept is what the upstream said: another zone, another answer.
    dns.set_zone(zone_of("cluster-c.local"));
    assert_eq!(code(&ask_a(&dns, "cluster-b.local").await), ResponseCode::NXDomain);
    assert_eq!(code(&ask_a(&dns, "cluster-c.local").await), ResponseCode::NoError);
}

#[tokio::test]
async fn a_dead_upstream_leaves_stale_answers() {
    let upstream = Fake::new(|query, _| match query.queries[0].name().num_labels() {
        2 => {
            let mut answer = answer(query, 1, &[[192, 0, 2, 1]]);
            answer.metadata.authentic_data = true;
            vec![answer]
        }
        _ => vec![negative(query, ResponseCode::NXDomain, 1)],
    })
    .await;
    let dns = dns(&[upstream.addr]);
    let query = |text| {
        let mut query = with_edns(query(text, RecordType::A), 1232);
        query.metadata.authentic_data = true;
        query
    };
    ask(&dns, &query("example.com")).await;
    ask(&dns, &query("gone.example.com")).await;
    drop(upstream);
    let fresh = ask(&dns, &query("example.com")).await;
    assert_eq!((code(&fresh), explanation(&fresh)), (ResponseCode::NoError, None));
    assert!(fresh.authentic_data);
    sleep(SECOND + Duration::from_millis(100)).await;

    let started = Instant::now();
    for _ in 0..3 {
        let stale = ask(&dns, &query("example.com")).await;
        assert_eq!(addresses(&stale), [Ipv4Addr::new(192, 0, 2, 1)]);
        assert_eq!(stale.answers[0].ttl, cache::STALE_TTL_SECONDS);
        assert_eq!((code(&stale), explanation(&stale)), (ResponseCode::NoError, Some(3)));
        assert!(!stale.authentic_data, "nobody vouches for it any more");
    }
    let stale = ask(&dns, &query("gone.example.com")).await;
    assert_eq!((code(&stale), explanation(&stale)), (ResponseCode::NXDomain, Some(19)));
    // The kernel says that nobody is there; no query waits for longer than that.
    assert!(started.elapsed() < 2 * limits().patience, "{:?}", started.elapsed());

    let unknown = ask(&dns, &query("other.example")).await;
    assert_eq!((code(&unknown), explanation(&unknown)), (ResponseCode::ServFail, Some(22)));
    assert_eq!(dns.metrics.counted(Outcome::Stale), 4);
    assert!(dns.metrics.upstream_failures.get() > 0);
}

#[tokio::test]
async fn a_stale_answer_does_not_wait_and_the_question_goes_on() {
    let silent = Arc::new(AtomicBool::new(false));
    let upstream = Fake::new({
        let silent = silent.clone();
        move |query, _| {
            if silent.load(Ordering::SeqCst) { vec![] } else { vec![answer(query, 1, &[[192, 0, 2, 1]])] }
        }
    })
    .await;
    let dns = dns(&[upstream.addr]);
    ask_a(&dns, "example.com").await;
    sleep(SECOND + Duration::from_millis(100)).await;
    silent.store(true, Ordering::SeqCst);
    let started = Instant::now();
    let stale = ask_a(&dns, "example.com").await;
    assert_eq!(stale.answers[0].ttl, cache::STALE_TTL_SECONDS);
    assert!((limits().patience..limits().all_tries).contains(&started.elapsed()), "{:?}", started.elapsed());
    // It answers again before the tries have ended, and nobody asks in between.
    silent.store(false, Ordering::SeqCst);
    while dns.status().under_way > 0 {
        sleep(Duration::from_millis(10)).await;
    }
    let asked = upstream.asked().len();
    let fresh = ask_a(&dns, "example.com").await;
    assert_eq!(fresh.answers[0].ttl, 1);
    assert_eq!(upstream.asked().len(), asked);
    assert_eq!(dns.metrics.counted(Outcome::Cached), 1);
}

#[tokio::test]
async fn a_failure_is_not_asked_again_for_a_moment() {
    let upstream = Fake::new(|query, _| vec![reply(query, ResponseCode::ServFail)]).await;
    let dns = dns(&[upstream.addr]);
    for _ in 0..3 {
        assert_eq!(code(&ask_a(&dns, "example.com").await), ResponseCode::ServFail);
    }
    // Once with EDNS and once without: nothing is known of the upstream yet.
    assert_eq!(upstream.asked().len(), 2);
    sleep(SECOND + Duration::from_millis(100)).await;
    assert_eq!(code(&ask_a(&dns, "example.com").await), ResponseCode::ServFail);
    assert_eq!(upstream.asked().len(), 4);
    assert_eq!(dns.status().cache_entries, 0, "failures push no answers out");
}

#[tokio::test]
async fn clients_that_ask_the_same_share_a_question() {
    let upstream = Fake::new(|query, _| fine(query)).await;
    let dns = dns(&[upstream.addr]);
    let mut clients = JoinSet::new();
    for _ in 0..100 {
        let dns = dns.clone();
        clients.spawn(async move { addresses(&ask_a(&dns, "example.com").await).len() });
    }
    assert_eq!(clients.join_all().await, [1; 100]);
    assert_eq!(upstream.asked().len(), 1);
}

#[tokio::test]
async fn questions_and_clients_are_bounded() {
    let upstream = Fake::new(|_, _| vec![]).await;
    let bounded = |under_way, waiting| {
        let dns = Dns::new(vec![upstream.addr], Limits { under_way, waiting, ..limits() });
        dns.set_zone(zone_of("cluster-b.local"));
        dns
    };
    for (dns, names) in [
        (bounded(4, 100), (0..10).map(|i| format!("n{i}.example")).collect::<Vec<_>>()),
        (bounded(100, 4), vec!["n.example".to_owned(); 10]),
    ] {
        let mut clients = JoinSet::new();
        for text in names {
            let dns = dns.clone();
            clients.spawn(async move {
                let answer = ask(&dns, &with_edns(query(&text, RecordType::A), 1232)).await;
                assert_eq!(code(&answer), ResponseCode::ServFail);
                explanation(&answer)
            });
        }
        let mut outcomes = Vec::new();
        while let Some(outcome) = clients.join_next().await {
            outcomes.push(outcome.unwrap());
        }
        let (busy, silent) = outcomes.split_at(6);
        assert_eq!(busy, [Some(0); 6], "beyond the bound they hear so first");
        assert_eq!(silent, [Some(22); 4]);
        assert_eq!(dns.status().under_way, 0);
        // Names of ours do not wait behind them.
        assert_eq!(addresses(&ask_a(&dns, "simple-server").await), [OWN]);
    }
}

/// Names whose servers are slow hold all places; who asks for another is answered, and the oldest of them hears so.
#[tokio::test]
async fn slow_names_do_not_keep_others_out() {
    let upstream = Fake::new(|query, _| {
        let slow = query.queries[0].name().to_lowercase().to_string().starts_with("slow");
        if slow { vec![] } else { fine(query) }
    })
    .await;
    let one_try = 5 * SECOND;
    for (under_way, waiting) in [(8, 100), (100, 8)] {
        let dns = dns_within(
            &[upstream.addr],
            Limits { under_way, waiting, one_try, all_tries: one_try, ..limits() },
        );
        let mut clients = JoinSet::new();
        for i in 0..8 {
            let dns = dns.clone();
            clients.spawn(async move { (i, code(&ask_a(&dns, &format!("slow{i}.example")).await)) });
            tokio::task::yield_now().await;
        }
        let started = Instant::now();
        for i in 0..3 {
            assert_eq!(addresses(&ask_a(&dns, &format!("n{i}.example")).await).len(), 1);
        }
        assert!(started.elapsed() < SECOND, "{:?}", started.elapsed());
        // Others' places are free again once they have their answers: one had to go for all three.
        assert_eq!(clients.join_next().await.unwrap().unwrap(), (0, ResponseCode::ServFail));
        assert_eq!(clients.len(), 7);
        assert!(clients.try_join_next().is_none());
    }
}

/// A resolver tries a name under each of its domains. Where all upstreams refuse, none of these takes time.
#[tokio::test]
async fn a_refusal_is_an_answer() {
    let gone = [Fake::new(|_, _| vec![]).await.addr, Fake::new(|_, _| vec![]).await.addr];
    let refusing = Fake::new(|query, _| vec![reply(query, ResponseCode::Refused)]).await;
    for upstreams in [&gone[..], &[refusing.addr], &[gone[0], refusing.addr]] {
        let dns = dns_within(upstreams, Limits::default());
        let started = Instant::now();
        for text in
            ["a.example", "a.default.svc.example", "a.svc.example", "a.cluster.example", "a.b.example"]
        {
            // Both at once, as getaddrinfo(3) does.
            let (a, aaaa) = (query(text, RecordType::A), query(text, RecordType::AAAA));
            for answer in <[Message; 2]>::from(tokio::join!(ask(&dns, &a), ask(&dns, &aaaa))) {
                assert!(matches!(code(&answer), ResponseCode::ServFail | ResponseCode::Refused));
            }
        }
        assert!(started.elapsed() < Duration::from_millis(300), "{upstreams:?}: {:?}", started.elapsed());
    }
    // One that refuses is not asked again for a moment; the next one is, at once.
    let good = Fake::new(|query, _| fine(query)).await;
    let dns = dns_within(&[gone[0], good.addr], Limits::default());
    let started = Instant::now();
    for i in 0..5 {
        assert_eq!(addresses(&ask_a(&dns, &format!("n{i}.example")).await).len(), 1);
    }
    assert!(started.elapsed() < Duration::from_millis(300), "{:?}", started.elapsed());
    assert_eq!(dns.status().upstreams[0].state, UpstreamState::Refusing);
    assert_eq!(dns.metrics.upstream_failures.get(), 1);
}

#[tokio::test]
async fn the_cache_is_bounded() {
    let serial = AtomicU32::new(0);
    let upstream = Fake::new(move |query, _| {
        let mut answer = reply(query, ResponseCode::NoError);
        let text = format!("{:0200}", serial.fetch_add(1, Ordering::SeqCst));
        let owner = query.queries[0].name().clone();
        answer.add_answer(Record::from_rdata(owner, 3600, RData::TXT(TXT::new(vec![text]))));
        vec![answer]
    })
    .await;
    for cache in [cache::Limits { entries: 8, bytes: 1 << 20 }, cache::Limits { entries: 1000, bytes: 8192 }]
    {
        let dns = Dns::new(vec![upstream.addr], Limits { cache, ..limits() });
        dns.set_zone(zone_of("cluster-b.local"));
        for i in 0..40 {
            let answer = ask(&dns, &query(&format!("n{i}.example"), RecordType::TXT)).await;
            assert_eq!(answer.answers.len(), 1);
            let status = dns.status();
            assert!(status.cache_entries <= cache.entries && status.cache_bytes <= cache.bytes);
        }
        assert!((8..20).contains(&dns.status().cache_entries), "{:?}", dns.status());
    }
}

#[tokio::test]
async fn what_is_under_way_ends_with_the_server() {
    let upstream = Fake::new(|_, _| vec![]).await;
    let dns =
        Dns::new(vec![upstream.addr], Limits { all_tries: 60 * SECOND, one_try: 60 * SECOND, ..limits() });
    dns.set_zone(zone_of("cluster-b.local"));
    let memory = Arc::downgrade(&dns.foreign);
    let query = query("example.com", RecordType::A).to_vec().unwrap();
    let asking = dns.answer(&query, CLIENT, Transport::Udp);
    assert!(tokio::time::timeout(Duration::from_millis(100), asking).await.is_err());
    assert_eq!(dns.status().under_way, 1, "the question outlives the client");
    drop(dns);
    assert!(memory.upgrade().is_none());
}
