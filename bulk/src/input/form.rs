//! The forms that a file of requests may have, and files that are no such file.

use super::fields::Fields;
use std::fmt;

/// Where in its line a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The line is the body; `custom_id` and `metadata` are cut out.
    Lines,
    /// `{"custom_id": …, "body": {…}}`: an OpenAI batch file, also without `method` and `url`.
    OpenAiBatch,
    /// `{"custom_id": …, "params": {…}}`
    AnthropicBatch,
    /// `{"key": …, "request": {…}}`
    GeminiBatch,
    /// `{"method": …, "url": …, "headers": {…}, "body": …}`: any call.
    Rest,
}

/// The fields by which a line is known as the body itself, whatever else it holds.
const BODY_FIELDS: [&str; 5] = ["model", "messages", "input", "prompt", "contents"];

/// All fields of a line that describes a call, with or without a `url`.
const REST_FIELDS: [&str; 6] = ["custom_id", "metadata", "method", "url", "headers", "body"];

impl Form {
    /// Recognizes the form of a line by its fields, without `own_field`, which is a field of this program in any form.
    pub(super) fn of(fields: &Fields<'_>, own_field: &str) -> Self {
        let is_object = |name| fields.get(name).is_some_and(|value| value.get().starts_with('{'));
        let is_string = |name| fields.get(name).is_some_and(|value| value.get().starts_with('"'));
        let is_body = BODY_FIELDS.iter().any(|name| fields.has(name));
        let has_url = is_string("method") && is_string("url");
        // A line with other fields may be a body itself, as that of an API for mails: `{"to": …, "body": {…}}`.
        let names = || fields.names().filter(|name| *name != own_field);
        let has_call_fields_only = names().all(|name| REST_FIELDS.contains(&name));
        let is_call = is_string("url") && fields.has("body") && has_call_fields_only;
        if is_object("body") && (has_url || has_call_fields_only) {
            let is_post = fields.get("method").is_none_or(|method| method.get() == "\"POST\"");
            if is_post && !fields.has("headers") {
                Self::OpenAiBatch
            } else {
                Self::Rest
            }
        } else if has_url || is_call {
            Self::Rest
        } else if is_object("params") && fields.has("custom_id") && !is_body && !fields.has("method") {
            Self::AnthropicBatch
        } else if is_object("request")
            && !is_body
            && (fields.has("key") || fields.has("custom_id") || names().count() == 1)
        {
            Self::GeminiBatch
        } else {
            Self::Lines
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lines => "request lines: each line is the body of a request",
            Self::OpenAiBatch => "OpenAI batch file: the `body` of each line is sent, to its `url` if it has one",
            Self::AnthropicBatch => "Anthropic batch file: the `params` of each line are sent",
            Self::GeminiBatch => "Gemini batch file: the `request` of each line is sent",
            Self::Rest => "REST calls: the `body` of each line is sent, with its `method`, `url` and `headers`",
        })
    }
}

/// Returns whether the first line of a file opens an array or an object that ends in a later line.
pub(super) fn is_opened(line: &[u8]) -> bool {
    let is_json = || serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok();
    line == b"{" || (line.starts_with(b"[") && !is_json())
}

/// What a file looks like that is no file of requests, and what to do with it.
///
/// `head` is the beginning of the file, whose first lines hold no JSON object. `is_whole` tells that the file has
/// nothing more. Returns `None` if the lines may be meant as requests, so that each of them is malformed.
pub(super) fn what_it_is(head: &[u8], is_whole: bool) -> Option<&'static str> {
    if let Some(binary) = binary(head) {
        return Some(binary);
    }
    // The end of the head may be in the middle of a character.
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() && !is_whole => {
            std::str::from_utf8(&head[..error.valid_up_to()]).ok()?
        }
        Err(_) => return Some("text that is not UTF-8; convert it with iconv -t UTF-8"),
    };
    let text = text.trim_start_matches('\u{feff}').trim();
    let first = text.lines().next().unwrap_or_default().trim();
    match text.chars().next() {
        None => Some("an empty file: it holds no requests"),
        Some('[') => Some("a JSON array; one object per line is needed: jq -c '.[]' FILE > requests.jsonl"),
        Some('{') if spans_lines(text, is_whole) => Some(
            "JSON with line breaks inside of an object; one object per line is needed: jq -c . FILE > requests.jsonl",
        ),
        Some('{') => None,
        Some('<') => Some("HTML or XML; one JSON object per line is needed"),
        _ if first.contains('\t') => Some("a table with tabs (TSV); one JSON object per line is needed"),
        _ if first.contains([',', ';']) => Some("a table (CSV); one JSON object per line is needed"),
        _ => Some("text that is no JSON; one JSON object per line is needed"),
    }
}

