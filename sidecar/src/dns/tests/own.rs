//! Names of ours, and what no query may do.

use hickory_proto::op::{OpCode, Query};
use hickory_proto::rr::DNSClass;
use servicekeel_core::dns::TTL_SECONDS;

use super::*;
use crate::dns::metrics::Outcome;

const FORMS: [&str; 6] = [
    "simple-server.default.cluster-b.local",
    "simple-server.default.svc.cluster-b.local",
    "simple-server.default.svc.clusterset.local",
    "simple-server.default.svc",
    "simple-server.default",
    "simple-server",
];

/// Checks that an answer is a negative one of ours, with this apex.
fn assert_negative(answer: &Message, expected: ResponseCode, apex: &str) {
    assert_eq!(code(answer), expected);
    assert!(answer.authoritative && answer.answers.is_empty());
    let [record] = answer.authorities.as_slice() else { panic!("{:?}", answer.authorities) };
    let RData::SOA(soa) = &record.data else { panic!("{record}") };
    assert!(record.name.eq_case(&name(apex)), "{} for {apex}", record.name);
    assert_eq!((record.ttl, soa.minimum), (TTL_SECONDS, TTL_SECONDS));
}

#[tokio::test]
async fn every_form_and_type() {
    let dns = dns(&[]);
    for form in FORMS {
        for asked in
            [form.to_owned(), format!("{form}.corp.example"), format!("{form}.default.svc.cluster-a.local")]
        {
            for qtype in [RecordType::A, RecordType::ANY] {
                let answer = ask(&dns, &query(&asked, qtype)).await;
                assert_eq!(code(&answer), ResponseCode::NoError, "{asked}");
                assert!(answer.authoritative && !answer.truncation && !answer.authentic_data);
                assert_eq!(answer.answers, [a_record(&name(&asked), TTL_SECONDS, OWN)], "{asked}");
                assert_eq!(answer.answers[0].ttl, TTL_SECONDS);
                assert!(answer.authorities.is_empty() && answer.additionals.is_empty());
            }
            for qtype in [28, 65, 64, 33, 12, 16, 15, 2, 6, 5, 43, 48, 257, 0, 4711].map(RecordType::from) {
                assert_negative(&ask(&dns, &query(&asked, qtype)).await, ResponseCode::NoError, &asked);
            }
        }
    }
    assert_eq!(dns.metrics.counted(Outcome::Own), 36);
    assert_eq!(dns.metrics.counted(Outcome::OwnNegative), 270);
}

#[tokio::test]
async fn ports_and_addresses() {
    let dns = dns(&[]);
    let answer = ask(&dns, &query("_http._tcp.simple-server", RecordType::SRV)).await;
    let [record] = answer.answers.as_slice() else { panic!("{answer}") };
    let RData::SRV(srv) = &record.data else { panic!("{record}") };
    let target = name("simple-server.default.svc.cluster-b.local");
    assert_eq!((srv.port, &srv.target, record.ttl), (8080, &target, TTL_SECONDS));
    assert_eq!(answer.additionals, [a_record(&target, TTL_SECONDS, OWN)]);
    assert!(answer.authoritative);

    let answer = ask(&dns, &query("2.66.0.127.in-addr.arpa", RecordType::PTR)).await;
    let [record] = answer.answers.as_slice() else { panic!("{answer}") };
    let RData::PTR(ptr) = &record.data else { panic!("{record}") };
    assert_eq!(ptr.0, target);

    for (asked, qtype, expected, apex) in [
        ("_http._tcp.simple-server", RecordType::A, ResponseCode::NoError, "simple-server"),
        ("_tcp.simple-server", RecordType::SRV, ResponseCode::NoError, "simple-server"),
        ("_http._udp.simple-server", RecordType::SRV, ResponseCode::NXDomain, "simple-server"),
        (
            "_9090._tcp.simple-server.default",
            RecordType::SRV,
            ResponseCode::NXDomain,
            "simple-server.default",
        ),
        ("2.66.0.127.in-addr.arpa", RecordType::A, ResponseCode::NoError, "66.0.127.in-addr.arpa"),
        ("3.66.0.127.in-addr.arpa", RecordType::PTR, ResponseCode::NXDomain, "66.0.127.in-addr.arpa"),
    ] {
        assert_negative(&ask(&dns, &query(asked, qtype)).await, expected, apex);
    }
}

