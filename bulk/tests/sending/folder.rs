//! A folder in which a test runs the program.

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;
use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};
use tempfile::TempDir;

/// A folder with an input, in which the program runs.
pub(crate) struct Folder(pub(crate) TempDir);

impl Folder {
    /// A folder whose input has this number of requests.
    pub(crate) fn with(requests: usize) -> Self {
        let folder = Self(TempDir::new().unwrap());
        let lines: String = (0..requests).map(line).collect();
        fs::write(folder.path("in.jsonl"), lines).unwrap();
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program with its input and output, without limits of rates, and without keys of the environment.
    pub(crate) fn bulk(&self, options: &[&str]) -> Command {
        let mut command = Command::new(cargo_bin("bulk"));
        command
            .current_dir(self.0.path())
            .args([
                "--input",
                "in.jsonl",
                "--output",
                "out.jsonl",
                "--rpm",
                "off",
                "--tpm",
                "off",
            ])
            .args(options)
            .env_remove("OPENAI_API_KEY");
        command
    }

    pub(crate) fn run(&self, options: &[&str]) -> Output {
        self.bulk(options).output().unwrap()
    }

    pub(crate) fn start(&self, options: &[&str]) -> Child {
        let mut command = self.bulk(options);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub(crate) fn results(&self) -> Vec<Value> {
        let lines = fs::read_to_string(self.path("out.jsonl")).unwrap();
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(crate) fn count(&self, status: &str) -> usize {
        self.results()
            .iter()
            .filter(|result| result["status"] == status)
            .count()
    }
}

/// A request with a question of this number.
pub(crate) fn line(number: usize) -> String {
    format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"question {number}\"}}]}}\n")
}
