//! Answers that are passed on as they are, whatever is in them.

use super::fake::{Fake, answer, fine, reply};
use super::*;

/// A response's bytes: the query's question, and these records.
fn response(query: &[u8], records: [&[&[u8]]; 3]) -> Vec<u8> {
    let end = question_end(query);
    let mut packet = query[..end].to_vec();
    packet[2] |= 0x80;
    packet[3] = 0x80;
    for (at, section) in records.iter().enumerate() {
        packet[6 + 2 * at..8 + 2 * at].copy_from_slice(&(section.len() as u16).to_be_bytes());
        packet.extend(section.concat());
    }
    packet
}

fn question_end(query: &[u8]) -> usize {
    12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5
}

/// A record of the name that was asked for, kept for an hour.
fn record(rtype: u16, data: &[u8]) -> Vec<u8> {
    let mut record = vec![0xc0, 12];
    record.extend(rtype.to_be_bytes());
    record.extend([0, 1]);
    record.extend(3600u32.to_be_bytes());
    record.extend((data.len() as u16).to_be_bytes());
    record.extend(data);
    record
}

/// An OPT record.
fn opt(options: &[u8]) -> Vec<u8> {
    let mut record = vec![0, 0, 41, 4, 208, 0, 0, 0, 0];
    record.extend((options.len() as u16).to_be_bytes());
    record.extend(options);
    record
}

const A: [u8; 4] = [192, 0, 2, 1];

/// Records by section.
type Sections = [Vec<Vec<u8>>; 3];

/// What a parser of ours could stumble over, and a client does not: (what, its type, its sections).
fn specimens() -> Vec<(&'static str, u16, Sections)> {
    let a = || record(1, &A);
    let https = |data: &[u8]| record(65, data);
    vec![
        ("an OPT record in the answer section", 1, [vec![opt(&[]), a()], vec![], vec![]]),
        ("two OPT records", 1, [vec![a()], vec![], vec![opt(&[]), opt(&[])]]),
        ("a malformed client subnet", 1, [vec![a()], vec![], vec![opt(&[0, 8, 0, 1, 7])]]),
        ("an option that is longer than its record", 1, [vec![a()], vec![], vec![opt(&[0, 10, 0, 99, 7])]]),
        ("an empty TXT record", 16, [vec![record(16, &[])], vec![], vec![]]),
        (
            "HTTPS parameters out of order",
            65,
            [vec![https(&[0, 1, 0, 0, 3, 0, 2, 1, 187, 0, 1, 0, 3, 2, b'h', b'2'])], vec![], vec![]],
        ),
        ("an empty alpn", 65, [vec![https(&[0, 1, 0, 0, 1, 0, 0])], vec![], vec![]]),
        ("a short CERT record", 37, [vec![record(37, &[0, 1])], vec![], vec![]]),
        (
            "a NAPTR flag that is no letter",
            35,
            [vec![record(35, &[0, 1, 0, 1, 2, b'S', b'!', 0, 0, 0])], vec![], vec![]],
        ),
        ("an A record of five bytes", 1, [vec![record(1, &[192, 0, 2, 1, 9])], vec![], vec![]]),
        ("a type that nobody knows", 4711, [vec![record(4711, b"anything")], vec![], vec![]]),
        (
            "another class",
            1,
            [
                vec![{
                    let mut a = a();
                    a[5] = 3;
                    a
                }],
                vec![],
                vec![],
            ],
        ),
    ]
}

#[tokio::test]
async fn what_is_not_understood_is_passed_on() {
    for (what, qtype, sections) in specimens() {
        let kept: Sections = sections.clone().map(|section| {
            // OPT records are between us and the upstream.
            section.into_iter().filter(|record| record[..3] != [0, 0, 41]).collect()
        });
        let upstream = Fake::raw(move |query, _| {
            let sections: [Vec<&[u8]>; 3] =
                sections.each_ref().map(|s| s.iter().map(Vec::as_slice).collect());
            vec![response(query, sections.each_ref().map(Vec::as_slice))]
        })
        .await;
        let dns = dns(&[upstream.addr]);
        for edns in [false, true] {
            let mut query = query("Www.Example.com", RecordType::from(qtype));
            if edns {
                query = with_edns(query, 1232);
            }
            let query = query.to_vec().unwrap();
            let said = dns.answer(&query, CLIENT, Transport::Udp).await.unwrap();
            let sections: [Vec<&[u8]>; 3] = kept.each_ref().map(|s| s.iter().map(Vec::as_slice).collect());
            let mut expected = response(&query, sections.each_ref().map(Vec::as_slice));
            if edns {
                expected[11] += 1;
                expected.extend(opt(&[]));
            }
            assert_eq!(said, expected, "{what}");
        }
    }
}

/// Bytes that are taken out move what stands behind them, and so the pointers that lead there.
#[tokio::test]
async fn names_keep_their_meaning_where_an_opt_record_goes() {
    let upstream = Fake::raw(|query, _| {
        let at = question_end(query) + opt(&[]).len();
        // The alias is spelled out behind the OPT record, and pointed to.
        let alias = record(5, b"\x03cdn\x07example\x03net\x00");
        let target = at + 12;
        let mut address = record(1, &A);
        address[..2].copy_from_slice(&(0xc000 | target as u16).to_be_bytes());
        let mx = [&record(15, &[])[..10], &[0, 4, 0, 10, 0xc0, target as u8]].concat();
        vec![response(query, [&[&opt(&[]), &alias, &address, &mx], &[], &[]])]
    })
    .await;
    let answer = ask_a(&dns(&[upstream.addr]), "www.example.com").await;
    let said: Vec<String> =
        answer.answers.iter().map(|record| format!("{} {}", record.name, record.data)).collect();
    assert_eq!(
        said,
        [
            "www.example.com. cdn.example.net.",
            "cdn.example.net. 192.0.2.1",
            "www.example.com. 10 cdn.example.net."
        ]
    );
}