#[tokio::test]
async fn the_case_is_kept() {
    let dns = dns(&[]);
    let asked = "SiMpLe-SeRvEr.DEFAULT.svc.cLuStEr-b.local";
    let answer = ask_a(&dns, asked).await;
    assert!(answer.answers[0].name.eq_case(&name(asked)));
    let answer = ask(&dns, &query(asked, RecordType::AAAA)).await;
    assert_negative(&answer, ResponseCode::NoError, asked);
    let answer = ask(&dns, &query("_HTTP._TCP.Simple-Server", RecordType::SRV)).await;
    assert!(answer.answers[0].name.eq_case(&name("_HTTP._TCP.Simple-Server")));
}

#[tokio::test]
async fn edns() {
    let dns = dns(&[]);
    for (offered, expected) in [(0, 512), (512, 512), (1232, 1232), (4096, 4096), (65535, 4096)] {
        let mut query = with_edns(query("simple-server", RecordType::A), 512);
        // The setter would raise it.
        let packet = {
            let mut packet = query.to_vec().unwrap();
            let at = packet.len() - 8;
            packet[at..at + 2].copy_from_slice(&u16::to_be_bytes(offered));
            packet
        };
        let answer = dns.answer(&packet, CLIENT, Transport::Udp).await.unwrap();
        let edns = Message::from_vec(&answer).unwrap().edns.unwrap();
        assert_eq!((edns.version(), edns.max_payload(), edns.flags().dnssec_ok), (0, expected, false));

        query.edns.as_mut().unwrap().set_dnssec_ok(true);
        assert!(ask(&dns, &query).await.edns.unwrap().flags().dnssec_ok);
    }
    let mut other_version = with_edns(query("simple-server", RecordType::A), 1232);
    other_version.edns.as_mut().unwrap().set_version(1);
    let answer = ask(&dns, &other_version).await;
    // BADVERS; as a number, since BADSIG has the same.
    assert_eq!(u16::from(code(&answer)), 16);
    assert_eq!(answer.edns.unwrap().version(), 0);
    assert!(answer.answers.is_empty());
}

#[tokio::test]
async fn what_does_not_fit_is_truncated() {
    let label = "c".repeat(63);
    let cluster = format!("{label}.{label}.{label}.{}", "d".repeat(22));
    let dns = Dns::new(vec![], limits());
    dns.set_zone(zone_of(&cluster));
    let query = query(&format!("_http._tcp.simple-server.default.{cluster}"), RecordType::SRV);

    for query in [query.clone(), with_edns(query.clone(), 512)] {
        let answer = ask(&dns, &query).await;
        assert!(answer.truncation && answer.authoritative);
        assert!(answer.answers.is_empty() && answer.additionals.is_empty());
    }
    for (query, transport) in
        [(with_edns(query.clone(), 1232), Transport::Udp), (query.clone(), Transport::Tcp)]
    {
        let answer = ask_over(&dns, &query, transport).await;
        assert!(!answer.truncation);
        assert_eq!((answer.answers.len(), answer.additionals.len()), (1, 1));
    }
}

