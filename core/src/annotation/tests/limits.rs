//! A text that is too large, or that costs too much.

use super::*;

#[test]
fn limits() {
    let entry = |i| format!("  - {{name: s{i}, ports: [{{port: 80}}]}}\n");
    let text: String =
        std::iter::once("services:\n".to_owned()).chain((0..=MAX_ENTRIES).map(entry)).collect();
    let parsed = exports(&text);
    assert_eq!(parsed.entries.len(), MAX_ENTRIES);
    assert_eq!(places(&parsed.refused), [("services[4096]", 4098, 5)]);

    let ports: Vec<_> = (1..=MAX_PORTS + 1).map(|i| format!("{{name: p{i}, port: {i}}}")).collect();
    let fits = exports(&format!("services: [{{name: a, ports: [{}]}}]", ports[..MAX_PORTS].join(",")));
    assert_eq!(fits.entries[0].ports.len(), MAX_PORTS);
    let over = exports(&format!("services: [{{name: a, ports: [{}]}}]", ports.join(",")));
    assert_eq!(places(&over.refused), [("services[0].ports", 1, 29)]);

    let port = |i| format!("{{name: p{i}, port: {i}, protocol: TCP, targetport: 80{i}}}");
    let ports = [port(1), port(2), port(3)].join(",");
    let entry =
        |i| format!("  - {{name: service-{i}, namespace: default, cluster: b.local, ports: [{ports}]}}\n");
    let text: String = std::iter::once("services:\n".to_owned()).chain((0..1000).map(entry)).collect();
    assert_eq!(exports(&text).entries.len(), 1000, "{} bytes", text.len());
    let dense = format!("services: [{}]", "{name: a,ports: [{port: 1}]},".repeat(9000));
    assert_eq!(exports(&dense).entries.len(), 1, "{} bytes", dense.len());

    let huge = format!("# {}\n", "x".repeat(10 << 20));
    assert!(parse_exports(&huge, &defaults()).unwrap_err().reason.contains("the limit is 262144"));

    let wrong: String = (0..1000).map(|i| format!("  - name: s{i}\n    x: 1\n")).collect();
    let parsed = exports(&format!("services:\n{wrong}"));
    assert_eq!((parsed.refused.len(), parsed.warnings.len()), (MAX_FINDINGS, MAX_FINDINGS));
    assert!(parsed.refused[MAX_FINDINGS - 1].reason.ends_with("(and 744 more findings after this one)"));
}

#[test]
fn a_bomb_is_refused_fast() {
    let mut aliases = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for i in 1..10 {
        let inner = vec![format!("*a{}", i - 1); 10].join(",");
        aliases += &format!("a{i}: &a{i} [{inner}]\n");
    }
    let wide = format!("a: &a [{}]\nb:\n{}", "x,".repeat(100), "  - *a\n".repeat(30_000));
    let bombs = [
        (aliases, "too many aliases: "),
        (wide, "too many aliases: "),
        ("[".repeat(100_000), ""),
        ("- ".repeat(100_000), ""),
        ("x,".repeat(100_000) + "[[", ""),
        (format!("services: [{}]", "a,".repeat(120_000)), ""),
    ];
    for (bomb, reason) in bombs {
        // The wall clock of a test, not of the core.
        #[allow(clippy::disallowed_methods)]
        let start = Instant::now();
        let result = parse_exports(&bomb, &defaults());
        let took = start.elapsed();
        let said = result.unwrap_err().reason;
        assert!(said.starts_with(reason) && !said.contains('{'), "{said} for {}", &bomb[..40]);
        // One that goes off takes hours; seconds are a debug build on a busy machine.
        assert!(took < Duration::from_secs(60), "{took:?} for {}", &bomb[..40]);
    }
}

#[test]
fn aliases_cost_no_more_than_a_text_of_their_length() {
    let ports: String = (1..=MAX_PORTS).map(|i| format!("{{name: p{i}, port: {i}}},")).collect();
    let honest = |entries: usize| {
        let entries = (0..entries).map(|i| format!("- {{name: a{i}, ports: *p}}\n"));
        format!("p: &p [{ports}]\nservices:\n{}", entries.collect::<String>())
    };
    assert_eq!(exports(&honest(40)).entries.len(), 40);
    let bomb = |n: usize| {
        format!("a: &a [{}]\nb: &b [{}]\nservices: [{}]\n", "x,".repeat(n), "*a,".repeat(n), "*b,".repeat(n))
    };
    let said = parse_exports(&bomb(40), &defaults()).unwrap_err().reason;
    assert!(said.contains("4096 values"), "{said}");
}
