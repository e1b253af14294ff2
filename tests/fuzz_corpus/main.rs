//! Runs the fuzz targets (see `fuzz/`) over their seeds and over random texts, with a stable compiler.
#![cfg(all(feature = "serde", feature = "json"))]

#[allow(dead_code)]
#[path = "../../examples/bulk/args.rs"]
mod args;
#[allow(dead_code)]
#[path = "../../examples/bulk/input.rs"]
mod input;
#[allow(dead_code)]
#[path = "../../examples/bulk/limits.rs"]
mod limits;
#[path = "../secrets/recorded.rs"]
mod recorded;
mod targets;

use proptest::prelude::*;
use std::{fs, path::Path};

/// Runs the target on each seed, on each of its prefixes, and with each of its bytes changed.
fn over_the_seeds(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut seeds = 0;
    for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let seed = fs::read(entry.unwrap().path()).unwrap();
        target(&seed);
        for at in 0..seed.len() {
            target(&seed[..at]);
            let mut changed = seed.clone();
            for byte in [b'"', b'\\', b'&', b'=', b'%', b'\n', 0xff, b'0'] {
                changed[at] = byte;
                target(&changed);
            }
        }
        seeds += 1;
    }
    assert!((3..20).contains(&seeds), "{seeds} seeds in {}", folder.display());
}

/// Runs the target on random bytes and on random texts, many of them built from `words`, which mean something to the
/// target. At least 2,000 cases; `PROPTEST_CASES` sets more.
fn over_random_texts(target: fn(&[u8]), words: &'static str) {
    let config = ProptestConfig::default();
    let config = ProptestConfig {
        cases: config.cases.max(2_000),
        failure_persistence: None,
        ..config
    };
    let words = proptest::collection::vec(
        prop_oneof![3 => proptest::sample::select(pieces(words)), 1 => ".{0,3}"],
        0..12,
    );
    let inputs = prop_oneof![
        6 => words.prop_map(|words| words.concat().into_bytes()),
        2 => ".{0,40}".prop_map(String::into_bytes),
        1 => any::<Vec<u8>>(),
    ];
    proptest!(config, |(input in inputs)| target(&input));
}

fn pieces(words: &str) -> Vec<String> {
    let signs = words
        .chars()
        .filter(|letter| letter.is_ascii_punctuation())
        .map(String::from);
    words
        .split_whitespace()
        .map(str::to_owned)
        .chain(signs)
        .chain([" ".to_owned(), "\n".to_owned()])
        .collect()
}

macro_rules! targets {
    ($($target:ident: $words:expr;)*) => {$(
        #[test]
        fn $target() {
            over_the_seeds(stringify!($target), targets::$target);
            over_random_texts(targets::$target, $words);
        }
    )*};
}

targets! {
    answer: r#"{"usage":{"total_tokens": "prompt_tokens": 9 -1 1.5 null}} "message": "response": "usageMetadata": "error":{"code":"insufficient_quota" "details":[ "retryDelay":"1.5s" "violations": "quotaId":"PerDay" limit: 0 data: event: : \n \r\n messages content max_tokens [ ] { } , " :"#;
    bulk_args: "--url=http://h/ --header=a: --rpm=1 --tpm=off --timeout=0.1 --api-key-env=HOME --input=a \n \r\n 1e400 nan";
    bulk_input: r#"{"custom_id":1} {"body": {"max_tokens":9, "messages":[{"content":" "text": 18446744073709551615 1e9 "}]} null [[[[[["#;
    config: r#"{"queue_capacity": "workers": "requests_rate": "requests_period_secs": "requests_burst": "tokens_rate": "tokens_period_secs": "tokens_burst": 1e308 1e-6 0.5 18446744073709551615 null -1 , }"#;
    feedback: r#"H I J K L M N O P Q R S T U V W X Y Z a b c d e 1 60 -1 1.5 2m59.56s 12ms 99999999999999999999 2026-02-25T20:02:32Z Wed, 21 Oct 2026 07:28:00 GMT "a" ;q=100 ;w=60 ;r=5 ;t=1 ;qu="tokens" limit=10 remaining=9 reset=1 , ; = ( ) : ?"#;
    status: "PENDING QUEUED PROCESSING CALLING COMPLETED FAILED CANCELLED pending";
    text: r#"Bearer Basic token= api_key " ' \ [ ] { } ( ) : , ; // http://u:p@h/ ? # & % [redacted] Some( "sig":" \" ` <"#;
    url: "http:// https:// u:p@ h.example / // ? & = ; # @ % %25 %3D %26 token sig key= api_key= next= [redacted] \\";
    value: r#"{"token": {"a": " http://u:p@h/ [redacted] Bearer 1 -1 1e9 null true " [ ] { } , : \"#;
}
