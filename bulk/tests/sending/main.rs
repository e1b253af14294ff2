//! How the program sends, waits and stops. Each test runs the program itself against a server of odd answers.

mod budgets;
mod folder;
mod server;

use assert_cmd::cargo::cargo_bin;
use axum::{body::Body, response::IntoResponse};
use folder::{Folder, line};
use futures_util::{StreamExt, stream};
use server::{Server, answer, good, with_header};
use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};
use tokio::time::{Instant, sleep};

const WRONG_KEY: &str = r#"{"error":{"message":"Incorrect API key provided: sk-12345","code":"invalid_api_key"}}"#;

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn assert_code(output: &Output, code: i32) {
    assert_eq!(
        output.status.code(),
        Some(code),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

/// Waits until something is so, at most ten seconds.
#[track_caller]
fn wait_until(is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(10), "waited in vain");
        thread::sleep(Duration::from_millis(10));
    }
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
}

#[test]
fn a_wrong_key_stops_the_run_early_and_says_what_to_do() {
    let server = Server::start(async |_| answer(401, WRONG_KEY));
    let folder = Folder::with(300);
    let output = folder
        .bulk(&["--url", &server.url(), "--api-key-env", "MY_KEY"])
        .env("MY_KEY", "secret-key")
        .output();
    let output = output.unwrap();
    assert_code(&output, 1);
    let said = text(&output.stderr);
    assert!(
        said.contains("401 from 127.0.0.1: Incorrect API key provided: …. Is MY_KEY right?"),
        "{said}"
    );
    assert!(said.contains("left for --resume"), "{said}");
    assert!(!said.contains("secret-key") && !said.contains("sk-12345"), "{said}");
    let arrived = server.arrived().len();
    assert!((5..150).contains(&arrived), "{arrived}");
    // What has arrived has a result, and what has not has none.
    assert_eq!(folder.count("FAILED"), arrived);
}

#[test]
fn a_key_that_the_server_repeats_is_not_shown() {
    let server = Server::start(async |request| {
        let key = request.headers["authorization"]
            .to_str()
            .unwrap()
            .replace("Bearer ", "");
        (
            axum::http::StatusCode::BAD_REQUEST,
            format!("bad token {key}, says the proxy"),
        )
            .into_response()
    });
    let folder = Folder::with(3);
    let output = folder
        .bulk(&["--url", &server.url(), "--api-key-env", "MY_KEY", "--lines"])
        .env("MY_KEY", "my-own-secret")
        .output()
        .unwrap();
    assert_code(&output, 3);
    let (summary, said) = (text(&output.stdout), text(&output.stderr));
    assert!(summary.contains("the first: bad token …, says the proxy"), "{summary}");
    assert!(
        !summary.contains("my-own-secret") && !said.contains("my-own-secret"),
        "{said}"
    );
}

#[test]
fn all_are_sent_in_spite_of_a_wrong_key_if_asked() {
    let server = Server::start(async |_| answer(401, WRONG_KEY));
    let folder = Folder::with(60);
    assert_code(&folder.run(&["--url", &server.url(), "--keep-going"]), 3);
    assert_eq!((server.arrived().len(), folder.count("FAILED")), (60, 60));
}

