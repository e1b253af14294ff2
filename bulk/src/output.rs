//! The file of results: what is in it already, and how it grows.

use crate::{
    args::Args,
    input::Request,
    progress::Progress,
    result::{Finished, Known, hex},
    tally::Tally,
};
use anyhow::{Context, bail, ensure};
use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, ErrorKind, Seek, SeekFrom, Write},
    path::Path,
};
use tokio::sync::mpsc;

/// The host that is written for the local provider: nothing that could be one.
pub(crate) const LOCAL: &str = "(local provider)";

/// What an earlier run completed.
#[derive(Clone, Default)]
pub(crate) struct Done {
    /// How often, by hash: a file may ask the same thing twice.
    completed: HashMap<String, u64>,
    /// Bytes up to the end of the last line that is whole.
    whole: u64,
    ends_with_newline: bool,
}

/// Writes results as they come.
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
        Self::from_lines(BufReader::new(file)).with_context(|| format!("cannot go on with {}", path.display()))
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
            let whole = bytes.ends_with(b"\n");
            match serde_json::from_slice::<Known>(&bytes) {
                _ if length == 0 => break,
                Ok(known) if known.is_completed() => *done.completed.entry(known.hash).or_default() += 1,
                Ok(_) => {}
                // The run was cut off while it wrote this line, so it is as if it had not.
                Err(_) if !whole => break,
                // Anything might follow, and be lost, in a file that is something else.
                Err(_) => bail!("its line {number} is no result"),
            }
            done.whole += length as u64;
            done.ends_with_newline = whole;
        }
        Ok(done)
    }

    /// Whether this request is done. Each completed line answers for one request.
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
    /// Refuses to destroy what somebody may want to keep.
    pub(crate) fn check(args: &Args) -> anyhow::Result<()> {
        let (path, input) = (args.output(), args.input());
        let same = fs::canonicalize(path).is_ok_and(|path| fs::canonicalize(input).is_ok_and(|input| path == input));
        ensure!(!same, "the output is the input");
        let is_empty = fs::metadata(path).map_or(true, |file| file.len() == 0);
        let may_overwrite = args.force || (args.is_demonstration() && is_local(path));
        ensure!(
            is_empty || args.resume || may_overwrite,
            "{} is not empty: --resume goes on with it, --force overwrites it, --output names another",
            path.display()
        );
        Ok(())
    }

    /// For a new run, or to go on after what is `done`.
    pub(crate) fn open(path: &Path, done: Option<&Done>, host: String) -> anyhow::Result<Self> {
        let open = || -> io::Result<File> {
            let Some(done) = done else {
                return File::create(path);
            };
            let mut file = File::options().write(true).create(true).truncate(false).open(path)?;
            file.set_len(done.whole)?;
            file.seek(SeekFrom::End(0))?;
            if done.whole > 0 && !done.ends_with_newline {
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

    /// Writes until all senders are gone, or writing fails. Blocks.
    pub(crate) fn write_all(
        mut self,
        mut results: mpsc::Receiver<Finished>,
        progress: &Progress,
    ) -> (Tally, io::Result<()>) {
        let mut tally = Tally::default();
        let mut batch = Vec::new();
        // What has piled up is written at once; when results come slowly, that is each for itself.
        while results.blocking_recv_many(&mut batch, 256) > 0 {
            if let Err(error) = self.write(&batch) {
                return (tally, Err(error));
            }
            for finished in batch.drain(..) {
                tally.add(&finished);
                progress.finished(finished.status());
            }
        }
        let synced = match self.file.get_ref().sync_all() {
            // A pipe or a terminal has nothing to sync.
            Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        };
        (tally, synced)
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

/// Whether the results in this file are those of the local provider.
fn is_local(path: &Path) -> bool {
    let first = File::open(path).and_then(|file| BufReader::new(file).lines().next().transpose());
    let known = first
        .ok()
        .flatten()
        .and_then(|line| serde_json::from_str::<Known>(&line).ok());
    known.is_some_and(|known| known.host == LOCAL)
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
            hash,
            tokens: 1,
            body: "{}".into(),
        }
    }

    #[test]
    fn only_what_is_completed_is_done_and_each_line_once() {
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
    fn a_line_that_was_cut_off_is_as_if_not_written() {
        let (first, second) = (line(1, "COMPLETED"), line(2, "COMPLETED"));
        let text = format!("{first}{}", &second[..20]);
        let mut done = Done::from_lines(text.as_bytes()).unwrap();
        assert_eq!((done.whole, done.ends_with_newline), (first.len() as u64, true));
        assert!(!done.take(&request(2)));
    }

    #[test]
    fn a_line_that_lacks_nothing_but_its_end_counts() {
        let text = line(1, "COMPLETED");
        let text = text.trim_end();
        let mut done = Done::from_lines(text.as_bytes()).unwrap();
        assert_eq!((done.whole, done.ends_with_newline), (text.len() as u64, false));
        assert!(done.take(&request(1)));
    }

    #[test]
    fn a_file_of_something_else_is_left_alone() {
        let text = format!("{}notes\n{}", line(1, "COMPLETED"), line(2, "COMPLETED"));
        assert_eq!(
            Done::from_lines(text.as_bytes()).err().unwrap().to_string(),
            "its line 2 is no result"
        );
    }
}
