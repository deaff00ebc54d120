use proptest::prelude::*;

use super::*;
use crate::dns::Answer;

/// Labels as a name on the wire.
fn wire(text: &str) -> Vec<u8> {
    let mut name = Vec::new();
    for label in text.split('.').filter(|label| !label.is_empty()) {
        name.push(label.len() as u8);
        name.extend(label.as_bytes());
    }
    name.push(0);
    name
}

fn query_packet(text: &str, qtype: u16) -> Vec<u8> {
    let mut packet = Header { id: 7, flags: flag::RD, counts: [1, 0, 0, 0] }.to_bytes().to_vec();
    packet.extend(wire(text));
    packet.extend(qtype.to_be_bytes());
    packet.extend(CLASS_IN.to_be_bytes());
    packet
}

fn record(owner: &[u8], rtype: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut record = owner.to_vec();
    record.extend(rtype.to_be_bytes());
    record.extend(CLASS_IN.to_be_bytes());
    record.extend(ttl.to_be_bytes());
    record.extend((data.len() as u16).to_be_bytes());
    record.extend(data);
    record
}

fn response_packet(query: &[u8], flags: u16, sections: [&[Vec<u8>]; 3]) -> Vec<u8> {
    let counts = sections.map(|section| section.len() as u16);
    let mut header = Header::read(query).unwrap();
    header.flags |= flag::QR | flags;
    header.counts = [1, counts[0], counts[1], counts[2]];
    let mut packet = query.to_vec();
    header.write(&mut packet);
    packet.extend(sections.map(|section| section.concat()).concat());
    packet
}

fn answer(packet: &[u8], sent: &[u8]) -> Response {
    match Heard::read(packet, sent) {
        Some(Heard::Answer { response, .. }) => response,
        other => panic!("{other:?}"),
    }
}

const QUESTION: [u8; 2] = [0xc0, 12];

#[test]
fn names_with_pointers() {
    let mut packet = vec![0; HEADER];
    packet.extend(wire("Example.com"));
    let at = packet.len();
    packet.extend(b"\x03www\xc0\x0c\xff");
    let (name, end) = WireName::read(&packet, at).unwrap();
    assert_eq!(format!("{name:?}"), "www.Example.com.");
    assert_eq!(end, at + 6);
    assert_eq!(name.to_name().unwrap().as_str(), "www.example.com");
    assert!(name.is(&WireName::of_text("WWW.example.COM").unwrap()));
    assert!(!name.is(&WireName::of_text("ww.example.com").unwrap()));
    assert_eq!(name::skip(&packet, at), Some(at + 6));
    // To itself, forwards, beyond the end; a label that is torn; a label type that is none.
    for bad in [&[0xc0, 0][..], &[0xc0, 2, 0], &[0xc0, 99], &[3, b'a'], &[0x40, 0], &[0xc0], &[]] {
        assert!(WireName::read(bad, 0).is_none(), "{bad:?}");
    }
    // As long as a name may be, and a byte longer.
    let longest = format!("{}{}", "a.".repeat(126), "b");
    assert_eq!(WireName::read(&wire(&longest), 0).unwrap().0.as_bytes().len(), 255);
    assert!(WireName::read(&wire(&format!("{longest}c")), 0).is_none());
    // Pointers to pointers, up to the bound.
    let mut chain = vec![0];
    for hop in 0..40u8 {
        chain.extend([0xc0, if hop == 0 { 0 } else { hop * 2 - 1 }]);
    }
    assert!(WireName::read(&chain, 31 * 2 + 1).is_some());
    assert!(WireName::read(&chain, 32 * 2 + 1).is_none());
}

#[test]
fn an_answer_is_to_its_query() {
    let sent = query_packet("Www.example.com", 1);
    let a = [record(&QUESTION, 1, 60, &[192, 0, 2, 1])];
    let fine = response_packet(&sent, 0, [&a, &[], &[]]);
    assert!(matches!(Heard::read(&fine, &sent), Some(Heard::Answer { kept_case: true, edns: false, .. })));
    let other_case = query_packet("www.example.com", 1);
    let changed = response_packet(&other_case, 0, [&a, &[], &[]]);
    assert!(matches!(Heard::read(&changed, &sent), Some(Heard::Answer { kept_case: false, .. })));
    let mut other_id = fine.clone();
    other_id[1] ^= 1;
    let mut no_response = fine.clone();
    no_response[2] &= 0x7f;
    let other_name = response_packet(&query_packet("wwx.example.com", 1), 0, [&a, &[], &[]]);
    let other_type = response_packet(&query_packet("www.example.com", 28), 0, [&a, &[], &[]]);
    let mut no_question = fine[..HEADER].to_vec();
    no_question[5] = 0;
    for lie in [&other_id, &no_response, &other_name, &other_type, &no_question, &fine[..HEADER + 3].to_vec()]
    {
        assert!(Heard::read(lie, &sent).is_none(), "{lie:02x?}");
    }
    // An error may come without a question.
    no_question[3] |= 1;
    no_question[7] = 0;
    assert!(matches!(
        Heard::read(&no_question, &sent),
        Some(Heard::Code { code: code::FORM_ERR, edns: false })
    ));
}

