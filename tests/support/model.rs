//! How the model tests run their cases.
//!
//! 10,000 cases of each, or as many as `PROPTEST_CASES` says. What failed once stands beside the test, in
//! `model_*.regressions`, and is tried first.

use proptest::{
    strategy::Strategy,
    test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner},
};
use std::{env, fmt::Debug, future::Future};
use tokio::runtime::{Builder, Runtime};

/// What a case comes to.
pub type Outcome = Result<(), TestCaseError>;

/// Runs the cases of the test in `file`, each on a paused clock of its own that begins at zero.
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
    if let Err(failure) = runner.run(cases, |input| paused().block_on(case(input))) {
        panic!("{failure}\n{runner}");
    }
}

fn paused() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}

/// Lets the tasks run that can, for a model that knows how few there are.
pub async fn turns(turns: usize) {
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}