fn binary(head: &[u8]) -> Option<&'static str> {
    const KINDS: [(&[u8], &str); 6] = [
        (b"PK\x03\x04", "a zip archive or an Excel file"),
        (b"PAR1", "a Parquet file"),
        (b"BZh", "a file compressed by bzip2; bzcat FILE | bulk --input -"),
        (b"\xfd7zXZ", "a file compressed by xz; xzcat FILE | bulk --input -"),
        (b"%PDF", "a PDF file"),
        (b"SQLite format", "an SQLite database"),
    ];
    let is_utf16 = head.starts_with(b"\xff\xfe")
        || head.starts_with(b"\xfe\xff")
        || (head.len() >= 4 && head[..4].iter().filter(|byte| **byte == 0).count() == 2);
    if is_utf16 {
        return Some("UTF-16; convert it with iconv -f UTF-16 -t UTF-8");
    }
    let kind = KINDS.iter().find(|(magic, _)| head.starts_with(magic));
    kind.map(|(_, kind)| *kind).or_else(|| {
        head.contains(&0)
            .then_some("a binary file; one JSON object per line is needed")
    })
}

/// Returns whether the first JSON value of the text ends in another line than it begins.
fn spans_lines(text: &str, is_whole: bool) -> bool {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<serde::de::IgnoredAny>();
    let has_lines = text.contains('\n');
    match values.next() {
        Some(Ok(_)) => text[..values.byte_offset()].contains('\n'),
        Some(Err(error)) => has_lines && !is_whole && error.is_eof(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(text: &str) -> Form {
        Form::of(&Fields::parse(text).unwrap(), "")
    }

    #[test]
    fn a_field_of_this_program_does_not_change_the_form() {
        for (text, with, without) in [
            (r#"{"custom_id":1,"body":{},"cost":{}}"#, Form::OpenAiBatch, Form::Lines),
            (
                r#"{"request":{"contents":[]},"cost":{}}"#,
                Form::GeminiBatch,
                Form::Lines,
            ),
            (r#"{"prompt":"x","cost":{}}"#, Form::Lines, Form::Lines),
        ] {
            let fields = Fields::parse(text).unwrap();
            assert_eq!((Form::of(&fields, "cost"), form(text)), (with, without), "{text}");
        }
    }

    #[test]
    fn the_form_is_recognized_by_the_fields_of_a_line() {
        for (text, expected) in [
            (r#"{"model":"m","messages":[]}"#, Form::Lines),
            (r#"{"custom_id":1,"input":"x","metadata":{}}"#, Form::Lines),
            (r#"{"custom_id":1,"body":{}}"#, Form::OpenAiBatch),
            (
                r#"{"custom_id":1,"method":"POST","url":"/v1/embeddings","body":{}}"#,
                Form::OpenAiBatch,
            ),
            (r#"{"custom_id":1,"params":{}}"#, Form::AnthropicBatch),
            (r#"{"key":"a","request":{"contents":[]}}"#, Form::GeminiBatch),
            (r#"{"method":"GET","url":"/x"}"#, Form::Rest),
            (r#"{"method":"PATCH","url":"/x","body":{}}"#, Form::Rest),
            (r#"{"url":"/x","body":"text"}"#, Form::Rest),
            (r#"{"body":{},"headers":{"a":"b"}}"#, Form::Rest),
        ] {
            assert_eq!(form(text), expected, "{text}");
        }
    }

    #[test]
    fn a_body_with_fields_of_those_names_is_a_body() {
        for text in [
            r#"{"url":"https://example.com","formats":["markdown"]}"#,
            r#"{"jsonrpc":"2.0","custom_id":1,"method":"sum","params":{}}"#,
            r#"{"model":"m","custom_id":1,"params":{}}"#,
            r#"{"request":{},"other":1}"#,
            r#"{"body":"hello"}"#,
            r#"{"to":"a","subject":"b","body":{"text":"c"}}"#,
            r#"{"custom_id":1,"model":"m","messages":[],"body":{}}"#,
        ] {
            assert_eq!(form(text), Form::Lines, "{text}");
        }
    }

    #[test]
    fn a_file_that_holds_no_lines_of_requests_is_named() {
        let utf16: Vec<_> = "{\"a\":1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (head, expected) in [
            (&b""[..], "an empty file"),
            (b"\xef\xbb\xbf\r\n", "an empty file"),
            (b"[\n  {\n    \"a\": 1\n  }\n]", "a JSON array"),
            (b"[{\"a\":1},{\"a\":2}]", "a JSON array"),
            (b"{\n  \"a\": 1\n}\n{\n  \"a\": 2\n}\n", "JSON with line breaks"),
            (b"id,prompt\n1,hello\n", "a table (CSV)"),
            (b"id\tprompt\n1\thello\n", "a table with tabs"),
            (&utf16, "UTF-16"),
            (b"\xff\xfe{\0", "UTF-16"),
            (b"PK\x03\x04\0\0", "a zip archive"),
            (b"\x01\x02\0\x03\x04\x05", "a binary file"),
            (b"<html>", "HTML"),
            (b"ask this\nand that\n", "text that is no JSON"),
            (b"caf\xe9, cr\xe8me\n", "text that is not UTF-8"),
        ] {
            let what = what_it_is(head, true).unwrap_or_default();
            assert!(what.starts_with(expected), "{what:?}, not {expected:?}");
        }
    }

    #[test]
    fn lines_that_begin_as_objects_are_malformed_lines_and_not_another_file() {
        assert_eq!(what_it_is(b"{\"a\":}\n", true), None);
        assert_eq!(what_it_is(b"{\"a\":\n", true), None);
        assert!(what_it_is(b"{\n\"a\": [\n", false).is_some());
    }
}
