//! Tests where a text, a URL or a name can hide a secret, and that everything else is recorded unchanged.

use crate::recorded;
use http::Request;
use tower_outbound::event::{Metadata, Payload, ResponseDetails, Value};

/// Checks that the secret `s3cr3t` is removed from each text, and that the recorded text shows a redaction.
fn check(texts: &[&str], record: impl Fn(&str) -> String) {
    let recorded = texts.iter().map(|text| (text, record(text)));
    let leaks = recorded.filter(|(_, clean)| clean.contains("s3cr3t") || !clean.contains("[redacted]"));
    let leaks: Vec<_> = leaks
        .map(|(text, clean)| format!("{text}  is recorded as  {clean}"))
        .collect();
    assert!(leaks.is_empty(), "{leaks:#?}");
}

/// Checks each URL twice: as the URL of a request, and inside a text.
fn check_urls(urls: &[&str]) {
    check(urls, recorded::text);
    check(urls, |url| recorded::url(url).expect("a URL"));
}

fn check_untouched(texts: &[&str]) {
    for text in texts {
        assert_eq!(recorded::text(text), *text);
    }
}

#[test]
fn a_parameter_with_a_secret_in_its_name_or_value_is_redacted_however_often_it_is_encoded() {
    check_urls(&[
        "http://h/?api%255Fkey=s3cr3t",
        "http://h/?%2574%256f%256b%2565%256e=s3cr3t",
        "http://h/?next=%2Fcb%3Ftoken%3Ds3cr3t",
        "http://h/?next=/cb?token=s3cr3t",
        "http://h/?next=https%253A%252F%252Fh%252F%253Ftoken%253Ds3cr3t",
        "http://h/?next=https%253A%252F%252Fu%253As3cr3t%2540h%252F",
        "http://h/?next=https:%2F%2F%2Fu:s3cr3t%40h",
        "http://h/?next=%2525252525252574oken=s3cr3t",
        "http://h/?data=%7B%22api_key%22%3A%22s3cr3t%22%7D",
        "http://h/?header=Bearer%20s3cr3t",
        "http://h/?header=Authorization:+Bearer+s3cr3t",
        "http://h/?token%3Ds3cr3t",
        "http://h/?a&token%3Ds3cr3t=&b",
        "http://h/fetch?https://u:s3cr3t@h/",
        "http://h/?a=1%26token%3Ds3cr3t",
    ]);
    check_untouched(&[
        "http://h/?next=%2Fcb%3Fpage%3D2&data=YWJjZA==&q=a+basic+question",
        "http://h/?q=100%25&a//b@c&token=",
        "a==b, ===== c ===== d",
    ]);
}

#[test]
fn any_separator_ends_a_parameter() {
    check_urls(&[
        "http://h/?a=1;token=s3cr3t",
        "http://h/?a=1;token=ab;s3cr3t&b=2",
        "http://h/?a=1,token=s3cr3t",
        "http://h/?a=1|token=s3cr3t",
        "http://h/?a=1%3Btoken=s3cr3t",
    ]);
    assert_eq!(
        recorded::url("http://h/?a=1;token=s3cr3t&b=2").as_deref(),
        Some("http://h/?a=[redacted]&b=2")
    );
}

/// On the small stack of this thread, recursion would overflow, and a search whose cost doubles with every level would
/// not end.
#[test]
fn deeply_nested_urls_cost_neither_stack_nor_time() {
    let check = || {
        for nested in [
            "a=//?",
            "a=",
            "//?",
            "{\"a\":[",
            "Bearer ",
            "%25",
            "'",
            "//a:b@",
            "token=%3D",
        ] {
            let text = format!("//?{}token=s3cr3t", nested.repeat(20_000));
            assert!(!recorded::text(&text).contains("s3cr3t"), "{nested}");
        }
    };
    let small = std::thread::Builder::new().stack_size(256 * 1024);
    small.spawn(check).unwrap().join().unwrap();
}

