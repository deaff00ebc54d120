use super::*;

const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: client
  annotations:
    other: {}
    servicekeel.io/imported-services: | # by hand
      services:
        - name: web
          ports:
            - port: 99999
spec:
  containers: [ { name: app, image: x } ]
";

/// Where the clusters are not known.
fn check(file: &Path, text: &str) -> Checked {
    super::check(file, text, None)
}

#[test]
fn findings_stand_where_the_manifest_has_them() {
    let text = POD.replace("{}", "\"1\"");
    let checked = check(Path::new("pod.yaml"), &text);
    assert_eq!(checked.errors.len(), 1, "{checked:?}");
    let (line, column) = checked.errors[0].place.unwrap();
    let line = text.lines().nth(line as usize - 1).unwrap();
    assert_eq!(&line[column as usize - 1..], "99999");
    assert!(
        checked.errors[0].text.starts_with("servicekeel.io/imported-services: services[0].ports[0].port")
    );
}

#[test]
fn templates_lists_and_several_documents() {
    let deployment = "kind: Deployment\nspec:\n  template:\n    metadata:\n      annotations:\n        servicekeel.io/exported-services: \"services: [{name: a, ports: [{port: 1}]}]\"\n";
    let checked = check(Path::new("d.yaml"), &format!("---\nkind: Service\n---\n{deployment}"));
    assert!(checked.errors.is_empty() && checked.warnings.is_empty(), "{checked:?}");
    assert_eq!(checked.summary, "exported-services with 1 entry");
    let wrong = deployment.replace("port: 1", "port: x");
    let checked = check(Path::new("d.yaml"), &wrong);
    assert_eq!(checked.errors[0].place, Some((6, 43)), "{checked:?}");
    let checked = check(Path::new("s.yaml"), "kind: Service\n");
    assert!(checked.errors.is_empty() && checked.warnings.len() == 1, "{checked:?}");
}

fn told(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(|it| it.to_string()).collect()
}

#[test]
fn an_annotation_of_the_deployment_itself_reaches_no_pod() {
    let text = "kind: Deployment\nmetadata:\n  annotations:\n    servicekeel.io/imported-services: \"services: []\"\nspec:\n  template:\n    metadata: {}\n";
    let checked = check(Path::new("d.yaml"), text);
    assert!(checked.errors.is_empty(), "{checked:?}");
    let [warning] = &told(&checked.warnings)[..] else { panic!("{checked:?}") };
    assert!(warning.starts_with("d.yaml:4:5: servicekeel.io/imported-services is set on the Deployment, not in its pod template: no pod gets it"), "{warning}");
    let job = "kind: CronJob\nspec:\n  jobTemplate:\n    metadata: { annotations: { servicekeel.io/sidecar: \"true\" } }\n    spec:\n      template:\n        metadata: { annotations: { servicekeel.io/sidecar: \"true\" } }\n";
    let checked = check(Path::new("j.yaml"), job);
    assert!(checked.warnings[0].text.contains("is set on the jobTemplate"), "{checked:?}");
    assert_eq!(checked.summary, "servicekeel.io/sidecar is \"true\"");
    let service =
        "kind: Service\nmetadata: { annotations: { servicekeel.io/exported-services: \"services: []\" } }\n";
    let checked = check(Path::new("s.yaml"), service);
    assert!(checked.warnings[0].text.contains("it has no effect; it belongs on a pod"), "{checked:?}");
}

#[test]
fn a_key_that_nothing_reads_is_told_with_the_one_that_was_meant() {
    let checked = |key: &str| {
        let text = format!("kind: Pod\nmetadata:\n  annotations:\n    {key}: \"1\"\n");
        told(&check(Path::new("p.yaml"), &text).warnings)
    };
    let meant = checked("servicekeel.io/import-services");
    assert_eq!(meant.len(), 1, "{meant:?}");
    assert!(meant[0].starts_with("p.yaml:4:5: servicekeel.io/import-services is unknown; "), "{meant:?}");
    assert!(meant[0].ends_with("did you mean servicekeel.io/imported-services?"), "{meant:?}");
    assert!(checked("servicekeel.oi/exported-services")[0].contains("did you mean"));
    assert!(
        checked("servicekeel.io/colour")[0].contains("known annotations: servicekeel.io/imported-services")
    );
    assert!(checked("example.com/colour")[0].contains("annotation found"));
}

