//! The file of results: reads what an earlier run wrote, and writes new results.
//!
//! | file | what it holds |
//! |---|---|
//! | `lock.rs` | one writer per output |
//! | `earlier.rs` | what an earlier run wrote, for `--resume` |
//! | `result.rs`, `batch.rs` | a result line, in the program's own form and in that of OpenAI's batches |
//! | `answer.rs`, `assemble.rs` | the response in it; the events of a streamed one |
//! | `order.rs` | results in the order of the input |

mod answer;
mod assemble;
mod batch;
mod earlier;
mod lock;
mod order;
mod result;

pub(crate) use earlier::Done;
pub(crate) use result::Finished;

use crate::{
    args::{Args, FileArgs, OutputFormat, is_stdout},
    input::Admission,
    summary::counts::Counts,
    view::Progress,
};
use anyhow::{Context, ensure};
use earlier::EarlierResult;
use http::Uri;
use lock::Lock;
use order::Order;
use result::Style;
use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, ErrorKind, Seek, SeekFrom, Write},
    path::Path,
};
use tokio::sync::mpsc;
use tower_outbound::RequestStatus;

/// The `host` of results of the local provider. This text is not a valid host name, so it cannot be the host of a real
/// API.
pub(crate) const LOCAL: &str = "(local provider)";

/// The right to write to the output, which no other run has at the same time.
#[must_use = "another run may write to the output when this is dropped"]
pub(crate) struct Claim {
    locks: Vec<Lock>,
    /// The URL of requests whose line names none; `None` is the local provider.
    default_url: Option<Uri>,
}

/// Writes results in the order in which they arrive, or in that of the input.
pub(crate) struct Output {
    sink: Sink,
    /// Where results of requests that are not COMPLETED go, if not to `sink`.
    errors: Option<Sink>,
    order: Option<Order>,
    style: Style,
    _locks: Vec<Lock>,
}

/// A file, or standard output.
struct Sink {
    writer: BufWriter<Box<dyn Write + Send>>,
    /// The file again, to wait until its content is on the disk.
    file: Option<File>,
}

// === impl Claim ===

impl Claim {
    /// Takes the output for this run. `default_url` is the URL of requests whose line names none; `None` is the local
    /// provider.
    ///
    /// # Errors
    ///
    /// An error if another run writes to the output, or if the run would overwrite its input or results that the user
    /// has not allowed to be overwritten.
    pub(crate) fn new(args: &Args, default_url: Option<Uri>) -> anyhow::Result<Self> {
        let files = &args.files;
        let path = files.output();
        let is_stdout = files.writes_to_stdout();
        check_paths(files)?;
        let locked = [(!is_stdout).then_some(path), files.errors.as_deref()];
        let locks = locked.into_iter().flatten().map(Lock::of).filter_map(Result::transpose);
        let locks = locks.collect::<Result<_, _>>()?;
        ensure!(
            !files.resume || !(is_stdout || (path.exists() && !path.is_file())),
            "--resume needs an output that is a file: results that went through a pipe are not there to be read"
        );
        let may_overwrite = files.force || (args.is_demonstration() && is_local(path));
        ensure!(
            is_stdout || is_empty(path) || files.resume || may_overwrite,
            "{} is not empty: --resume continues it, --force overwrites it, --output names another",
            path.display()
        );
        let is_batch = files.output_format == OutputFormat::OpenaiBatch;
        ensure!(
            !(files.resume && first_result(path, |first| first.is_batch != is_batch)),
            "{} has results in another form: --output-format {} continues it",
            path.display(),
            if is_batch { "lines" } else { "openai-batch" }
        );
        if let Some(errors) = &files.errors {
            ensure!(
                is_empty(errors) || files.force || (files.resume && first_result(errors, |_| true)),
                "{} is not empty{}: --errors names another",
                errors.display(),
                if files.resume {
                    ", and holds no results"
                } else {
                    " (--force overwrites it)"
                }
            );
        }
        Ok(Self { locks, default_url })
    }

    /// Reads which requests an earlier run completed, if this run continues it.
    pub(crate) fn earlier(&self, files: &FileArgs) -> anyhow::Result<Option<Done>> {
        let read = || Done::read(files.output(), self.default_url.as_ref());
        files.resume.then(read).transpose()
    }

    /// Opens the file of results. If `done` is `None`, the run is a new one, and an existing file is emptied. Otherwise
    /// results are appended, and text after the last complete line is cut off. With `--ordered`, `admission` tells which
    /// lines are open.
    pub(crate) fn open(self, files: &FileArgs, done: Option<&Done>, admission: &Admission) -> anyhow::Result<Output> {
        let path = files.output();
        let sink = if files.writes_to_stdout() {
            Ok(Sink::stdout())
        } else {
            open(path, done).map(Sink::file)
        };
        let errors = files.errors.as_ref().map(|path| {
            let created = File::create(path).map(Sink::file);
            created.with_context(|| format!("cannot write to {}", path.display()))
        });
        Ok(Output {
            sink: sink.with_context(|| format!("cannot write to {}", path.display()))?,
            errors: errors.transpose()?,
            order: files.ordered.then(|| Order::new(admission.clone())),
            style: Style {
                format: files.output_format,
                default_url: self.default_url,
                echo: files.echo,
            },
            _locks: self.locks,
        })
    }
}