#[test]
fn every_url_in_a_word_or_a_path_loses_its_user_info() {
    for (text, clean) in [
        ("https://a/web/https://u:s3cr3t@h/b", "https://a/web/https://h/b"),
        ("https://a/,https://u:s3cr3t@h/", "https://a/,https://h/"),
        ("http://u:s3cr3t@a|http://u:s3cr3t@b", "http://a|http://b"),
        ("url=https://u:s3cr3t@h/", "url=https://h/"),
        ("a//b:https://u:s3cr3t@h/", "a//b:https://h/"),
        ("http:///u:s3cr3t@h/", "http:///h/"),
        ("//u:s3cr3t@h/", "//h/"),
        ("https://h/npm//@scope/name", "https://h/npm//@scope/name"),
    ] {
        assert_eq!(recorded::text(text), clean);
        if let Some(url) = recorded::url(text) {
            assert_eq!(url, clean);
        }
    }
    check(&["password=ab://s3cr3t", "a=1&token=//s3cr3t"], recorded::text);
}

#[test]
fn a_secret_name_is_recognized_in_odd_case_with_a_number_and_without_separators() {
    for name in [
        "ToKeN",
        "aPi_KeY",
        "pAssWord",
        "SIGnature",
        "api_key2",
        "api-key-2",
        "token1",
        "x-secret-v2",
        "api_keys",
        "passwords",
        "cookies",
        "oauth",
        "PHPSESSID",
        "jsessionid",
        "privatekey",
        "dbpasswd",
    ] {
        check_urls(&[&format!("http://h/?{name}=s3cr3t")]);
        check(&["s3cr3t"], |secret| {
            recorded::payload(Value::from([(name, secret.into())])).to_string()
        });
    }
    for name in [
        "max_tokens",
        "maxTokens",
        "totaltokens",
        "input_tokens2",
        "x-ratelimit-remaining-tokens",
        "promptTokenCount",
        "sortKeys",
        "monkeys",
        "primary_key",
        "sha256",
        "compass",
        "author",
    ] {
        check_untouched(&[&format!("http://h/?{name}=s3cr3t")]);
    }
}

