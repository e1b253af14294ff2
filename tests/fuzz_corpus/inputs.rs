//! Inputs for the fuzz targets when they run without a fuzzer: the seeds, changed seeds, and random texts.

use proptest::prelude::*;
use std::{fs, path::Path};

/// Calls the target with each seed file in `folder`: as it is, cut off at every position, and with every byte replaced
/// by each of a few special ones.
pub(crate) fn over_the_seeds(folder: &Path, target: fn(&[u8])) {
    let mut seeds = 0;
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
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

/// Calls the target with random texts, many of which are made from `words` that mean something to the target, and with
/// random bytes. The environment variable `PROPTEST_CASES` raises the number of inputs above 2,000.
pub(crate) fn over_random_texts(target: fn(&[u8]), words: &'static str) {
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
