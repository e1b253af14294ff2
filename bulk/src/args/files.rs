//! The options of files: where requests come from, and where results go.

use clap::ValueEnum;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(next_help_heading = "Files")]
pub(crate) struct FileArgs {
    /// The file of requests, one JSON object per line [default: bulk/data/requests.jsonl, with 500 requests]
    #[arg(long, value_name = "FILE")]
    pub(super) input: Option<PathBuf>,

    /// The file for the results, one JSON object per line [default: results.jsonl]
    #[arg(long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,

    /// Continue an earlier run: skip the requests that are COMPLETED in the output, and append the other results.
    /// Requests are recognized by a hash of their line, so lines may be added or moved between the runs; a changed line
    /// is sent again. The limits start with empty buckets, because the earlier run may have used them up
    #[arg(long)]
    pub(crate) resume: bool,

    /// Overwrite an existing output. (Results of the local provider in the default output are overwritten in any case)
    #[arg(long, conflicts_with = "resume")]
    pub(crate) force: bool,

    /// What to do with a line that is not a request: `skip` reports it and sends the others, `refuse` sends nothing
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = OnMalformed::Skip)]
    pub(crate) on_malformed: OnMalformed,
}

/// What to do with a line of the input that is not a request.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnMalformed {
    Skip,
    Refuse,
}

impl FileArgs {
    pub(crate) fn input(&self) -> &Path {
        let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/data/requests.jsonl");
        self.input.as_deref().unwrap_or_else(|| Path::new(bundled))
    }

    pub(crate) fn output(&self) -> &Path {
        self.output.as_deref().unwrap_or_else(|| Path::new("results.jsonl"))
    }

    /// Returns whether results go to the default output.
    pub(crate) const fn has_default_output(&self) -> bool {
        self.output.is_none()
    }
}
