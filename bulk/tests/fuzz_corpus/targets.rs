//! The fuzz targets of `bulk`: a function for each parser of user input. Each function takes any bytes, and checks what
//! must hold for every input.

#![allow(unreachable_pub)]

use crate::{
    args::Args,
    input::{Requests, Tokens},
};
use clap::Parser;
use std::borrow::Cow;

/// The secret that the targets add to inputs. An input that contains the beginning of the secret already is skipped.
const MARK: &str = "Zq9Xw7Kv";

fn text_of(data: &[u8]) -> Option<Cow<'_, str>> {
    let text = String::from_utf8_lossy(data);
    (!text.to_ascii_lowercase().contains("zq9")).then_some(text)
}

/// The input is a file of requests. Each line must be a request or malformed and have its number, and the body of a
/// request must be a valid request line again.
pub fn bulk_input(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let lines = data.split(|byte| *byte == b'\n').count() as u64;
    for path in [None, Some("a.b/c~.0")] {
        let mut requests = Requests::new(data, Tokens::new(path, 1.0));
        let mut last = 0;
        while let Some(line) = runtime.block_on(requests.next()).expect("memory can be read") {
            let number = match line {
                Ok(request) => {
                    let body: serde_json::Value = serde_json::from_slice(&request.body).expect("a body is JSON");
                    assert!(body.is_object(), "{body}");
                    // The body, parsed as a line of the input, is a valid request, too.
                    let mut again = Requests::new(&*request.body, Tokens::Estimate(1.0));
                    let again = runtime.block_on(again.next()).expect("memory can be read");
                    assert!(matches!(again, Some(Ok(_))), "{body}");
                    request.line
                }
                Err(malformed) => {
                    assert!(!malformed.reason.is_empty());
                    malformed.line
                }
            };
            assert!(number > last && number <= lines);
            last = number;
        }
    }
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