#[test]
fn how_long_an_answer_is_kept() {
    let sent = query_packet("example.com", 1);
    let soa = record(
        &QUESTION,
        rtype::SOA,
        900,
        &[&wire("ns")[..], &wire("root"), &[0; 16], &60u32.to_be_bytes()].concat(),
    );
    let a = |ttl| record(&QUESTION, 1, ttl, &[192, 0, 2, 1]);
    let alias = record(&QUESTION, rtype::CNAME, 30, &wire("other.example"));
    let lifetime = |flags, sections: [&[Vec<u8>]; 3]| {
        answer(&response_packet(&sent, flags, sections), &sent).lifetime(1).as_secs()
    };
    assert_eq!(lifetime(0, [&[a(300), a(60)], &[], &[]]), 60);
    assert_eq!(lifetime(0, [&[a(u32::MAX)], &[], &[]]), 0);
    assert_eq!(lifetime(flag::TC, [&[a(300)], &[], &[]]), 0, "what is truncated is not kept");
    assert_eq!(lifetime(code::NX_DOMAIN, [&[], std::slice::from_ref(&soa), &[]]), 60);
    assert_eq!(
        lifetime(code::NX_DOMAIN, [std::slice::from_ref(&alias), std::slice::from_ref(&soa), &[]]),
        30
    );
    assert_eq!(lifetime(code::NX_DOMAIN, [&[], &[], &[]]), 0);
    assert_eq!(lifetime(0, [&[], &[record(&QUESTION, rtype::SOA, 900, &[0; 9])], &[]]), 0, "a torn SOA");
}

/// A reply of these records to a client of so many bytes.
fn cut_to(limit: usize, sections: [&[Vec<u8>]; 3]) -> (u16, [u16; 4], usize) {
    let sent = query_packet("example.com", 1);
    let response = answer(&response_packet(&sent, 0, sections), &sent);
    let query = Query::read(&sent).unwrap();
    let mut reply = Reply::new(&query, 4096);
    reply.add_response(&response, Age::Seconds(0), query.name());
    let packet = reply.finish(limit);
    let header = Header::read(&packet).unwrap();
    let mut records = Records::new(&packet, sent.len());
    records.by_ref().for_each(drop);
    assert!(records.is_whole() && records.position() == packet.len() && packet.len() <= limit);
    (header.flags & flag::TC, header.counts, packet.len())
}

#[test]
fn what_does_not_fit_is_cut_at_a_record() {
    // 29 bytes of header and question, and 16 for each record.
    let a = vec![record(&QUESTION, 1, 60, &[192, 0, 2, 1]); 4];
    let all = 29 + 3 * 4 * 16;
    assert_eq!(cut_to(all, [&a, &a, &a]), (0, [1, 4, 4, 4], all));
    assert_eq!(cut_to(all - 1, [&a, &a, &a]), (0, [1, 4, 4, 3], all - 16), "what might only have helped");
    assert_eq!(cut_to(29 + 6 * 16, [&a, &a, &a]), (flag::TC, [1, 4, 2, 0], 29 + 6 * 16));
    assert_eq!(cut_to(29 + 15, [&a, &a, &a]), (flag::TC, [1, 0, 0, 0], 29));
    assert_eq!(cut_to(29 + 16, [&[], &[], &a]), (flag::TC, [1, 0, 0, 1], 45), "nothing else was there");
}