/// The input, the output and the file of errors must be three files.
fn check_paths(files: &FileArgs) -> anyhow::Result<()> {
    let is_same = |one: &Path, other: &Path| {
        let is_file = one.is_file();
        is_file && fs::canonicalize(one).is_ok_and(|one| fs::canonicalize(other).is_ok_and(|other| one == other))
    };
    let (input, output) = (files.input(), files.output());
    ensure!(
        !is_same(output, input),
        "the output is the same file as the input: --output names another"
    );
    for path in [Some(output), files.errors.as_deref()].into_iter().flatten() {
        ensure!(
            !path.is_dir(),
            "{} is a folder: a file is needed for results",
            path.display()
        );
    }
    if let Some(errors) = &files.errors {
        ensure!(
            !is_stdout(errors),
            "--errors needs a file: standard output holds the summary, or the results of --output -"
        );
        ensure!(
            errors != output && !is_same(errors, output) && !is_same(errors, input),
            "--errors is the same file as the input or the output"
        );
    }
    Ok(())
}

fn is_empty(path: &Path) -> bool {
    fs::metadata(path).map_or(true, |file| file.len() == 0)
}

/// Opens the output to write after what an earlier run has completed, or anew.
fn open(path: &Path, done: Option<&Done>) -> io::Result<File> {
    let Some(done) = done else {
        return File::create(path);
    };
    let mut file = File::options().write(true).create(true).truncate(false).open(path)?;
    // The lock keeps other runs out, but not other programs.
    if file.metadata()?.len() != done.all_bytes {
        return Err(io::Error::other("it has changed since it was read"));
    }
    file.set_len(done.complete_bytes)?;
    file.seek(SeekFrom::End(0))?;
    if done.complete_bytes > 0 && !done.ends_with_newline {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// Returns whether all results in this file came from the local provider. A run that sends to an API may have continued
/// the file, so the first result does not speak for the others.
fn is_local(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut lines = BufReader::new(file).split(b'\n');
    lines.all(|line| line.is_ok_and(|line| EarlierResult::parse(&line).is_some_and(|result| !result.is_of_api())))
}

/// Returns whether the first line of the file is a result that fulfils the condition.
fn first_result(path: &Path, is_met: impl Fn(&EarlierResult<'_>) -> bool) -> bool {
    let mut first = Vec::new();
    let read = File::open(path).and_then(|file| BufReader::new(file).read_until(b'\n', &mut first));
    read.is_ok() && EarlierResult::parse(&first).is_some_and(|first| is_met(&first))
}

// === impl Output ===

impl Output {
    /// Writes results until all senders are dropped or writing fails, and adds them to `counts`. Blocks the thread.
    pub(crate) fn write_all(
        mut self,
        mut results: mpsc::Receiver<Finished>,
        progress: &Progress,
        mut counts: Counts,
    ) -> (Counts, io::Result<()>) {
        let mut batch = Vec::new();
        // All results that wait in the channel are written and flushed together. Results that arrive slowly are flushed
        // one by one.
        while results.blocking_recv_many(&mut batch, 256) > 0 {
            if let Some(order) = &mut self.order {
                batch.drain(..).for_each(|finished| order.hold(finished));
                batch.extend(std::iter::from_fn(|| order.next()));
            }
            if let Err(error) = self.write(&mut batch, &mut counts, progress) {
                return (counts, Err(error));
            }
        }
        if let Some(order) = &mut self.order {
            batch.extend(std::iter::from_fn(|| order.rest()));
        }
        let written = self.write(&mut batch, &mut counts, progress);
        (counts, written.and_then(|()| self.sync()))
    }

    fn write(&mut self, batch: &mut Vec<Finished>, counts: &mut Counts, progress: &Progress) -> io::Result<()> {
        for finished in &*batch {
            let mut line = finished.to_json(&self.style)?;
            line.push(b'\n');
            let sink = match &mut self.errors {
                Some(errors) if finished.status() != RequestStatus::Completed => errors,
                _ => &mut self.sink,
            };
            sink.writer.write_all(&line)?;
        }
        for sink in [Some(&mut self.sink), self.errors.as_mut()].into_iter().flatten() {
            sink.writer.flush()?;
        }
        for finished in batch.drain(..) {
            counts.add(&finished);
            progress.finished(&finished);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let files = [
            self.sink.file.as_ref(),
            self.errors.as_ref().and_then(|sink| sink.file.as_ref()),
        ];
        for file in files.into_iter().flatten() {
            match file.sync_all() {
                // A pipe, a terminal and some file systems cannot be synced, which is no error here.
                Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {}
                synced => synced?,
            }
        }
        Ok(())
    }
}

// === impl Sink ===

impl Sink {
    fn file(file: File) -> Self {
        Self {
            file: file.try_clone().ok(),
            writer: BufWriter::new(Box::new(file)),
        }
    }

    /// Standard output as it was opened: opened again by its name, a file that it is redirected to would be emptied.
    fn stdout() -> Self {
        Self {
            file: None,
            writer: BufWriter::new(Box::new(io::stdout())),
        }
    }
}