#[tokio::test]
async fn what_is_not_done_is_refused() {
    let dns = dns(&[]);
    for class in [DNSClass::CH, DNSClass::HS, DNSClass::ANY, DNSClass::NONE, DNSClass::Unknown(77)] {
        let mut query = query("simple-server", RecordType::A);
        query.queries[0].set_query_class(class);
        assert_eq!(code(&ask(&dns, &query).await), ResponseCode::Refused, "{class}");
    }
    for qtype in [RecordType::AXFR, RecordType::IXFR, RecordType::OPT, RecordType::from(250)] {
        let answer = ask_over(&dns, &query("simple-server", qtype), Transport::Tcp).await;
        assert_eq!(code(&answer), ResponseCode::Refused, "{qtype}");
    }
    for opcode in [1, 2, 4, 5, 6, 15] {
        let mut query = query("simple-server", RecordType::A);
        query.metadata.op_code = OpCode::from_u8(opcode);
        let answer = ask(&dns, &query).await;
        assert_eq!((code(&answer), answer.op_code), (ResponseCode::NotImp, query.op_code));
    }
    assert_eq!(dns.metrics.counted(Outcome::Refused), 15);
}

#[tokio::test]
async fn what_is_malformed() {
    let dns = dns(&[]);
    let fine = with_edns(query("simple-server", RecordType::A), 1232);
    let packet = fine.to_vec().unwrap();
    let answer = async |packet: &[u8]| {
        let answer = dns.answer(packet, CLIENT, Transport::Udp).await?;
        Some(Message::from_vec(&answer).unwrap())
    };
    for len in 0..12 {
        assert_eq!(answer(&packet[..len]).await, None);
    }
    for len in 12..packet.len() {
        let answer = answer(&packet[..len]).await.unwrap();
        assert_eq!((code(&answer), answer.id), (ResponseCode::FormErr, fine.id), "{len} bytes");
        assert!(answer.queries.is_empty());
    }
    // Two OPT records (RFC 6891 §6.1.1).
    let mut twice = packet.clone();
    twice.extend_from_slice(&packet[packet.len() - 11..]);
    twice[11] = 2;
    assert_eq!(code(&answer(&twice).await.unwrap()), ResponseCode::FormErr);
    // No question, and two.
    let mut none = fine.clone();
    none.queries.clear();
    let mut two = fine.clone();
    two.add_query(Query::query(name("simple-server"), RecordType::AAAA));
    for query in [none, two] {
        let answer = answer(&query.to_vec().unwrap()).await.unwrap();
        assert_eq!((code(&answer), answer.id, answer.queries.len()), (ResponseCode::FormErr, query.id, 0));
    }
    // Answers of others are no queries.
    assert_eq!(answer(&fine.into_response().to_vec().unwrap()).await, None);
}

#[tokio::test]
async fn before_and_after_a_zone() {
    let dns = Dns::new(vec![], limits());
    let query = with_edns(query("simple-server", RecordType::A), 1232);
    let answer = ask(&dns, &query).await;
    assert_eq!((code(&answer), explanation(&answer)), (ResponseCode::ServFail, Some(14)));
    assert!(!dns.status().ready);
    dns.set_zone(zone_of("cluster-b.local"));
    assert_eq!(addresses(&ask(&dns, &query).await), [OWN]);
    assert!(dns.status().ready);

    let long = "simple-server.default.cluster-b.local";
    assert_eq!(code(&ask_a(&dns, long).await), ResponseCode::NoError);
    dns.set_zone(zone_of("cluster-c.local"));
    assert_eq!(code(&ask_a(&dns, long).await), ResponseCode::ServFail);
}

#[tokio::test(start_paused = true)]
async fn without_an_upstream_other_names_fail_at_once() {
    let dns = dns(&[]);
    let started = tokio::time::Instant::now();
    for other in ["example.com", ".", "a_b.example", "x.simple-server.default"] {
        let query = with_edns(query(other, RecordType::A), 1232);
        let answer = ask(&dns, &query).await;
        assert_eq!((code(&answer), explanation(&answer)), (ResponseCode::ServFail, Some(0)), "{other}");
    }
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert_eq!(dns.metrics.counted(Outcome::Failed), 4);
}
