//! The program itself, with the files that people have: what it reads is what it sends, and what it gets is what it
//! writes.

mod server;

use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::Value;
use server::{ODD_JSON, Server};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use tempfile::TempDir;

const THREE: &str = "{\"model\":\"m\",\"n\":1}\n{\"model\":\"m\",\"n\":2}\n{\"model\":\"m\",\"n\":3}\n";

struct Run {
    server: Server,
    folder: TempDir,
}

impl Run {
    fn new() -> Self {
        Self {
            server: Server::start(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Sends the requests of `input` to `path`, with results in `out.jsonl` unless `args` name another output.
    fn bulk(&self, path: &str, input: &str, args: &[&str]) -> Output {
        self.command(path, input, args).output().unwrap()
    }

    fn command(&self, path: &str, input: &str, args: &[&str]) -> Command {
        let mut command = Command::new(cargo_bin_cmd!("bulk").get_program());
        command.current_dir(self.folder.path()).env("NO_PROXY", "127.0.0.1");
        command.args([
            "--url",
            &self.server.url(path),
            "--input",
            input,
            "--rpm",
            "off",
            "--tpm",
            "off",
            "--retries",
            "0",
        ]);
        if !args.contains(&"--output") {
            command.args(["--output", "out.jsonl"]);
        }
        command.args(args);
        command
    }

    fn results(&self) -> Vec<Value> {
        results(&self.path("out.jsonl"))
    }

    fn sent(&self) -> Vec<String> {
        let mut sent: Vec<_> = self
            .server
            .arrived()
            .into_iter()
            .map(|arrived| {
                format!(
                    "{} {} {}",
                    arrived.method,
                    arrived.path,
                    String::from_utf8_lossy(&arrived.body)
                )
            })
            .collect();
        sent.sort();
        sent
    }
}

fn results(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn code(output: &Output) -> i32 {
    let code = output.status.code();
    code.unwrap_or_else(|| panic!("killed: {}", String::from_utf8_lossy(&output.stderr)))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_request_is_sent_as_it_is_written() {
    let run = Run::new();
    let line = "{\"z\":1.10, \"custom_id\":\"a\", \"a\":{\"n\":123456789012345678901234567890,\"n\":\"\\u0041\"}}";
    let input = run.file("in.jsonl", line);
    assert_eq!(code(&run.bulk("/ok", &input, &["--echo"])), 0);
    let body = "{\"z\":1.10, \"a\":{\"n\":123456789012345678901234567890,\"n\":\"\\u0041\"}}";
    assert_eq!(run.sent(), [format!("POST /ok {body}")]);
    let text = fs::read_to_string(run.path("out.jsonl")).unwrap();
    assert!(text.contains(&format!("\"request\":{body}")), "{text}");
}

#[test]
fn an_answer_is_written_as_it_came() {
    let run = Run::new();
    let input = run.file("in.jsonl", "{\"n\":1}\n");
    assert_eq!(code(&run.bulk("/odd", &input, &[])), 0);
    let text = fs::read_to_string(run.path("out.jsonl")).unwrap();
    assert!(
        text.contains(&format!("\"response\":{}", ODD_JSON.replace('\n', " "))),
        "{text}"
    );
    assert!(
        text.contains("\"x-request-id\":\"req_1\"") && !text.contains("secret"),
        "{text}"
    );

    run.bulk("/audio", &input, &["--force"]);
    let audio = &run.results()[0];
    assert_eq!(
        (&audio["response_base64"], &audio["content_type"]),
        (&"//tJRDM=".into(), &"audio/mpeg".into())
    );
    run.bulk("/text", &input, &["--force"]);
    assert_eq!(run.results()[0]["response"], "7");
    run.bulk("/stream", &input, &["--force"]);
    assert_eq!(
        run.results()[0]["response"]["choices"][0]["message"]["content"],
        "hello"
    );
    assert_eq!(code(&run.bulk("/bad", &input, &["--force"])), 3);
    let bad = &run.results()[0];
    assert_eq!(
        (&bad["http_status"], &bad["response"]["error"]["message"]),
        (&400.into(), &"bad".into())
    );
}

#[test]
fn each_form_of_file_is_recognized_and_said() {
    let run = Run::new();
    for (text, said, sent) in [
        (
            "{\"custom_id\":\"c\",\"params\":{\"a\":1}}",
            "Anthropic batch file",
            "POST /ok {\"a\":1}",
        ),
        (
            "{\"key\":\"c\",\"request\":{\"a\":2}}",
            "Gemini batch file",
            "POST /ok {\"a\":2}",
        ),
        (
            "{\"custom_id\":\"c\",\"body\":{\"a\":3}}",
            "OpenAI batch file",
            "POST /ok {\"a\":3}",
        ),
        (
            "{\"a\":4,\"metadata\":{\"row\":7},\"custom_id\":\"c\"}",
            "request lines",
            "POST /ok {\"a\":4}",
        ),
    ] {
        let input = run.file("in.jsonl", text);
        let output = run.bulk("/ok", &input, &["--force"]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        assert!(stderr(&output).contains(said), "{}", stderr(&output));
        assert!(run.sent().contains(&sent.to_owned()), "{:?}", run.sent());
        assert_eq!(run.results()[0]["custom_id"], "c");
    }
    assert_eq!(run.results()[0]["metadata"]["row"], 7);
}

#[test]
fn calls_are_sent_with_their_method_url_headers_and_body() {
    let run = Run::new();
    let input = run.file(
        "in.jsonl",
        "{\"method\":\"GET\",\"url\":\"/ok?page=2\",\"headers\":{\"x-team\":\"search\"}}\n\
         {\"method\":\"PATCH\",\"url\":\"/ok/7\",\"body\":{\"state\": \"closed\"}}\n\
         {\"method\":\"PUT\",\"url\":\"/ok/8\",\"body\":\"as text\"}\n",
    );
    assert_eq!(code(&run.bulk("", &input, &[])), 0);
    assert_eq!(
        run.sent(),
        [
            "GET /ok?page=2 ",
            "PATCH /ok/7 {\"state\": \"closed\"}",
            "PUT /ok/8 as text"
        ]
    );
    let arrived = run.server.arrived();
    let headers: String = arrived
        .iter()
        .map(|arrived| arrived.headers.to_ascii_lowercase())
        .collect();
    assert!(headers.contains("x-team: search") && headers.contains("content-type: text/plain"));
    assert!(
        run.results()
            .iter()
            .all(|result| !result["url"].as_str().unwrap().contains('?'))
    );
}

#[cfg(unix)]
#[test]
fn what_is_read_once_is_sent_once() {
    let run = Run::new();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(THREE.as_bytes()).unwrap();
    for (content, input) in [(THREE.as_bytes().to_vec(), "-"), (gzip.finish().unwrap(), "/dev/stdin")] {
        let mut command = run.command("/ok", input, &["--force"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&content).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert_eq!(run.results().len(), 3);
    }
    assert_eq!(run.sent().len(), 6);
}

#[cfg(unix)]
#[test]
fn a_fifo_is_waited_for_and_read_once() {
    let run = Run::new();
    let fifo = run.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let writer = {
        let fifo = fifo.clone();
        std::thread::spawn(move || fs::write(fifo, THREE).unwrap())
    };
    assert_eq!(code(&run.bulk("/ok", fifo.to_str().unwrap(), &[])), 0);
    writer.join().unwrap();
    assert_eq!((run.results().len(), run.sent().len()), (3, 3));
}

#[test]
fn a_file_that_holds_no_requests_is_refused_by_name() {
    let run = Run::new();
    for (content, what) in [
        (&b"id,prompt\n1,hello\n"[..], "CSV"),
        (b"[\n  {\n    \"model\": \"m\"\n  }\n]\n", "JSON array"),
        (b"{\n  \"model\": \"m\"\n}\n", "line breaks"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
        (b"\n", "empty"),
    ] {
        let input = run.file("in", content);
        let output = run.bulk("/ok", &input, &[]);
        assert_eq!(code(&output), 1);
        assert!(stderr(&output).contains(what), "{}", stderr(&output));
    }
    assert_eq!(run.sent().len(), 0);
}

#[test]
fn nothing_is_sent_to_a_real_api_without_an_input() {
    let run = Run::new();
    let mut command = Command::new(cargo_bin_cmd!("bulk").get_program());
    command
        .current_dir(run.folder.path())
        .args(["--url", &run.server.url("/ok")]);
    let output = command.output().unwrap();
    assert_eq!((code(&output), run.sent().len()), (1, 0));
    assert!(stderr(&output).contains("no --input is given"), "{}", stderr(&output));
}

#[test]
fn a_malformed_line_has_a_result_and_the_others_are_sent() {
    let run = Run::new();
    let input = run.file("in.jsonl", format!("{THREE}[]\n{{\"a\":\n"));
    assert_eq!(code(&run.bulk("/ok", &input, &[])), 3);
    let results = run.results();
    let malformed: Vec<_> = results
        .iter()
        .filter(|result| result["error"]["type"] == "MalformedLine")
        .collect();
    assert_eq!((results.len(), malformed.len(), run.sent().len()), (5, 2, 3));
    assert!(malformed.iter().all(|result| result["status"] == "FAILED"));

    assert_eq!(
        code(&run.bulk("/ok", &input, &["--force", "--on-malformed", "skip"])),
        0
    );
    assert_eq!(run.results().len(), 3);
}

#[test]
fn failures_are_written_to_the_file_of_errors_alone() {
    let run = Run::new();
    let input = run.file(
        "in.jsonl",
        "{\"method\":\"POST\",\"url\":\"/ok\",\"body\":1}\n{\"method\":\"POST\",\"url\":\"/bad\",\"body\":2}\n[]\n",
    );
    let args = ["--errors", "errors.jsonl"];
    assert_eq!(code(&run.bulk("", &input, &args)), 3);
    assert_eq!((run.results().len(), results(&run.path("errors.jsonl")).len()), (1, 2));
    // The failed ones are sent again, and fail again.
    assert_eq!(
        code(&run.bulk("", &input, &["--errors", "errors.jsonl", "--resume"])),
        3
    );
    assert_eq!((run.results().len(), results(&run.path("errors.jsonl")).len()), (1, 2));
    assert_eq!(run.sent().len(), 3);
}

#[test]
fn results_can_be_in_the_order_of_the_input() {
    let run = Run::new();
    let lines: String = (1..=9).map(|number| format!("{{\"n\":{number}}}\n")).collect();
    let input = run.file("in.jsonl", lines);
    assert_eq!(code(&run.bulk("/late", &input, &["--ordered"])), 0);
    let order: Vec<_> = run
        .results()
        .iter()
        .map(|result| result["line"].as_u64().unwrap())
        .collect();
    assert_eq!(order, (1..=9).collect::<Vec<_>>());
}

#[test]
fn a_batch_of_results_has_the_form_of_openai_and_can_be_resumed() {
    let run = Run::new();
    let input = run.file(
        "in.jsonl",
        "{\"custom_id\":\"a\",\"body\":{\"n\":1}}\n{\"custom_id\":\"b\",\"url\":\"/bad\",\"body\":{\"n\":2}}\n",
    );
    let args = ["--output-format", "openai-batch"];
    assert_eq!(code(&run.bulk("", &input, &args)), 3);
    let results = run.results();
    let of = |id: &str| results.iter().find(|result| result["custom_id"] == id).unwrap();
    let (a, b) = (of("a"), of("b"));
    assert_eq!(a["response"]["body"]["usage"]["total_tokens"], 12);
    assert_eq!(
        (&a["response"]["status_code"], &a["response"]["request_id"], &a["error"]),
        (&200.into(), &"req_1".into(), &Value::Null)
    );
    assert!(a["id"].is_string());
    assert_eq!(
        (&b["response"]["status_code"], b["error"]["message"].is_string()),
        (&400.into(), true)
    );

    run.bulk("", &input, &["--output-format", "openai-batch", "--resume"]);
    assert_eq!(run.sent().iter().filter(|sent| sent.contains("\"n\":1")).count(), 1);
    assert_eq!(run.sent().iter().filter(|sent| sent.contains("\"n\":2")).count(), 2);
}

#[test]
fn results_of_another_api_are_not_taken_for_done() {
    let run = Run::new();
    let chat = |number| {
        format!("{{\"model\":\"m\",\"max_tokens\":1,\"messages\":[{{\"role\":\"user\",\"content\":\"{number}\"}}]}}\n")
    };
    let input = run.file("in.jsonl", (1..=3).map(chat).collect::<String>());
    let mut local = Command::new(cargo_bin_cmd!("bulk").get_program());
    let out = run.path("out.jsonl");
    local.args([
        "--input",
        &input,
        "--output",
        out.to_str().unwrap(),
        "--rpm",
        "off",
        "--tpm",
        "off",
    ]);
    assert_eq!(code(&local.output().unwrap()), 0);
    assert!(
        run.results()
            .iter()
            .all(|result| result["demonstration"] == true && result["host"] == "(local provider)")
    );

    let output = run.bulk("/ok", &input, &["--resume"]);
    assert_eq!((code(&output), run.sent().len()), (0, 3));
    assert!(stderr(&output).contains("3 results are of (local provider): those requests are sent again"));
    assert_eq!(
        (code(&run.bulk("/ok", &input, &["--resume"])), run.sent().len()),
        (0, 3)
    );

    // Another server is another API.
    let other = Run::new();
    fs::copy(&out, other.path("out.jsonl")).unwrap();
    assert_eq!(
        (code(&other.bulk("/ok", &input, &["--resume"])), other.sent().len()),
        (0, 3)
    );
}

#[test]
fn a_result_that_was_cut_off_is_sent_again_and_its_line_is_whole() {
    let run = Run::new();
    let input = run.file("in.jsonl", THREE);
    assert_eq!(code(&run.bulk("/ok", &input, &[])), 0);
    // As after a kill in the middle of a line.
    let written = fs::read(run.path("out.jsonl")).unwrap();
    fs::write(run.path("out.jsonl"), &written[..written.len() - 40]).unwrap();
    assert_eq!(code(&run.bulk("/ok", &input, &["--resume"])), 0);
    assert_eq!((run.results().len(), run.sent().len()), (3, 4));
}

#[test]
fn a_file_of_something_else_is_neither_continued_nor_overwritten() {
    let run = Run::new();
    let input = run.file("in.jsonl", THREE);
    let notes = "notes of a user\n";
    for args in [
        &[][..],
        &["--resume"],
        &["--errors", "out.jsonl", "--output", "other.jsonl"],
        &["--errors", "out.jsonl", "--output", "other.jsonl", "--resume"],
        &["--output", ".", "--force"],
        &["--errors", "-", "--force"],
        &["--errors", "/dev/stdout", "--output", "-"],
    ] {
        run.file("out.jsonl", notes);
        assert_eq!(code(&run.bulk("/ok", &input, args)), 1, "{args:?}");
        assert_eq!(fs::read_to_string(run.path("out.jsonl")).unwrap(), notes);
    }
    assert_eq!(code(&run.bulk("/ok", &input, &["--output", "in.jsonl", "--force"])), 1);
    assert_eq!(
        (fs::read_to_string(&input).unwrap().as_str(), run.sent().len()),
        (THREE, 0)
    );
}

#[test]
fn a_demonstration_does_not_overwrite_answers_of_an_api() {
    let run = Run::new();
    let input = run.file("in.jsonl", "{\"model\":\"m\",\"messages\":[]}\n");
    let demonstrate = || {
        let mut command = Command::new(cargo_bin_cmd!("bulk").get_program());
        command.current_dir(run.folder.path());
        let output = command
            .args(["--input", &input, "--rpm", "off", "--tpm", "off"])
            .output();
        code(&output.unwrap())
    };
    assert_eq!((demonstrate(), demonstrate()), (0, 0));
    assert_eq!(results(&run.path("results.jsonl")).len(), 1);
    let args = ["--output", "results.jsonl", "--resume"];
    assert_eq!(code(&run.bulk("/ok", &input, &args)), 0);
    assert_eq!(demonstrate(), 1);
    assert_eq!(results(&run.path("results.jsonl")).len(), 2);
}

#[cfg(unix)]
#[test]
fn a_second_run_on_a_link_to_the_same_output_is_refused() {
    let run = Run::new();
    let input = run.file("in.jsonl", "{\"n\":1}\n");
    std::os::unix::fs::symlink("out.jsonl", run.path("link.jsonl")).unwrap();
    let args = ["--output", "link.jsonl", "--resume"];
    let mut first = run
        .command("/slow", &input, &args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while run.server.arrived().is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(code(&run.bulk("/ok", &input, &args)), 1);
    assert_eq!(code(&run.bulk("/ok", &input, &["--resume"])), 1);
    assert_eq!(first.wait().unwrap().code(), Some(0));
    assert_eq!((run.results().len(), run.sent().len()), (1, 1));
}

#[test]
fn a_second_run_on_the_same_output_is_refused() {
    let run = Run::new();
    let input = run.file("in.jsonl", "{\"n\":1}\n");
    let mut first = run
        .command("/slow", &input, &[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while run.server.arrived().is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let second = run.bulk("/ok", &input, &["--resume"]);
    assert_eq!(code(&second), 1);
    assert!(
        stderr(&second).contains(&format!("process {} on ", first.id())),
        "{}",
        stderr(&second)
    );
    assert_eq!(first.wait().unwrap().code(), Some(0));
    assert!(!run.path("out.jsonl.lock").exists());
    assert_eq!((run.results().len(), run.sent().len()), (1, 1));
}

#[test]
fn standard_output_holds_results_and_nothing_else() {
    let run = Run::new();
    let input = run.file("in.jsonl", THREE);
    let output = run.bulk("/ok", &input, &["--output", "-"]);
    assert_eq!(code(&output), 0);
    let lines: Vec<Value> = output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_ends_the_run_quietly() {
    let run = Run::new();
    let lines: String = (0..500).map(|number| format!("{{\"n\":{number}}}\n")).collect();
    let input = run.file("in.jsonl", lines);
    let mut child = run
        .command("/ok", &input, &["--output", "-", "--quiet"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 141);
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_output_ends_the_run_with_the_reason() {
    let run = Run::new();
    let input = run.file("in.jsonl", THREE);
    let output = run.bulk("/ok", &input, &["--output", "/dev/full"]);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("No space left"), "{}", stderr(&output));
}
