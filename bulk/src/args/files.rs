//! The options of files: where requests come from, and where results go.

use crate::input::Form;
use clap::ValueEnum;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(next_help_heading = "Files")]
pub(crate) struct FileArgs {
    /// The file of requests, one JSON object per line, also compressed by gzip or zstd. `-` is standard input. Pipes are
    /// read once [default for the local provider: 500 requests that come with the program]
    #[arg(long, value_name = "FILE")]
    pub(super) input: Option<PathBuf>,

    /// The form of the input's lines. `auto` recognizes the form of each line by its fields
    #[arg(long, value_enum, value_name = "FORM", default_value_t = InputFormat::Auto)]
    pub(super) input_format: InputFormat,

    /// The longest line of the input, in bytes, or with K, M or G. A longer line is malformed
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = bytes)]
    pub(super) max_line: u64,

    /// The file for the results, one JSON object per line. `-` is standard output; the summary then goes to standard
    /// error [default: results.jsonl]
    #[arg(long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,

    /// The form of the results. `openai-batch` is what OpenAI's Batch API returns
    #[arg(long, value_enum, value_name = "FORM", default_value_t = OutputFormat::Lines)]
    pub(crate) output_format: OutputFormat,

    /// Write FAILED and CANCELLED results to this file, and only there. --resume begins it anew, because it sends these
    /// requests again
    #[arg(long, value_name = "FILE")]
    pub(crate) errors: Option<PathBuf>,

    /// Write results in the order of the input. A result waits in memory for those of earlier lines, so that at most
    /// 1,000 requests are open at once
    #[arg(long)]
    pub(crate) ordered: bool,

    /// Repeat the body of each request in its result, as `request`
    #[arg(long)]
    pub(crate) echo: bool,

    /// The bytes of requests that are in memory at once, or with K, M or G. A larger request is sent alone
    #[arg(long, value_name = "BYTES", default_value = "48M", value_parser = bytes)]
    pub(crate) memory: u64,

    /// Continue an earlier run: skip the requests that are COMPLETED in the output by the same API and path, and append
    /// the other results. Requests are recognized by a hash of their line, so lines may be added or moved between the
    /// runs; a changed line is sent again. The limits start with empty buckets, because the earlier run may have used
    /// them up
    #[arg(long)]
    pub(crate) resume: bool,

    /// Overwrite an existing output. (Results of the local provider in the default output are overwritten in any case)
    #[arg(long, conflicts_with = "resume")]
    pub(crate) force: bool,

    /// What to do with a line that is not a request: `fail` gives it a FAILED result, `skip` reports it only, and
    /// `refuse` sends nothing (and cannot be combined with an input that is read once)
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = OnMalformed::Fail)]
    pub(crate) on_malformed: OnMalformed,
}

/// What to do with a line of the input that is not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnMalformed {
    Fail,
    Skip,
    Refuse,
}

/// The form of the input's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum InputFormat {
    Auto,
    /// The line is the body of the request, without `custom_id` and `metadata`
    Lines,
    /// {"custom_id", "method", "url", "body": {…}}
    OpenaiBatch,
    /// {"custom_id", "params": {…}}
    AnthropicBatch,
    /// {"key", "request": {…}}
    GeminiBatch,
    /// {"method", "url", "headers": {…}, "body": …}, where a body may be any JSON, or a string that is sent as text
    Rest,
}

/// The form of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// All that is known of the request: status, times, tokens, the response
    Lines,
    /// {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}
    OpenaiBatch,
}

impl FileArgs {
    /// The input, or a name to show for the requests that come with the program.
    pub(crate) fn input(&self) -> &Path {
        self.given_input().unwrap_or_else(|| Path::new("(bundled requests)"))
    }

    /// The input of the command line. Without one, the requests that come with the program are sent to the local
    /// provider.
    pub(crate) fn given_input(&self) -> Option<&Path> {
        self.input.as_deref()
    }

    pub(crate) fn output(&self) -> &Path {
        self.output.as_deref().unwrap_or_else(|| Path::new("results.jsonl"))
    }

    /// Returns whether results go to the default output.
    pub(crate) const fn has_default_output(&self) -> bool {
        self.output.is_none()
    }

    /// Returns whether results go to standard output, so that nothing else may be written there.
    pub(crate) fn writes_to_stdout(&self) -> bool {
        is_stdout(self.output())
    }

    /// The form that all lines of the input have, if it is given.
    pub(crate) const fn form(&self) -> Option<Form> {
        match self.input_format {
            InputFormat::Auto => None,
            InputFormat::Lines => Some(Form::Lines),
            InputFormat::OpenaiBatch => Some(Form::OpenAiBatch),
            InputFormat::AnthropicBatch => Some(Form::AnthropicBatch),
            InputFormat::GeminiBatch => Some(Form::GeminiBatch),
            InputFormat::Rest => Some(Form::Rest),
        }
    }

    /// The longest line of the input, in bytes.
    pub(crate) fn max_line(&self) -> usize {
        usize::try_from(self.max_line).unwrap_or(usize::MAX)
    }
}

/// Returns whether the path is a name of standard output.
pub(crate) fn is_stdout(path: &Path) -> bool {
    const NAMES: [&str; 4] = ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];
    NAMES.iter().any(|name| path == Path::new(name))
}

/// Parses a number of bytes, with K, M or G for powers of 1,024.
fn bytes(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    match number.parse::<u64>() {
        Ok(number) if number > 0 && number <= u64::MAX >> shift => Ok(number << shift),
        _ => Err("must be a number of bytes above zero, such as 500000, 64K, 48M or 2G".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_bytes_may_have_a_unit() {
        assert_eq!(
            (bytes("500"), bytes("64k"), bytes("2G")),
            (Ok(500), Ok(64 << 10), Ok(2 << 30))
        );
        for bad in ["", "K", "0", "-1M", "1T", "99999999999999G"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
