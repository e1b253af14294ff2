//! Runs the fuzz targets of `bulk` (see `fuzz/README.md`) over their seeds and over random texts, without a fuzzer and
//! on a stable compiler.

#[allow(dead_code, unused_imports)]
#[path = "../../src/args/mod.rs"]
mod args;
#[allow(dead_code, unused_imports)]
#[path = "../../src/input/mod.rs"]
mod input;
#[path = "../../../tests/fuzz_corpus/inputs.rs"]
mod inputs;
#[allow(dead_code, unused_imports)]
#[path = "../../src/limits/mod.rs"]
mod limits;
#[allow(dead_code, unused_imports)]
#[path = "../../src/price/mod.rs"]
mod price;
mod targets;

use inputs::{over_random_texts, over_the_seeds};
use std::path::Path;

macro_rules! targets {
    ($($target:ident: $words:expr;)*) => {$(
        #[test]
        fn $target() {
            let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/", stringify!($target));
            over_the_seeds(Path::new(seeds), targets::$target);
            over_random_texts(targets::$target, $words);
        }
    )*};
}

targets! {
    bulk_args: "--url=http://h/ --header=a: --rpm=1 --tpm=off --timeout=0.1 --api-key-env=HOME --input=a \n \r\n 1e400 nan";
    bulk_input: r#"{"custom_id":1} {"body": {"max_tokens":9, "messages":[{"content":" "text": 18446744073709551615 1e9 "}]} null [[[[[["#;
}
