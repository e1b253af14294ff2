//! What the program shows before, during and after a run, and what it costs. Each test runs the program itself.

#[allow(dead_code, reason = "the tests of sending use the rest")]
#[path = "../sending/server.rs"]
mod server;

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;
use server::{Server, answer, with_header};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    time::Duration,
};
use tempfile::TempDir;
use tokio::time::sleep;

/// An answer that costs 0.0003 at a price of 1 for a million input tokens and 2 for a million output tokens.
const PAID: &str = r#"{"choices":[{"message":{"content":"hello"},"finish_reason":"stop"}],
    "usage":{"prompt_tokens":100,"completion_tokens":100,"total_tokens":200}}"#;

/// The options for the prices of [`PAID`].
const PRICES: [&str; 4] = ["--price-in", "1", "--price-out", "2"];

/// A folder with an input, in which the program runs.
struct Folder(TempDir);

impl Folder {
    /// A folder whose input has this number of requests, with a bound of a hundred tokens each.
    fn with(requests: usize) -> Self {
        let folder = Self(TempDir::new().unwrap());
        let line = |number: usize| {
            format!(
                "{{\"custom_id\":\"{number}\",\"max_tokens\":100,\"messages\":[{{\"role\":\"user\",\"content\":\"q{number}\"}}]}}\n"
            )
        };
        fs::write(folder.path("in.jsonl"), (0..requests).map(line).collect::<String>()).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, options: &[&str]) -> Output {
        let mut command = Command::new(cargo_bin("bulk"));
        command
            .current_dir(self.0.path())
            .args(["--input", "in.jsonl", "--output", "out.jsonl"])
            .args(options)
            .env_remove("OPENAI_API_KEY");
        command.output().unwrap()
    }

    fn results(&self) -> Vec<Value> {
        let lines = fs::read_to_string(self.path("out.jsonl")).unwrap();
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn assert_code(output: &Output, code: i32) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
}

#[track_caller]
fn assert_has(text: &str, part: &str) {
    assert!(text.contains(part), "{part:?} is not in:\n{text}");
}

#[test]
fn a_dry_run_says_how_long_and_how_much_and_sends_nothing() {
    let server = Server::start(|_| async { answer(200, PAID) });
    let folder = Folder::with(120);
    let url = server.url();
    let limits = ["--rpm", "60", "--rpm-burst", "1", "--tpm", "off"];
    let options = [["--dry-run", "--url", &url].as_slice(), &PRICES, &limits].concat();
    let output = folder.run(&options);
    assert_code(&output, 0);
    let shown = text(&output.stdout);
    assert_has(&shown, "requests               120");
    assert_has(&shown, "limited by requests per minute");
    // The bucket begins with 95 % of its burst, and each further request waits a second.
    assert_has(&shown, "the last request is sent after 1 min 59 s");
    assert_has(&shown, "cost");
    assert!(server.arrived().is_empty());
    assert!(!folder.path("out.jsonl").exists());
}

#[test]
fn costs_are_in_each_result_and_in_the_summary() {
    let server = Server::start(|_| async { answer(200, PAID) });
    let folder = Folder::with(10);
    let url = server.url();
    let output = folder.run(&[["--url", &url, "--rpm", "off", "--tpm", "off"].as_slice(), &PRICES].concat());
    assert_code(&output, 0);
    assert!(folder.results().iter().all(|result| result["cost"] == 0.0003));
    assert_has(&text(&output.stdout), "cost: 0.003");
}

#[test]
fn a_run_stops_before_it_costs_more_than_allowed() {
    let server = Server::start(|_| async { answer(200, PAID) });
    let folder = Folder::with(200);
    let url = server.url();
    let options = ["--url", &url, "--rpm", "off", "--tpm", "off", "--max-cost", "0.003"];
    let output = folder.run(&[options.as_slice(), &PRICES].concat());
    assert_code(&output, 1);
    // At most 0.0002 of output are expected of each request, and each costs 0.0003: those that are under way when the
    // first answers arrive may exceed the bound. The message says by how much.
    let message = text(&output.stderr);
    assert_has(&message, "--max-cost 0.003 is reached");
    let sent = server.arrived().len();
    assert!((10..=15).contains(&sent), "{sent}");
    assert_eq!(folder.results().len(), sent);
    // The rest is sent when it may cost more.
    let output = folder.run(&["--url", &url, "--rpm", "off", "--tpm", "off", "--resume"]);
    assert_code(&output, 0);
    assert_eq!(server.arrived().len(), 200);
}

#[test]
fn the_summary_has_the_first_body_of_each_failure_without_secrets() {
    let failed = r#"{"error":{"message":"no such tool","api_key":"sk-1234567890"}}"#;
    let server = Server::start(move |request| async move {
        if request.body.contains("\"q") {
            answer(422, failed)
        } else {
            answer(200, PAID)
        }
    });
    let folder = Folder::with(3);
    let url = server.url();
    let output = folder.run(&["--url", &url, "--rpm", "off", "--tpm", "off", "--keep-going"]);
    assert_code(&output, 3);
    let shown = text(&output.stdout);
    assert_has(&shown, "3 x 422");
    assert_has(
        &shown,
        r#"the first: {"error":{"message":"no such tool","api_key":"[redacted]"}}"#,
    );
    assert!(!text(&output.stderr).contains("sk-1234567890"));
}

#[test]
fn what_attempts_in_vain_were_charged_counts_as_used() {
    let server = Server::start(|request| async move {
        if request.before == 0 {
            answer(503, "{}")
        } else {
            answer(200, PAID)
        }
    });
    let folder = Folder::with(5);
    let url = server.url();
    let output = folder.run(&["--url", &url, "--rpm", "600", "--rpm-burst", "1", "--tpm", "off"]);
    assert_code(&output, 0);
    assert_has(&text(&output.stdout), "charged for attempts in vain (5 requests");
}

#[test]
fn without_a_terminal_there_are_few_lines_without_control_characters() {
    let server = Server::start(|request| async move {
        if request.before == 0 {
            with_header(answer(429, "{}"), "retry-after", "3")
        } else {
            sleep(Duration::from_millis(100)).await;
            answer(200, PAID)
        }
    });
    let folder = Folder::with(1);
    let url = server.url();
    let output = folder.run(&["--url", &url, "--rpm", "off", "--tpm", "off"]);
    assert_code(&output, 0);
    let shown = text(&output.stderr);
    assert!(!shown.contains('\u{1b}'), "{shown}");
    assert_has(&shown, "paused until ");
    assert_has(&shown, "the pause is over");
    // A line after one second and after two, and one for each change.
    assert!(shown.lines().count() <= 12, "{shown}");
}

#[test]
fn a_report_is_a_page_with_its_drawing_or_the_drawing_alone() {
    let server = Server::start(|_| async { answer(200, PAID) });
    let url = server.url();
    for name in ["report.html", "report.svg"] {
        let folder = Folder::with(20);
        let output = folder.run(&["--url", &url, "--rpm", "6000", "--report", name]);
        assert_code(&output, 0);
        let report = fs::read_to_string(folder.path(name)).unwrap();
        assert_has(&report, "20 requests completed, 0 failed");
        assert_has(&report, "<svg");
        assert_eq!(report.contains("<html"), name == "report.html");
    }
}

#[test]
fn a_wrong_price_is_refused_before_anything_is_sent() {
    let folder = Folder::with(1);
    for options in [
        ["--price-in", "cheap"],
        ["--price-out", "-1"],
        ["--max-cost", "5"],
        ["--report", "report.pdf"],
    ] {
        assert_code(&folder.run(&options), 2);
    }
}
