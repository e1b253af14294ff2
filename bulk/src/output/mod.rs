//! The file of results: reads what an earlier run wrote, and writes new results.

mod result;

pub(crate) use result::Finished;

use crate::{args::Args, input::Request, summary::counts::Counts, view::Progress};
use anyhow::{Context, bail, ensure};
use result::{EarlierResult, hex};
use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, ErrorKind, Seek, SeekFrom, Write},
    path::Path,
};
use tokio::sync::mpsc;

/// The `host` of results of the local provider. This text is not a valid host name, so it cannot be the host of a real
/// API.
pub(crate) const LOCAL: &str = "(local provider)";

/// The requests that an earlier run completed.
#[derive(Clone, Default)]
pub(crate) struct Done {
    /// The number of completed requests for each hash of a request. The number can be above one, because a file may
    /// have the same line twice.
    completed: HashMap<String, u64>,
    /// The number of bytes up to the end of the last complete line.
    complete_bytes: u64,
    ends_with_newline: bool,
}

/// Writes results in the order in which they arrive.
pub(crate) struct Output {
    file: BufWriter<File>,
    host: String,
}

// === impl Done ===

impl Done {
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            opened => opened.with_context(|| format!("cannot open {}", path.display()))?,
        };
        Self::from_lines(BufReader::new(file)).with_context(|| format!("cannot continue {}", path.display()))
    }

    fn from_lines(mut lines: impl BufRead) -> anyhow::Result<Self> {
        let mut done = Self {
            ends_with_newline: true,
            ..Self::default()
        };
        let mut bytes = Vec::new();
        for number in 1.. {
            bytes.clear();
            let length = lines.read_until(b'\n', &mut bytes)?;
            let has_newline = bytes.ends_with(b"\n");
            match serde_json::from_slice::<EarlierResult>(&bytes) {
                _ if length == 0 => break,
                Ok(earlier) if earlier.is_completed() => *done.completed.entry(earlier.hash).or_default() += 1,
                Ok(_) => {}
                // The earlier run was killed while it wrote this line, so the request of the line is sent again.
                Err(_) if !has_newline => break,
                // The file holds something other than results, which must not be overwritten.
                Err(_) => bail!("its line {number} is not a result"),
            }
            done.complete_bytes += length as u64;
            done.ends_with_newline = has_newline;
        }
        Ok(done)
    }

    /// Returns whether an earlier run completed this request. Each completed line counts for one request only.
    pub(crate) fn take(&mut self, request: &Request) -> bool {
        match self.completed.get_mut(&hex(request.hash)) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

// === impl Output ===

impl Output {
    /// Checks that the run overwrites neither its input nor results that the user has not allowed to be overwritten.
    pub(crate) fn check(args: &Args) -> anyhow::Result<()> {
        let (path, input) = (args.files.output(), args.files.input());
        let same = fs::canonicalize(path).is_ok_and(|path| fs::canonicalize(input).is_ok_and(|input| path == input));
        ensure!(
            !same,
            "the output is the same file as the input: --output names another"
        );
        let is_empty = fs::metadata(path).map_or(true, |file| file.len() == 0);
        let may_overwrite = args.files.force || (args.is_demonstration() && is_local(path));
        ensure!(
            is_empty || args.files.resume || may_overwrite,
            "{} is not empty: --resume continues it, --force overwrites it, --output names another",
            path.display()
        );
        Ok(())
    }

    /// Opens the file of results. If `done` is `None`, the run is a new one, and an existing file is emptied. Otherwise
    /// results are appended, and text after the last complete line is cut off.
    pub(crate) fn open(path: &Path, done: Option<&Done>, host: String) -> anyhow::Result<Self> {
        let open = || -> io::Result<File> {
            let Some(done) = done else {
                return File::create(path);
            };
            let mut file = File::options().write(true).create(true).truncate(false).open(path)?;
            file.set_len(done.complete_bytes)?;
            file.seek(SeekFrom::End(0))?;
            if done.complete_bytes > 0 && !done.ends_with_newline {
                file.write_all(b"\n")?;
            }
            Ok(file)
        };
        let file = open().with_context(|| format!("cannot write to {}", path.display()))?;
        Ok(Self {
            file: BufWriter::new(file),
            host,
        })
    }

    /// Writes results until all senders are dropped or writing fails. Blocks the thread.
    pub(crate) fn write_all(
        mut self,
        mut results: mpsc::Receiver<Finished>,
        progress: &Progress,
        has_prices: bool,
    ) -> (Counts, io::Result<()>) {
        let mut counts = Counts::new(has_prices);
        let mut batch = Vec::new();
        // All results that wait in the channel are written and flushed together. Results that arrive slowly are flushed
        // one by one.
        while results.blocking_recv_many(&mut batch, 256) > 0 {
            if let Err(error) = self.write(&batch) {
                return (counts, Err(error));
            }
            for finished in batch.drain(..) {
                counts.add(&finished);
                progress.finished(&finished);
            }
        }
        let synced = match self.file.get_ref().sync_all() {
            // A pipe or a terminal cannot be synced, which is no error here.
            Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        };
        (counts, synced)
    }

    fn write(&mut self, batch: &[Finished]) -> io::Result<()> {
        for finished in batch {
            let mut line = finished.to_json(&self.host)?;
            line.push(b'\n');
            self.file.write_all(&line)?;
        }
        self.file.flush()
    }
}

/// Returns whether the results in this file came from the local provider.
fn is_local(path: &Path) -> bool {
    let first = File::open(path).and_then(|file| BufReader::new(file).lines().next().transpose());
    let earlier = first
        .ok()
        .flatten()
        .and_then(|line| serde_json::from_str::<EarlierResult>(&line).ok());
    earlier.is_some_and(|earlier| earlier.host == LOCAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(hash: u64, status: &str) -> String {
        format!(
            "{{\"hash\":\"{}\",\"host\":\"-\",\"status\":\"{status}\",\"line\":1}}\n",
            hex(hash)
        )
    }

    fn request(hash: u64) -> Request {
        Request {
            line: 1,
            custom_id: None,
            metadata: None,
            hash,
            tokens: 1,
            method: http::Method::POST,
            url: None,
            headers: http::HeaderMap::new(),
            body: "{}".into(),
        }
    }

    #[test]
    fn only_completed_lines_count_and_each_counts_once() {
        let text = [
            line(1, "COMPLETED"),
            line(2, "FAILED"),
            line(1, "COMPLETED"),
            line(3, "CANCELLED"),
        ]
        .concat();
        let mut done = Done::from_lines(text.as_bytes()).unwrap();
        let taken: Vec<_> = [1, 1, 1, 2, 3, 4]
            .into_iter()
            .map(|hash| done.take(&request(hash)))
            .collect();
        assert_eq!(taken, [true, true, false, false, false, false]);
    }

    #[test]
    fn a_line_that_was_cut_off_does_not_count() {
        let (first, second) = (line(1, "COMPLETED"), line(2, "COMPLETED"));
        let text = format!("{first}{}", &second[..20]);
        let mut done = Done::from_lines(text.as_bytes()).unwrap();
        assert_eq!(
            (done.complete_bytes, done.ends_with_newline),
            (first.len() as u64, true)
        );
        assert!(!done.take(&request(2)));
    }

    #[test]
    fn a_complete_result_without_a_newline_counts() {
        let text = line(1, "COMPLETED");
        let text = text.trim_end();
        let mut done = Done::from_lines(text.as_bytes()).unwrap();
        assert_eq!(
            (done.complete_bytes, done.ends_with_newline),
            (text.len() as u64, false)
        );
        assert!(done.take(&request(1)));
    }

    #[test]
    fn a_file_with_other_lines_is_refused() {
        let text = format!("{}notes\n{}", line(1, "COMPLETED"), line(2, "COMPLETED"));
        assert_eq!(
            Done::from_lines(text.as_bytes()).err().unwrap().to_string(),
            "its line 2 is not a result"
        );
    }
}
