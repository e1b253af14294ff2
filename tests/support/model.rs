//! Runs the cases of the model tests.
//!
//! Each test has 10,000 cases, or as many as the environment variable `PROPTEST_CASES` says. Cases that failed once are
//! kept beside the test, in `model_*.regressions`, and run first.

use super::paused_runtime;
use proptest::{
    strategy::Strategy,
    test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner},
};
use std::{env, fmt::Debug, future::Future};

/// The result of one case.
pub type Outcome = Result<(), TestCaseError>;

/// Runs the cases of the test in `file`, each in a new runtime with a paused clock.
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

/// Lets the tasks of the runtime run for this many turns. A model has few tasks and thousands of cases, so it gives the
/// number of turns after which all of them wait.
pub async fn turns(turns: usize) {
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}
