//! What the fuzzer calls. The same functions are run over the same corpus by the test `fuzz_corpus`.

#[allow(dead_code)]
#[path = "../../examples/bulk/args.rs"]
mod args;
#[allow(dead_code)]
#[path = "../../examples/bulk/input.rs"]
mod input;
#[allow(dead_code)]
#[path = "../../examples/bulk/limits.rs"]
mod limits;
#[path = "../../tests/secrets/recorded.rs"]
mod recorded;
#[path = "../../tests/fuzz_corpus/targets.rs"]
pub mod targets;
