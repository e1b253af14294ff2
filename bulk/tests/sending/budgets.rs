//! Limits of budgets besides requests and tokens per minute, against the local provider, which enforces them.

use crate::{
    assert_code,
    folder::Folder,
    server::{Server, good},
    text,
};
use std::{fs, time::Duration};
use tokio::time::Instant;

/// The local provider without limits of requests and tokens, and without failures.
const LOCAL: [&str; 4] = ["--local-faults", "0", "--local-slow", "0"];

/// A folder with these lines as its input.
fn folder(lines: &[String]) -> Folder {
    let folder = Folder::with(0);
    fs::write(folder.path("in.jsonl"), lines.join("\n")).unwrap();
    folder
}

fn line(number: usize, fields: &str) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"question {number}"}}],"max_tokens":20{fields}}}"#)
}

/// The number of 429s in a summary.
fn count_429(summary: &str) -> u64 {
    let row = summary
        .lines()
        .find(|line| line.trim_start().starts_with("429s"))
        .unwrap();
    row.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_budget_of_ones_own_is_kept_by_what_each_line_takes_of_it() {
    // 40 images: 20 lines with two, of which a half say so, and none in the others.
    let lines: Vec<_> = (0..30)
        .map(|number| {
            line(
                number,
                [r#","cost":{"images":2}"#, "", r#","cost":{"images":0}"#][number % 3],
            )
        })
        .collect();
    let folder = folder(&lines);
    let begun = Instant::now();
    let output = folder.run(&[&LOCAL[..], &["--budget", "images=10/s", "--budget-default", "images=2"]].concat());
    assert_code(&output, 0);
    assert_eq!((folder.count("COMPLETED"), count_429(&text(&output.stdout))), (30, 0));
    // At most 10 images at the start, and 30 at 10 a second.
    assert!(begun.elapsed() > Duration::from_millis(2_900));
}

#[test]
fn the_local_provider_enforces_the_budgets_that_it_is_told() {
    let lines: Vec<_> = (0..12).map(|number| line(number, r#","cost":{"images":5}"#)).collect();
    let folder = folder(&lines);
    let told = ["--budget", "images=1000/s", "--local-budget", "images=20/s"];
    let output = folder.run(&[&LOCAL[..], &told].concat());
    assert_code(&output, 0);
    assert!(count_429(&text(&output.stdout)) > 0, "{}", text(&output.stdout));
    let output = folder.run(&[&LOCAL[..], &["--budget", "images=1000/s", "--force"]].concat());
    assert_code(&output, 0);
    assert_eq!(count_429(&text(&output.stdout)), 0);
}

#[test]
fn input_and_output_tokens_are_enforced_apart_and_paced_without_a_rejection() {
    let lines: Vec<_> = (0..30).map(|number| line(number, "")).collect();
    let folder = folder(&lines);
    // 20 tokens for each answer: 600, of which a second brings 200.
    let limits = ["--budget", "input_tokens=500/s", "--budget", "output_tokens=200/s"];
    let begun = Instant::now();
    let output = folder.run(&[&LOCAL[..], &["--provider", "anthropic"], &limits].concat());
    assert_code(&output, 0);
    assert_eq!((folder.count("COMPLETED"), count_429(&text(&output.stdout))), (30, 0));
    assert!(begun.elapsed() > Duration::from_millis(1_900));
}

#[test]
fn a_wrong_cost_is_told_with_its_line_and_field_and_one_above_the_limit_by_its_budget() {
    let lines = [
        line(0, r#","cost":{"images":1}"#),
        line(1, r#","cost":{"images":"two"}"#),
        line(2, r#","cost":{"image":1}"#),
        line(3, r#","cost":{"images":11}"#),
    ];
    let folder = folder(&lines);
    let options = ["--budget", "images=10/min", "--on-malformed", "skip"];
    let output = folder.run(&[&LOCAL[..], &options].concat());
    assert_code(&output, 3);
    let said = text(&output.stderr);
    for expected in [
        "line 2 is malformed: `cost.images` is not a whole number",
        "line 3 is malformed: `cost.image` is no budget of --budget, which are: images",
        "line 4 cannot be sent",
    ] {
        assert!(said.contains(expected), "{said}");
    }
    let results = folder.results();
    assert_eq!((results.len(), folder.count("COMPLETED")), (2, 1));
    let error = results.iter().find(|result| result["line"] == 4).unwrap()["error"].to_string();
    assert!(error.contains("images") && error.contains("11"), "{error}");
}

#[test]
fn what_a_line_takes_is_not_sent_to_a_provider() {
    let server = Server::start(async |_| good());
    let folder = folder(&[line(0, r#","cost":{"images":3}"#)]);
    assert_code(&folder.run(&["--url", &server.url(), "--budget", "images=10/min"]), 0);
    let arrived = server.arrived();
    assert_eq!(arrived.len(), 1);
    assert!(!format!("{arrived:?}").contains("images"), "{arrived:?}");
}

#[test]
fn answers_that_are_estimated_by_those_before_are_sent_sooner_and_without_a_rejection() {
    // Each answer takes a hundredth of its `max_tokens`, of which the limit holds two.
    let lines: Vec<_> = (0..80)
        .map(|number| line(number, r#","model":"m""#).replace("\"max_tokens\":20", "\"max_tokens\":2000"))
        .collect();
    let folder = folder(&lines);
    let options = ["--budget", "tokens=4100/s", "--local-usage", "1", "--force"];
    let time = |more: &[&str]| {
        let begun = Instant::now();
        let output = folder.run(&[&LOCAL[..], &options, more].concat());
        assert_code(&output, 0);
        assert_eq!((folder.count("COMPLETED"), count_429(&text(&output.stdout))), (80, 0));
        begun.elapsed()
    };
    let (by_longest, by_quantile) = (time(&[]), time(&["--estimate-quantile", "0.95"]));
    assert!(by_quantile < by_longest * 3 / 4, "{by_quantile:?}, not {by_longest:?}");
}
