//! The fuzz targets of `bulk`: a function for each parser of user input. Each function takes any bytes, and checks what
//! must hold for every input.

#![allow(unreachable_pub)]

use crate::{
    args::Args,
    input::{Form, Options, Requests},
};
use clap::Parser;
use std::{borrow::Cow, sync::LazyLock};

/// The secret that the targets add to inputs. An input that contains the beginning of the secret already is skipped.
const MARK: &str = "Zq9Xw7Kv";

/// How `bulk_input` reads its input, and whether each line is then a body. They are made once, because parsing a command
/// line takes longer than reading a small input.
static OPTIONS: LazyLock<Vec<(bool, Options)>> = LazyLock::new(|| {
    let command_lines = [
        &["bulk"][..],
        &["bulk", "--input-format", "lines", "--tokens-field", "a.b/c~.0"],
        &["bulk", "--input-format", "rest", "--max-line", "100"],
    ];
    let options = command_lines.into_iter().map(|args| {
        let args = Args::parse_from(args);
        let target = args.send.target().expect("no URL");
        (args.files.form() == Some(Form::Lines), Options::new(&args, target))
    });
    options.collect()
});

fn text_of(data: &[u8]) -> Option<Cow<'_, str>> {
    let text = String::from_utf8_lossy(data);
    (!text.to_ascii_lowercase().contains("zq9")).then_some(text)
}

/// The input is a file of requests, in a form that is recognized or given. Each line must be a request or malformed and
/// have its number. A request that is a line itself must be valid JSON, and its body a request again.
pub fn bulk_input(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let lines = data.split(|byte| *byte == b'\n').count() as u64;
    for (are_bodies, options) in OPTIONS.iter() {
        let opened = runtime.block_on(Requests::from_memory(data, options));
        let mut requests = match opened {
            Ok(requests) => requests,
            Err(error) => {
                assert!(!format!("{error:#}").is_empty());
                continue;
            }
        };
        let is_compressed = data.starts_with(&[0x1f, 0x8b]) || data.starts_with(&[0x28, 0xb5]);
        let mut last = 0;
        // A compressed input may be broken.
        while let Ok(Some(line)) = runtime.block_on(requests.next()) {
            let number = match line {
                Ok(request) => {
                    let is_json = !request.headers.contains_key("content-type") && !request.body.is_empty();
                    if is_json {
                        serde_json::from_slice::<serde::de::IgnoredAny>(&request.body).expect("a body is JSON");
                    }
                    if *are_bodies && !is_compressed {
                        let line = data.split(|byte| *byte == b'\n').nth(request.line as usize - 1);
                        assert_is_without_names(line.unwrap_or_default(), &request.body);
                    }
                    request.line
                }
                Err(malformed) => {
                    assert!(!malformed.reason.is_empty());
                    malformed.line
                }
            };
            assert!(number > last);
            assert!(number <= lines || is_compressed);
            last = number;
        }
    }
}

/// Asserts that a body is its line without the fields that are not sent. Nothing is asserted where the line is too deep
/// to be compared.
fn assert_is_without_names(line: &[u8], body: &[u8]) {
    let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line);
    let Ok(mut expected) = serde_json::from_slice::<serde_json::Value>(line) else {
        return;
    };
    let is_stored = expected["store"] == true;
    let fields = expected.as_object_mut().expect("a request is an object");
    fields.remove("custom_id");
    if !is_stored {
        fields.remove("metadata");
    }
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(body).expect("a body is JSON"),
        expected
    );
}

/// The input is a command line, with one argument per line. Errors about a header or a URL must not show its value.
pub fn bulk_args(data: &[u8]) {
    let Some(text) = text_of(data) else { return };
    if let Ok(args) = Args::try_parse_from(std::iter::once("bulk").chain(text.lines())) {
        let _ = (args.files.input(), args.files.output(), args.is_demonstration());
        let _ = args.send.target();
    }
    for planted in [
        format!("--header=x: {text}{MARK}"),
        format!("--header=x{text}{MARK}"),
        format!("--url={text}{MARK}"),
        format!("--url=http://u:{MARK}@{text}"),
    ] {
        let args = Args::try_parse_from(["bulk", &planted]).unwrap_or_else(|error| panic!("{error}"));
        if let Err(error) = args.send.target() {
            let message = format!("{error:#} {error:?}");
            // The error for an invalid value shows the name of the header, which may hold the secret.
            let is_name = planted.starts_with("--header=x") && text.contains(':');
            assert!(is_name || !message.contains(MARK), "{planted:?}: {message}");
        }
    }
}
