//! Runs the cases of the model tests, each of which compares a part of the crate with a simple model of it. Each test
//! runs 10,000 random cases, or the number in the environment variable `PROPTEST_CASES`. Cases that failed once are
//! stored beside the source of the test, in `model_*.regressions`, and are run first.

use super::paused_runtime;
use proptest::{
    strategy::Strategy,
    test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner},
};
use std::{env, fmt::Debug, future::Future};

/// The result of one case of a model test: an error if the crate and the model disagree.
pub type Outcome = Result<(), TestCaseError>;

/// Runs the random cases of the model test whose source is `file`, each in a new runtime with a paused clock.
pub fn check<S, F>(file: &'static str, cases: &S, case: impl Fn(S::Value) -> F)
where
    S: Strategy<Value: Debug>,
    F: Future<Output = Outcome>,
{
    let mut config = Config {
        source_file: Some(file),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..Config::default()
    };
    if env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 10_000;
    }
    let mut runner = TestRunner::new(config);
    if let Err(failure) = runner.run(cases, |input| paused_runtime().block_on(case(input))) {
        panic!("{failure}\n{runner}");
    }
}

/// Yields `turns` times to the other tasks of the runtime. A model test has few tasks and thousands of cases, so it
/// passes a small number after which all of its tasks wait.
pub async fn turns(turns: usize) {
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}