#[test]
fn what_the_controller_reads_is_checked_as_it_reads_it() {
    let checked = |kind: &str, annotations: &str| {
        let text = format!("kind: {kind}\nmetadata: {{ annotations: {{ {annotations} }} }}\n");
        let checked = check(Path::new("s.yaml"), &text);
        (told(&checked.errors).join("; "), told(&checked.warnings).join("; "), checked.summary)
    };
    let (errors, ..) =
        checked("Service", "servicekeel.io/allow: \"cluster_b\", servicekeel.io/export: \"no\"");
    assert!(errors.contains("s.yaml:2:") && errors.contains("the rule \"cluster_b\""), "{errors}");
    assert!(errors.contains("servicekeel.io/export is \"no\""), "{errors}");
    let (errors, ..) = checked("Namespace", "servicekeel.io/export: \"No\"");
    assert!(errors.contains("servicekeel.io/export is \"No\""), "{errors}");
    let (errors, ..) = checked("Service", "servicekeel.io/export: false");
    assert!(errors.contains("put it in quotes"), "{errors}");
    let good =
        checked("Service", "servicekeel.io/allow: \"b.local, c.local\", servicekeel.io/export: \"false\"");
    let summary = "servicekeel.io/allow with 2 rules, servicekeel.io/export is \"false\"";
    assert_eq!(good, (String::new(), String::new(), summary.into()));
    let (_, warnings, _) = checked("Service", "servicekeel.io/allow: b.local/prod");
    assert!(warnings.contains("lets nobody in yet"), "{warnings}");
    let (_, warnings, _) = checked("Namespace", "servicekeel.io/allow: b.local");
    assert!(warnings.contains("it belongs on a Service"), "{warnings}");
    let (_, warnings, _) = checked("Pod", "servicekeel.io/sidecar: \"yes\"");
    assert!(warnings.contains("only \"true\""), "{warnings}");
}

/// Pods of somebody who means harm, and two of somebody else: the work of the check is bounded, and the two are checked.
#[test]
fn bombs_of_some_pods_leave_time_for_the_others() {
    let bomb = |number: usize| {
        let mut bomb = format!("# {number}\\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\\n");
        for i in 1..10 {
            bomb += &format!("a{i}: &a{i} [{}]\\n", vec![format!("*a{}", i - 1); 10].join(","));
        }
        bomb
    };
    let pod = |name: &str, text: &str| {
        format!(
            r#"{{"kind": "Pod", "metadata": {{"name": "{name}", "namespace": "prod", "annotations": {{"servicekeel.io/imported-services": "{text}"}}}}}}"#
        )
    };
    let honest = |name: &str| pod(name, "services: [{name: a, ports: [{port: x}]}]");
    let pods: Vec<_> = (0..8000).map(|i| pod(&format!("bomb-{i}"), &bomb(i))).collect();
    let list = |pods: &[String]| {
        format!(
            "{{\"kind\": \"List\", \"items\": [\n{},\n{},\n{}]}}",
            honest("web"),
            pods.join(",\n"),
            honest("late")
        )
    };
    let all = list(&pods);
    assert!(all.len() > 4 << 20);
    let checked = check_within(Path::new("p.json"), &all, None, 20 * annotation::most_unfolded(1));
    assert!(MAX_UNFOLDED <= 256 * annotation::most_unfolded(1), "each takes milliseconds");
    let errors = told(&checked.errors);
    assert!(
        errors[0].starts_with("p.json:2:")
            && errors[0].contains(": Pod prod/web: servicekeel.io/imported-services:"),
        "{}",
        errors[0]
    );
    let of = |errors: &[String], what: &str| errors.iter().filter(|it| it.contains(what)).count();
    assert_eq!(of(&errors, "too many aliases: "), 20);
    assert_eq!(of(&errors, "not checked: the aliases of the annotations before it"), 1);
    assert_eq!(of(&errors, "Pod prod/late: servicekeel.io/imported-services: line 1"), 1);
    assert_eq!(of(&errors, "p.json: 7980 annotations in all were not checked"), 1);
}

#[test]
fn what_is_told_of_one_manifest_is_bounded() {
    let wrong = POD.replace("{}", "\"1\"").replace("- port: 99999", "[]") + "---\n";
    let checked = check(Path::new("p.yaml"), &wrong.repeat(MAX_TOLD + 3));
    assert_eq!(checked.errors.len(), MAX_TOLD + 1);
    assert_eq!(checked.errors[MAX_TOLD].text, "3 more problems after these");
}

#[test]
fn more_documents_than_a_config_may_have_are_read() {
    let text = POD.replace("{}", "\"1\"").replace("99999", "80") + "---\n";
    let checked = check(Path::new("p.yaml"), &text.repeat(3000));
    assert!(checked.errors.is_empty(), "{:?}", checked.errors);
    assert!(
        checked.summary.ends_with("imported-services with 1 entry, and 2992 more"),
        "{}",
        checked.summary
    );
}

#[test]
fn a_forgotten_bar_is_told_with_the_key() {
    let checked = check(Path::new("p.yaml"), &POD.replace("{}", "\"1\"").replace(" | # by hand", ""));
    let [error] = &told(&checked.errors)[..] else { panic!("{checked:?}") };
    assert!(
        error.starts_with(
            "p.yaml:7:5: servicekeel.io/imported-services: annotation values are strings: put `|`"
        ),
        "{error}"
    );
}

/// What `kubectl get -o json` prints is nested deeper than a config may be.
#[test]
fn json_as_deep_as_kubectl_prints_it() {
    let deep = format!("{}1{}", "{\"f:spec\":".repeat(30), "}".repeat(30));
    let text = format!(
        r#"{{"kind": "List", "items": [{{"kind": "Pod", "metadata": {{"managedFields": {deep}, "annotations":
        {{"servicekeel.io/imported-services": "services: [{{name: a, ports: [{{port: x}}]}}]"}}}}}}]}}"#
    );
    let checked = check(Path::new("p.json"), &text);
    let [error] = &told(&checked.errors)[..] else { panic!("{checked:?}") };
    assert!(error.starts_with("p.json:2:") && error.contains("services[0].ports[0].port"), "{error}");
}