#[test]
fn failures_of_single_requests_do_not_stop_the_run() {
    let server = Server::start(async |request| {
        let is_bad = request.body.contains('7');
        if is_bad {
            answer(400, r#"{"error":{"message":"bad"}}"#)
        } else {
            good()
        }
    });
    let folder = Folder::with(100);
    assert_code(&folder.run(&["--url", &server.url()]), 3);
    assert_eq!((folder.count("COMPLETED"), folder.count("FAILED")), (81, 19));
}

#[test]
fn an_unknown_host_stops_the_run_and_is_told_at_once() {
    let folder = Folder::with(50);
    let output = folder.run(&["--url", "https://no-such-host.invalid/v1"]);
    assert_code(&output, 1);
    let said = text(&output.stderr);
    assert!(
        said.contains("no-such-host.invalid: the host cannot be found"),
        "{said}"
    );
}

#[test]
fn a_wait_that_the_provider_asks_for_is_waited_and_told() {
    let server = Server::start(async |request| {
        if request.body.contains("question 0\"") && request.before == 0 {
            with_header(answer(429, r#"{"error":{"message":"slow down"}}"#), "retry-after", "3")
        } else {
            good()
        }
    });
    let folder = Folder::with(50);
    let begun = Instant::now();
    let output = folder.run(&["--url", &server.url(), "--concurrency", "1"]);
    assert_code(&output, 0);
    assert!(begun.elapsed() >= Duration::from_secs(3));
    let said = text(&output.stderr);
    assert!(said.contains(" UTC by 429, Retry-After 3 s"), "{said}");
    // The wait was that of the limiter: it cost no other request an attempt.
    assert_eq!((server.arrived().len(), folder.count("COMPLETED")), (51, 50));
}

#[test]
fn a_wait_that_is_too_long_stops_the_run_and_keeps_the_answer() {
    let server = Server::start(async |_| {
        with_header(
            answer(429, r#"{"error":{"message":"come tomorrow"}}"#),
            "retry-after",
            "86400",
        )
    });
    let folder = Folder::with(100);
    let output = folder.run(&["--url", &server.url()]);
    assert_code(&output, 1);
    let said = text(&output.stderr);
    assert!(
        said.contains("come tomorrow; it asks to wait 1day. --max-wait"),
        "{said}"
    );
    assert!(server.arrived().len() <= 32);
    let result = &folder.results()[0];
    assert_eq!(
        (&result["http_status"], &result["response"]["error"]["message"]),
        (&429.into(), &"come tomorrow".into())
    );
    let message = result["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("asks to wait 1day") && message.contains("--max-wait 86401"),
        "{message}"
    );
}

#[test]
fn a_response_that_is_too_large_fails_by_name() {
    let server = Server::start(async |_| good());
    let folder = Folder::with(1);
    assert_code(&folder.run(&["--url", &server.url(), "--max-response", "50"]), 3);
    assert_eq!(folder.results()[0]["error"]["type"], "BodyTooLarge");
}

#[cfg(unix)]
#[test]
fn a_signal_finishes_what_is_on_the_wire_and_leaves_the_rest_for_resume() {
    for (name, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let server = Server::start(async |_| {
            sleep(Duration::from_millis(700)).await;
            good()
        });
        let folder = Folder::with(40);
        let options = ["--url", &server.url(), "--concurrency", "4"];
        let child = folder.start(&options);
        wait_until(|| server.arrived().len() == 4);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_code(&output, code);
        assert!(
            text(&output.stderr).contains("nothing more is sent"),
            "{}",
            text(&output.stderr)
        );
        assert_eq!(
            (
                server.arrived().len(),
                folder.results().len(),
                folder.count("COMPLETED")
            ),
            (4, 4, 4)
        );

        let resumed = folder.run(&["--url", &server.url(), "--concurrency", "40", "--resume"]);
        assert_code(&resumed, 0);
        let arrived = server.arrived();
        assert_eq!((arrived.len(), folder.count("COMPLETED")), (40, 40));
        assert!(arrived.iter().all(|request| request.before == 0));
    }
}

#[cfg(unix)]
#[test]
fn what_is_on_the_wire_is_cut_by_a_second_signal_or_after_the_time_to_drain() {
    let hangs = || {
        Server::start(async |_| {
            sleep(Duration::from_secs(60)).await;
            good()
        })
    };
    let server = hangs();
    let folder = Folder::with(40);
    let child = folder.start(&["--url", &server.url(), "--concurrency", "4"]);
    wait_until(|| server.arrived().len() == 4);
    signal(&child, "-INT");
    thread::sleep(Duration::from_millis(600));
    signal(&child, "-INT");
    assert_code(&child.wait_with_output().unwrap(), 130);
    assert_eq!(folder.count("CANCELLED"), 4);

    let server = hangs();
    let folder = Folder::with(40);
    let child = folder.start(&["--url", &server.url(), "--concurrency", "4", "--drain", "0.5"]);
    wait_until(|| server.arrived().len() == 4);
    signal(&child, "-TERM");
    assert_code(&child.wait_with_output().unwrap(), 143);
    assert_eq!(folder.count("CANCELLED"), 4);
}

#[cfg(unix)]
#[test]
fn a_signal_that_comes_twice_at_once_is_one_signal() {
    let server = Server::start(async |_| {
        sleep(Duration::from_secs(1)).await;
        good()
    });
    let folder = Folder::with(40);
    let child = folder.start(&["--url", &server.url(), "--concurrency", "4"]);
    wait_until(|| server.arrived().len() == 4);
    // As `timeout` does.
    signal(&child, "-TERM");
    signal(&child, "-TERM");
    assert_code(&child.wait_with_output().unwrap(), 143);
    assert_eq!(folder.count("COMPLETED"), 4);
}

#[cfg(unix)]
#[test]
fn a_request_whose_response_is_cut_off_has_a_result() {
    let server = Server::start(async |_| {
        let begun = stream::iter([Ok::<_, std::io::Error>("{\"choices\":")]);
        let body = Body::from_stream(begun.chain(stream::pending()));
        ([("content-type", "application/json")], body).into_response()
    });
    let folder = Folder::with(40);
    let child = folder.start(&["--url", &server.url(), "--concurrency", "4", "--drain", "0.5"]);
    wait_until(|| server.arrived().len() == 4);
    thread::sleep(Duration::from_millis(300));
    signal(&child, "-INT");
    assert_code(&child.wait_with_output().unwrap(), 130);
    assert_eq!(folder.count("CANCELLED"), 4);
}

#[test]
fn what_is_on_the_wire_is_finished_when_the_cost_stops_the_run() {
    let server = Server::start(async |request| {
        if !request.body.contains("question 0\"") {
            sleep(Duration::from_millis(1_500)).await;
        }
        answer(
            200,
            r#"{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":1000000}}"#,
        )
    });
    let folder = Folder::with(40);
    let output = folder.run(&[
        "--url",
        &server.url(),
        "--concurrency",
        "4",
        "--drain",
        "0.1",
        "--price-out",
        "1",
        "--max-cost",
        "0.5",
    ]);
    assert_code(&output, 1);
    assert_eq!(
        (folder.count("COMPLETED"), folder.count("CANCELLED")),
        (server.arrived().len(), 0)
    );
}

#[cfg(unix)]
#[test]
fn a_request_that_waits_to_be_sent_again_is_left_for_resume() {
    let server = Server::start(async |request| match request.before {
        0 => with_header(answer(429, "{}"), "retry-after", "60"),
        _ => good(),
    });
    let folder = Folder::with(10);
    let child = folder.start(&["--url", &server.url(), "--concurrency", "2"]);
    wait_until(|| !server.arrived().is_empty());
    thread::sleep(Duration::from_millis(300));
    signal(&child, "-INT");
    let begun = Instant::now();
    assert_code(&child.wait_with_output().unwrap(), 130);
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(folder.results().len(), 0);
}

#[cfg(unix)]
#[test]
fn a_pipe_is_read_once() {
    let server = Server::start(async |_| good());
    let folder = Folder::with(0);
    let mut command = Command::new(cargo_bin("bulk"));
    command
        .current_dir(folder.0.path())
        .args([
            "--input",
            "/dev/stdin",
            "--output",
            "out.jsonl",
            "--rpm",
            "off",
            "--tpm",
            "off",
            "--url",
            &server.url(),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for number in 0..20 {
        std::io::Write::write_all(&mut stdin, line(number).as_bytes()).unwrap();
    }
    drop(stdin);
    assert_code(&child.wait_with_output().unwrap(), 0);
    assert_eq!((server.arrived().len(), folder.count("COMPLETED")), (20, 20));
}

#[test]
fn a_line_that_is_too_large_fails_by_name_and_does_not_change_the_pace_of_the_others() {
    let folder = Folder::with(0);
    let small = "{\"max_tokens\":100,\"messages\":[]}\n".repeat(60);
    let large = "{\"max_tokens\":1000000,\"messages\":[]}\n";
    fs::write(folder.path("in.jsonl"), format!("{small}{large}")).unwrap();
    let output = Command::new(cargo_bin("bulk"))
        .current_dir(folder.0.path())
        .args([
            "--input",
            "in.jsonl",
            "--output",
            "out.jsonl",
            "--rpm",
            "off",
            "--tpm",
            "120000",
            "--keep-limits",
            "--local-faults",
            "0",
        ])
        .output()
        .unwrap();
    assert_code(&output, 3);
    // Two thousand tokens a second, of which the first two thousand, less a twentieth, are there at the start.
    let said = text(&output.stderr);
    assert!(said.contains("at least 2.0 s"), "{said}");
    assert!(
        text(&output.stdout).contains("429s              0"),
        "{}",
        text(&output.stdout)
    );
    assert_eq!((folder.count("COMPLETED"), folder.count("FAILED")), (60, 1));
    let failed = folder
        .results()
        .into_iter()
        .find(|result| result["status"] == "FAILED")
        .unwrap();
    assert_eq!(failed["error"]["type"], "CostExceedsBurst");
    let message = failed["error"]["message"].as_str().unwrap();
    assert!(message.contains("raise --tpm, "), "{message}");
}

#[test]
fn a_key_of_the_environment_is_not_sent_to_a_server_that_does_not_own_it() {
    let server = Server::start(async |_| good());
    let folder = Folder::with(1);
    let output = folder
        .bulk(&["--url", &server.url(), "--provider", "openai"])
        .env("OPENAI_API_KEY", "secret-key")
        .output();
    assert_code(&output.unwrap(), 0);
    assert!(!server.arrived()[0].headers.contains_key("authorization"));
}

#[test]
fn a_user_in_the_url_is_sent_as_basic_authorization_and_shown_nowhere() {
    let server = Server::start(async |_| answer(500, "{}"));
    let folder = Folder::with(1);
    let output = folder.run(&["--url", &server.url_with("user:pass-word@"), "--retries", "0"]);
    assert_code(&output, 3);
    assert_eq!(
        server.arrived()[0].headers["authorization"],
        "Basic dXNlcjpwYXNzLXdvcmQ="
    );
    let results = fs::read_to_string(folder.path("out.jsonl")).unwrap();
    for shown in [text(&output.stdout), text(&output.stderr), results] {
        assert!(!shown.contains("pass-word") && !shown.contains("dXNlcj"), "{shown}");
    }
}

#[test]
fn options_are_read_from_a_file_and_an_unknown_one_is_named_with_its_line() {
    let server = Server::start(async |_| good());
    let folder = Folder::with(3);
    let config = format!("url = \"{}\"\nheader = [\"x-team: search\"]\n", server.url());
    fs::write(folder.path("bulk.toml"), &config).unwrap();
    assert_code(&folder.run(&["--config", "bulk.toml"]), 0);
    assert_eq!(server.arrived()[0].headers["x-team"], "search");

    fs::write(folder.path("bulk.toml"), config + "rpn = 5\n").unwrap();
    let output = folder.run(&["--config", "bulk.toml", "--force"]);
    assert_code(&output, 2);
    let said = text(&output.stderr);
    assert!(said.contains("line 3 of bulk.toml: `rpn` is not an option"), "{said}");
}

#[test]
fn lines_are_sent_to_their_own_urls_with_their_own_methods_and_headers() {
    let server = Server::start(async |_| good());
    let folder = Folder::with(0);
    let lines = [
        r#"{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{"input":"a"}}"#,
        r#"{"custom_id":"b","method":"GET","url":"/items?page=2","headers":{"x-team":"line"}}"#,
        r#"{"custom_id":"c","method":"GET","url":"https://elsewhere.example/v1/items"}"#,
    ];
    fs::write(folder.path("in.jsonl"), lines.join("\n")).unwrap();
    let output = folder.run(&[
        "--base-url",
        &server.base_url(),
        "--header",
        "x-team: all",
        "--concurrency",
        "1",
    ]);
    assert_code(&output, 3);
    let arrived = server.arrived();
    let seen: Vec<_> = arrived
        .iter()
        .map(|request| (request.method.as_str(), &*request.uri))
        .collect();
    assert_eq!(seen, [("POST", "/v1/embeddings"), ("GET", "/v1/items?page=2")]);
    let header = |at: usize, name| arrived[at].headers.get(name).map(|value| value.to_str().unwrap());
    assert_eq!(
        (header(0, "x-team"), header(0, "content-type")),
        (Some("all"), Some("application/json"))
    );
    assert_eq!((header(1, "x-team"), header(1, "content-type")), (Some("line"), None));
    // The third line names another server, which must not get the headers of the command line.
    let failed = folder
        .results()
        .into_iter()
        .find(|result| result["custom_id"] == "c")
        .unwrap();
    assert!(
        failed["error"]["message"].as_str().unwrap().contains("--any-host"),
        "{failed}"
    );
}

#[test]
fn http2_is_spoken_without_tls_if_asked() {
    let server = Server::start(async |_| good());
    let folder = Folder::with(3);
    assert_code(&folder.run(&["--url", &server.url(), "--http2"]), 0);
    assert!(
        server
            .arrived()
            .iter()
            .all(|request| request.version == axum::http::Version::HTTP_2)
    );
}

#[test]
fn a_success_without_an_answer_is_sent_again_and_its_failure_keeps_the_body() {
    let server = Server::start(async |request| {
        let is_hopeless = request.body.contains("question 0\"");
        if is_hopeless || request.before == 0 {
            answer(200, r#"{"error":{"message":"Provider returned error","code":502}}"#)
        } else {
            good()
        }
    });
    let folder = Folder::with(5);
    assert_code(&folder.run(&["--url", &server.url(), "--retries", "2"]), 3);
    assert_eq!((server.arrived().len(), folder.count("COMPLETED")), (11, 4));
    let failed = folder
        .results()
        .into_iter()
        .find(|result| result["status"] == "FAILED")
        .unwrap();
    assert_eq!(failed["response"]["error"]["code"], 502);
}

#[cfg(unix)]
#[test]
fn requests_go_through_a_unix_socket() {
    let folder = Folder::with(2);
    let path = folder.path("socket");
    serve_on_socket(&path);
    assert_code(
        &folder.run(&["--url", "http://api.test/v1", "--unix-socket", path.to_str().unwrap()]),
        0,
    );
    assert_eq!(folder.count("COMPLETED"), 2);
}

#[cfg(unix)]
fn serve_on_socket(path: &Path) {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    thread::spawn(move || {
        runtime.block_on(async {
            let listener = tokio::net::UnixListener::from_std(listener).unwrap();
            let router = axum::Router::new().fallback(async || good());
            axum::serve(listener, router).await.unwrap();
        });
    });
}

#[test]
fn completions_and_the_manual_are_printed() {
    for (options, part) in [(["--completions", "bash"].as_slice(), "_bulk()"), (&["--man"], ".TH")] {
        let output = Command::new(cargo_bin("bulk")).args(options).output().unwrap();
        assert_code(&output, 0);
        assert!(text(&output.stdout).contains(part));
    }
}

#[cfg(not(feature = "redis"))]
#[test]
fn a_shared_limit_that_was_not_built_in_is_an_error_that_says_how() {
    let output = Folder::with(1).run(&["--redis", "redis://127.0.0.1/", "--quota", "team"]);
    assert_code(&output, 1);
    assert!(
        text(&output.stderr).contains("--features redis"),
        "{}",
        text(&output.stderr)
    );
}
