//! Checks the dashboard `docs/grafana.json` with the page of the running example.

use crate::{
    load::Load,
    page::{Sample, parse},
};
use serde_json::Value;
use std::{collections::BTreeSet, fs, path::Path};

/// A word of a query, or a sign.
#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Sign(char),
}

/// What a query names: its metrics, and the labels of any of them.
#[derive(Debug, Default, PartialEq)]
struct Names {
    metrics: BTreeSet<String>,
    labels: BTreeSet<String>,
}

/// Splits a query into words and signs. Texts, numbers and what is in square brackets are left out.
fn tokens(query: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = query.chars().peekable();
    while let Some(sign) = rest.next() {
        match sign {
            '"' => while rest.next().is_some_and(|letter| letter != '"') {},
            '[' => while rest.next().is_some_and(|letter| letter != ']') {},
            _ if sign.is_ascii_alphabetic() || sign == '_' => {
                let mut word = String::from(sign);
                while let Some(letter) = rest.next_if(|letter| letter.is_ascii_alphanumeric() || *letter == '_') {
                    word.push(letter);
                }
                tokens.push(Token::Word(word));
            }
            _ if "(){}".contains(sign) => tokens.push(Token::Sign(sign)),
            _ => {}
        }
    }
    tokens
}

/// Words before a `(` are functions, words in `{}` and after `by` are labels, and all others are metrics.
fn names(query: &str) -> Names {
    let mut names = Names::default();
    let tokens = tokens(query);
    let mut ends_labels = None;
    for (at, token) in tokens.iter().enumerate() {
        let next = tokens.get(at + 1);
        match token {
            Token::Sign('{') => ends_labels = Some('}'),
            Token::Sign('(') if at > 0 && tokens[at - 1] == Token::Word("by".to_owned()) => ends_labels = Some(')'),
            Token::Sign(sign) if ends_labels == Some(*sign) => ends_labels = None,
            Token::Word(word) if ends_labels.is_some() => {
                names.labels.insert(word.clone());
            }
            // Before `(` or `by` is a function, as in `rate(…)` and `sum by (le) (…)`.
            Token::Word(word) if word != "by" && next.is_none_or(|next| !is_after_function(next)) => {
                names.metrics.insert(word.clone());
            }
            _ => {}
        }
    }
    names
}

/// Whether a name before this is that of a function.
fn is_after_function(next: &Token) -> bool {
    matches!(next, Token::Sign('(')) || matches!(next, Token::Word(word) if word == "by")
}

/// Returns all queries of the dashboard.
fn queries(dashboard: &Value) -> Vec<&str> {
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().expect("targets"));
    targets
        .map(|target| target["expr"].as_str().expect("a query"))
        .collect()
}

fn dashboard() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/grafana.json");
    serde_json::from_slice(&fs::read(file).expect("the dashboard")).expect("json")
}

#[test]
fn the_names_in_a_query_are_found() {
    let found =
        names(r#"histogram_quantile(0.95, sum by (le, a_b) (rate(x_bucket{c=~"$d", e!="f"}[$__rate_interval])))"#);
    assert_eq!(found.metrics, ["x_bucket"].map(str::to_owned).into());
    assert_eq!(found.labels, ["le", "a_b", "c", "e"].map(str::to_owned).into());
}

#[tokio::test]
async fn every_query_of_the_dashboard_names_a_metric_with_its_labels_on_the_page() {
    let load = Load::start().await.expect("an executor");
    load.run().await.expect("calls");
    let page = load.scrape().page();
    let samples = parse(&page);
    let dashboard = dashboard();
    let queries = queries(&dashboard);
    assert!(queries.len() > 15, "{queries:?}");
    let mut shown = BTreeSet::new();
    for query in queries {
        let names = names(query);
        assert_eq!(names.metrics.len(), 1, "{query}");
        for metric in names.metrics {
            let of_metric: Vec<&Sample> = samples.iter().filter(|sample| sample.name == metric).collect();
            assert!(!of_metric.is_empty(), "{metric} of {query} is not on the page");
            for label in &names.labels {
                let has_label = of_metric.iter().any(|sample| sample.labels.contains_key(label));
                assert!(has_label, "{metric} has no label {label}: {query}");
            }
            shown.insert(metric);
        }
    }
    // And each metric on the page is in a query.
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    for name in types.filter_map(|line| line.split(' ').next()) {
        assert!(
            shown.iter().any(|metric| metric.starts_with(name)),
            "the dashboard does not show {name}"
        );
    }
}

#[tokio::test]
async fn a_scrape_that_is_aborted_or_never_comes_holds_up_no_call() {
    let load = Load::start().await.expect("an executor");
    let scrape = load.scrape();
    let scraping = tokio::spawn(async move {
        loop {
            let _ = scrape.page();
            tokio::task::yield_now().await;
        }
    });
    scraping.abort();
    load.run().await.expect("all calls are answered");
    let completed = parse(&load.scrape().page());
    let completed = crate::page::sum(
        &completed,
        "outbound_calls_total",
        Some(("outbound_status", "COMPLETED")),
    );
    assert_eq!(completed, f64::from(crate::load::CALLS + 1));
}