/// A name that is spelled out again gets the client's case, too: the upstream was asked in another.
#[tokio::test]
async fn the_case_that_was_asked_in_comes_back() {
    let upstream = Fake::raw(|query, _| {
        let name = &query[12..question_end(query) - 4];
        let spelled = [name, &record(1, &A)[2..]].concat();
        vec![response(query, [&[&spelled], &[], &[]])]
    })
    .await;
    let dns = dns(&[upstream.addr]);
    for text in ["WWW.example.COM", "www.example.com", "wWw.Example.com"] {
        let answer = ask_a(&dns, text).await;
        assert!(answer.answers[0].name.eq_case(&name(text)), "{}", answer.answers[0].name);
    }
    assert_eq!(upstream.asked().len(), 1, "the first one is kept");
}

/// Longer than announced, by UDP.
#[tokio::test]
async fn a_long_datagram_is_an_answer() {
    let many: Vec<[u8; 4]> = (1..=100).map(|last| [192, 0, 2, last]).collect();
    let upstream = Fake::new(move |query, _| vec![answer(query, 60, &many)]).await;
    let dns = dns(&[upstream.addr]);
    let large = ask(&dns, &with_edns(query("many.example", RecordType::A), 4096)).await;
    assert_eq!((large.truncation, large.answers.len()), (false, 100));
    assert_eq!(upstream.asked().len(), 1, "nothing is missing, so TCP is not asked");
}

/// Truncated, or torn, and TCP is refused: what there is, is passed on.
#[tokio::test]
async fn what_fits_is_passed_on_where_tcp_is_refused() {
    for torn in [false, true] {
        let upstream = Fake::without_tcp(move |query, _| {
            let addresses: Vec<Vec<u8>> = (1..=20u8).map(|last| record(1, &[192, 0, 2, last])).collect();
            let addresses: Vec<&[u8]> = addresses.iter().map(Vec::as_slice).collect();
            let mut packet = response(query, [&addresses, &[], &[]]);
            if torn {
                // In the midst of the fourth.
                packet.truncate(question_end(query) + 3 * 16 + 7);
            } else {
                packet[2] |= 0x02;
            }
            vec![packet]
        })
        .await;
        let dns = dns(&[upstream.addr]);
        let answer = ask_a(&dns, "many.example").await;
        assert_eq!(
            (answer.truncation, answer.answers.len()),
            (true, if torn { 3 } else { 20 }),
            "torn: {torn}"
        );
        assert_eq!(dns.status().cache_entries, 0, "it is not kept");
        assert_eq!(dns.metrics.upstream_failures.get(), 0);
    }
}

/// What is cut is cut between records, and says so; what might only have helped goes without a word.
#[tokio::test]
async fn a_truncated_answer_keeps_what_fits() {
    let upstream = Fake::new(|query, _| {
        let mut answer = answer(query, 60, &[[192, 0, 2, 1], [192, 0, 2, 2]]);
        let helpful = name("helpful.example");
        answer.add_additionals((0..40).map(|last| a_record(&helpful, 60, [192, 0, 2, last].into())));
        vec![answer]
    })
    .await;
    let answer = ask_a(&dns(&[upstream.addr]), "example.com").await;
    assert_eq!((answer.truncation, answer.answers.len()), (false, 2));
    assert!((20..30).contains(&answer.additionals.len()), "{}", answer.additionals.len());
}

#[tokio::test]
async fn a_client_elsewhere_gets_what_passes_every_network() {
    let many: Vec<[u8; 4]> = (1..=100).map(|last| [192, 0, 2, last]).collect();
    let upstream = Fake::new(move |query, _| vec![answer(query, 60, &many)]).await;
    let dns = dns(&[upstream.addr]);
    let query = with_edns(query("many.example", RecordType::A), 4096).to_vec().unwrap();
    let from = "10.0.0.9:4000".parse().unwrap();
    let said = dns.answer(&query, from, Transport::Udp).await.unwrap();
    let answer = Message::from_vec(&said).unwrap();
    assert!(said.len() <= 1232 && answer.truncation && answer.answers.len() > 70, "{} bytes", said.len());
}

/// A client's EDNS options are not ours to read.
#[tokio::test]
async fn a_client_may_send_any_option() {
    let dns = dns(&[]);
    let mut packet = query("simple-server", RecordType::A).to_vec().unwrap();
    packet[11] = 1;
    // A client subnet of one byte, and an option that claims more than there is.
    for options in [&[0, 8, 0, 1, 7][..], &[0, 10, 0, 99, 7]] {
        let said = dns.answer(&[&packet, &opt(options)[..]].concat(), CLIENT, Transport::Udp).await.unwrap();
        assert_eq!(addresses(&Message::from_vec(&said).unwrap()), [OWN]);
    }
}

/// A code beyond four bits is about EDNS between us and the upstream.
#[tokio::test]
async fn an_extended_code_is_no_answer() {
    let upstream = Fake::new(|query, _| match query.edns {
        Some(_) => vec![reply(query, ResponseCode::BADVERS)],
        None => fine(query),
    })
    .await;
    assert_eq!(addresses(&ask_a(&dns(&[upstream.addr]), "example.com").await).len(), 1);
}
