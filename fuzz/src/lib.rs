//! The functions that the fuzzer calls. The tests `fuzz_corpus` of the library and of `bulk` call the same functions
//! with the same corpus.

#[allow(dead_code, unused_imports)]
#[path = "../../bulk/src/args/mod.rs"]
mod args;
#[allow(dead_code, unused_imports)]
#[path = "../../bulk/src/input/mod.rs"]
mod input;
#[allow(dead_code, unused_imports)]
#[path = "../../bulk/src/limits/mod.rs"]
mod limits;
#[allow(dead_code, unused_imports)]
#[path = "../../bulk/src/price/mod.rs"]
mod price;
#[path = "../../bulk/tests/fuzz_corpus/targets.rs"]
pub mod bulk;
#[path = "../../tests/secrets/recorded.rs"]
mod recorded;
#[path = "../../tests/fuzz_corpus/targets.rs"]
pub mod targets;