/// Packets that are nearly right: a response, some of whose bytes are others.
fn nearly() -> impl Strategy<Value = Vec<u8>> {
    let owner = prop_oneof![
        Just(QUESTION.to_vec()),
        Just(wire("a.example")),
        (0..80u8).prop_map(|at| vec![0xc0, at]),
        (0..80u8).prop_map(|at| vec![1, b'x', 0xc0, at]),
    ];
    let data = prop_oneof![
        Just(vec![192, 0, 2, 1]),
        (0..90u8).prop_map(|at| vec![0xc0, at]),
        Just(wire("b.example")),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    let rtype = prop_oneof![
        3 => prop::sample::select(vec![1u16, 2, 5, 6, 12, 15, 16, 24, 26, 33, 35, 39, 41, 41, 65, 250]),
        1 => any::<u16>(),
    ];
    let one = (owner, rtype, any::<u32>(), data)
        .prop_map(|(owner, rtype, ttl, data)| record(&owner, rtype, ttl, &data));
    let section = || prop::collection::vec(one.clone(), 0..5);
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (
        section(),
        section(),
        section(),
        prop::sample::select(vec![0u16, 3, 2, flag::TC]),
        changes,
        any::<bool>(),
    )
        .prop_map(|(answers, authorities, additional, flags, changes, torn)| {
            let sent = query_packet("www.example.com", 1);
            let mut packet = response_packet(&sent, flags, [&answers, &authorities, &additional]);
            for (at, byte) in &changes {
                let at = at.index(packet.len());
                packet[at] = *byte;
            }
            if torn && let Some((at, _)) = changes.first() {
                packet.truncate(at.index(packet.len() + 1));
            }
            packet
        })
}

/// What a reader sees of a message, names spelled out: to compare two whose bytes differ.
fn seen(packet: &[u8], end: usize) -> Vec<(u16, Option<String>, Option<String>)> {
    Records::new(packet, end)
        .filter(|record| record.rtype != rtype::OPT)
        .map(|record| {
            let name =
                |at| WireName::read(packet, at).map(|(name, _)| format!("{name:?}").to_ascii_lowercase());
            let target = matches!(record.rtype, 2 | 5 | 12 | 39).then(|| name(record.data.start)).flatten();
            (record.rtype, name(record.at), target)
        })
        .collect()
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_harm(packet in prop::collection::vec(any::<u8>(), 0..300), at in 0..300usize) {
        let sent = query_packet("www.example.com", 1);
        Heard::read(&packet, &sent);
        WireName::read(&packet, at);
        name::skip(&packet, at);
        prop_assert!(Records::new(&packet, at).count() <= packet.len() / 11 + 1);
        if let Ok(query) = Query::read(&packet) {
            let reply = Reply::new(&query, 4096).finish(512);
            prop_assert_eq!(&reply[..2], &packet[..2]);
        }
    }

    /// Whatever an upstream says, a client gets a whole message within its limit, or nothing.
    #[test]
    fn a_reply_is_whole(packet in nearly(), limit in 0..1300usize, age in 0..100u32, stale: bool, edns: bool) {
        let sent = query_packet("www.example.com", 1);
        let Some(Heard::Answer { response, .. }) = Heard::read(&packet, &sent) else { return Ok(()) };
        let mut asked = query_packet("WWW.Example.com", 1);
        if edns {
            asked[11] = 1;
            asked.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        }
        let query = Query::read(&asked).unwrap();
        let limit = limit.max(512);
        let age = if stale { Age::Stale } else { Age::Seconds(age) };
        for own in [false, true] {
            let mut reply = Reply::new(&query, 4096);
            let nodata = |_: &WireName| own.then_some(Answer::NoData { apex: 1 });
            if !reply.add_aliases(&response, age, nodata) {
                reply.add_response(&response, age, query.name());
            }
            reply.explain(3, "for a reason");
            let said = reply.finish(limit);
            prop_assert!(said.len() <= limit);
            let end = query.head().len();
            prop_assert_eq!(&said[HEADER..end], &asked[HEADER..end]);
            let mut records = Records::new(&said, end);
            let opts = records.by_ref().filter(|record| record.rtype == rtype::OPT).count();
            prop_assert!(records.is_whole() && records.position() == said.len());
            prop_assert_eq!(opts, usize::from(edns));
        }
    }

    /// Without its OPT records a message says what it said before, wherever its names lead.
    #[test]
    fn names_mean_the_same_without_opt_records(
        records in prop::collection::vec((0..6u8, any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..30usize), 0..20),
    ) {
        let sent = query_packet("www.example.com", 1);
        let mut packet = response_packet(&sent, 0, [&[], &[], &[]]);
        // Where names begin.
        let mut names = vec![HEADER, HEADER + 4];
        let mut name = |packet: &mut Vec<u8>, at: &prop::sample::Index, label: bool| {
            let target = names[at.index(names.len())];
            names.push(packet.len());
            if label {
                packet.extend([1, b'a' + (packet.len() % 26) as u8]);
            }
            packet.extend((0xc000 | target as u16).to_be_bytes());
        };
        for (kind, owner, target, len) in &records {
            let mut data = Vec::new();
            if *kind == 0 {
                packet.extend(record(&[0], rtype::OPT, 0, &vec![7; *len]));
            } else {
                name(&mut packet, owner, kind % 2 == 0);
                let rtype: u16 = [1, 5, 2, 12, 1][usize::from(kind - 1)];
                packet.extend(record(&[], rtype, 60, &[]));
                let start = packet.len();
                if rtype == 1 {
                    packet.extend([192, 0, 2, 1]);
                } else {
                    name(&mut packet, target, *len > 10);
                }
                data.extend(((packet.len() - start) as u16).to_be_bytes());
                packet[start - 2..start].copy_from_slice(&data);
            }
        }
        packet[7] = records.len() as u8;
        let response = answer(&packet, &sent);
        prop_assert!(!response.is_truncated());
        let mut kept = sent.clone();
        kept[2] |= 0x80;
        kept[6..12].copy_from_slice(&response.counts().map(u16::to_be_bytes).concat());
        kept.extend(response.body());
        prop_assert_eq!(seen(&packet, sent.len()), seen(&kept, sent.len()));
        let opts = Records::new(&kept, sent.len()).filter(|record| record.rtype == rtype::OPT).count();
        prop_assert_eq!(opts, 0);
    }
}