#[test]
fn a_quoted_field_of_secret_name_is_redacted_however_it_is_written() {
    check(
        &[
            r#"token="s3cr3t""#,
            r#"token = "a b s3cr3t", b=1"#,
            r#"{"token":["s3cr3t"]}"#,
            r#"{"cookies": [{"a": "]}\"s3cr3t"}, "s3cr3t"], "b": 1}"#,
            r#"{"token":{"a":{"b":["]s3cr3t"]}}}"#,
            r#"{"token":["a","s3cr3t"#,
            r#"{"token":"s3cr3t"#,
            r#"{"token":"a\\\"s3cr3t"}"#,
            r#"Error { body: "{\"api_key\":\"s3cr3t\"}" }"#,
            r#"Error { body: "{\"api_key\" : \"a\\\"s3cr3t\"}" }"#,
            r#"Error { body: "{\"token\":[\"a\",\"s3cr3t\"]}" }"#,
            r#"\\\"api_key\\\":\\\"s3cr3t\\\""#,
            r#"Error { api_key: "s3cr3t" }"#,
            "Error {\n    api_key: \"s3cr3t\",\n}",
            r#"Url { username: "u", password: Some("s3cr3t") }"#,
            r#"Config { token: Some(Token(b"s3cr3t")) }"#,
            r#"Config { token: ["s3cr3t"] }"#,
            "{'api_key':'s3cr3t'}",
            r#"{"auth/api key":"s3cr3t"}"#,
            "{'api_key': b's3cr3t'}",
            "api_key='a s3cr3t'",
            "{'api_key': b0'} api_key='s3cr3t'",
            r#"UsernameToken Username="u", PasswordDigest="s3cr3t""#,
        ],
        recorded::text,
    );
    check_untouched(&[
        r#"{"a":"b","tokens":[1,2],"token_count":"3","next":{"sortKey":"x"}}"#,
        r#"it's invalid: expected "," found "token", isn't it"#,
        r#"invalid token "abc": no 'token' here"#,
        r#"token="" token: """#,
        "session: Session { id: 1 }",
    ]);
    assert_eq!(
        recorded::text(r#"{"a":1,"token":["x",{"b":"]"}],"c":"d"}"#),
        r#"{"a":1,"token":[redacted],"c":"d"}"#
    );
}

#[test]
fn a_credential_after_a_scheme_is_redacted_whatever_separates_them() {
    check(
        &[
            "Bearer s3cr3t",
            "bEARER   s3cr3t",
            "Bearer Bearer s3cr3t",
            "Bearer\ts3cr3t",
            "Bearer\ns3cr3t",
            "Bearer \"s3cr3t\"",
            "Bearer <s3cr3t>",
            "(Bearer 's3cr3t')",
            "Authorization:Bearer s3cr3t",
            "authorization=Bearer s3cr3t",
            "-H 'Authorization:Basic  s3cr3t='",
        ],
        recorded::text,
    );
    assert_eq!(
        recorded::text(r#"{"token_type":"bearer","expires_in":"3600"}"#),
        r#"{"token_type":"bearer","expires_in":"3600"}"#
    );
}

/// A text is redacted twice when an error contains another error or the message of a panic: each is redacted already.
#[test]
fn redacting_a_text_twice_changes_nothing() {
    for text in [
        "Bearer s3cr3t",
        "Basic s3cr3t=",
        "(http://h/?token=s3cr3t).",
        "[token=s3cr3t]",
        "http://h/?token=s3cr3t&a=1#sig=s3cr3t",
        r#"{"token":["s3cr3t"],"sig":"s3cr3t"}"#,
        "http://h/?next=//u:s3cr3t@h",
        "http://h/?token=s3cr3t'abc': refused'd",
    ] {
        let once = recorded::text(text);
        assert!(once.contains("[redacted]"), "{once}");
        assert_eq!(recorded::text(&once), once);
    }
}

#[test]
fn a_backtick_can_be_part_of_a_secret() {
    check_urls(&["http://h/?token=ab`s3cr3t"]);
    assert_eq!(
        recorded::text("see `http://u:s3cr3t@h/?token=s3cr3t`, or `Bearer s3cr3t`"),
        "see `http://h/?token=[redacted]`, or `Bearer [redacted]`"
    );
}

#[test]
fn a_url_as_the_name_of_a_field_is_redacted() {
    let fields = || Value::from([("http://u:s3cr3t@h/?token=s3cr3t", Value::from(1))]);
    let clean = r#"{"http://h/?token=[redacted]":1}"#;
    assert_eq!(recorded::payload(fields()).to_string(), clean);
    let metadata = recorded::metadata("http://u:s3cr3t@h/?token=s3cr3t", 1.into());
    assert_eq!(Value::from(metadata).to_string(), clean);
}

#[test]
fn debug_output_of_what_is_to_be_recorded_shows_no_secret() {
    let fields = || Value::from([("token", Value::from("s3cr3t")), ("a", "http://u:s3cr3t@h".into())]);
    let Value::Object(map) = fields() else { unreachable!() };
    let mut details = ResponseDetails::default();
    details.failure("http://u:s3cr3t@h/?token=s3cr3t", "Bearer s3cr3t");
    for shown in [
        format!("{:?} {:#?}", Payload(fields()), Payload(fields())),
        format!("{:?} {:#?}", Metadata(map.clone()), Metadata(map)),
        format!("{details:?} {details:#?}"),
    ] {
        assert!(!shown.contains("s3cr3t") && shown.contains("[redacted]"), "{shown}");
    }
}

#[test]
fn a_body_that_is_set_on_a_handle_is_redacted() {
    let event = recorded::event(Request::new(()));
    event.set_response_body(Value::from([
        ("token", Value::from("s3cr3t")),
        ("a", "http://u:s3cr3t@h".into()),
    ]));
    let body = event.snapshot().response_body.unwrap();
    assert_eq!(body.to_string(), r#"{"a":"http://h","token":"[redacted]"}"#);
}
