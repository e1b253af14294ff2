//! Where the lines of the input come from: a file, standard input, a pipe; plain, or compressed by gzip or zstd.

use flate2::read::MultiGzDecoder;
use hyper::body::Bytes;
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, ErrorKind, Read},
    path::{Path, PathBuf},
    thread,
};
use tokio::sync::mpsc;

/// The size of the pieces in which the input is read, in bytes.
const CHUNK: usize = 64 << 10;

/// The number of pieces that are read ahead.
const CHUNKS_AHEAD: usize = 2;

/// The lines of the input, which are read on a thread of their own.
pub(super) struct Lines {
    chunks: mpsc::Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    /// The number of bytes of `chunk` that are in lines already.
    taken: usize,
    /// The beginning of the line whose end has not been read.
    partial: Vec<u8>,
    /// The length of that line in bytes, which is above that of `partial` if the line is too long to be kept.
    length: u64,
    number: u64,
    max_line: usize,
}

/// A line of the input, without its end.
pub(super) struct Line {
    /// The number of the line; the first is 1.
    pub(super) number: u64,
    /// The bytes of the line, or the length of a line that is longer than `--max-line`.
    pub(super) text: Result<Bytes, u64>,
}

impl Lines {
    /// Starts to read the file at `path`; `-` is standard input.
    ///
    /// # Errors
    ///
    /// An error if a regular file cannot be opened. Whatever else cannot be opened or read makes [`next`](Self::next)
    /// fail: opening a FIFO waits for its writer, so it happens on the thread that reads.
    pub(super) fn open(path: &Path, max_line: usize) -> io::Result<Self> {
        if path == Path::new("-") {
            return Self::spawn(|| Ok(io::stdin()), max_line);
        }
        if is_regular(path) {
            let file = File::open(path)?;
            return Self::spawn(|| Ok(file), max_line);
        }
        let path = PathBuf::from(path);
        Self::spawn(|| File::open(path), max_line)
    }

    /// Reads on a thread of its own. The runtime waits for its blocking tasks when the program ends, and would wait for
    /// a pipe into which nothing is written; a thread is left behind.
    pub(super) fn spawn<R: Read>(
        open: impl FnOnce() -> io::Result<R> + Send + 'static,
        max_line: usize,
    ) -> io::Result<Self> {
        let (sender, chunks) = mpsc::channel(CHUNKS_AHEAD);
        thread::Builder::new().name("input".into()).spawn(move || {
            if let Err(error) = open().and_then(|source| send_chunks(source, &sender)) {
                let _ = sender.blocking_send(Err(error));
            }
        })?;
        Ok(Self::new(chunks, max_line))
    }

    /// Reads from memory, without a thread.
    pub(super) fn from_memory(bytes: &[u8], max_line: usize) -> io::Result<Self> {
        let mut chunk = Vec::new();
        decompressed(bytes)?.read_to_end(&mut chunk)?;
        let mut lines = Self::new(mpsc::channel(1).1, max_line);
        lines.chunk = chunk;
        Ok(lines)
    }

    const fn new(chunks: mpsc::Receiver<io::Result<Vec<u8>>>, max_line: usize) -> Self {
        Self {
            chunks,
            chunk: Vec::new(),
            taken: 0,
            partial: Vec::new(),
            length: 0,
            number: 0,
            max_line,
        }
    }

    /// Returns the next line, or `None` at the end of the input. Cancel safe: no byte is lost.
    pub(super) async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            let rest = &self.chunk[self.taken..];
            let end = rest.iter().position(|byte| *byte == b'\n');
            let piece = &rest[..end.unwrap_or(rest.len())];
            self.length += piece.len() as u64;
            if self.length > self.max_line as u64 {
                self.partial = Vec::new();
            } else {
                self.partial.extend_from_slice(piece);
            }
            self.taken += piece.len();
            if end.is_some() {
                self.taken += 1;
                return Ok(Some(self.take_line()));
            }
            match self.chunks.recv().await {
                Some(chunk) => {
                    self.chunk = chunk?;
                    self.taken = 0;
                }
                None if self.length > 0 => return Ok(Some(self.take_line())),
                None => return Ok(None),
            }
        }
    }

    fn take_line(&mut self) -> Line {
        self.number += 1;
        let mut text = std::mem::take(&mut self.partial);
        // The buffer has grown by doubling. A long line stays in memory until its result is written.
        text.shrink_to_fit();
        let length = std::mem::take(&mut self.length);
        let text = if length > self.max_line as u64 {
            Err(length)
        } else {
            Ok(Bytes::from(text))
        };
        Line {
            number: self.number,
            text,
        }
    }
}

/// Returns whether the input can be read twice. Whatever is no regular file is read once.
pub(super) fn is_regular(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file())
}

fn send_chunks(source: impl Read, sender: &mpsc::Sender<io::Result<Vec<u8>>>) -> io::Result<()> {
    let mut source = decompressed(source)?;
    loop {
        let mut chunk = vec![0; CHUNK];
        match source.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(length) => chunk.truncate(length),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        // Sending fails when the run has ended before the input.
        if sender.blocking_send(Ok(chunk)).is_err() {
            return Ok(());
        }
    }
}

/// Recognizes the compression by the first bytes, whatever the name of the file.
fn decompressed<'a>(mut source: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::new();
    // A pipe may deliver fewer bytes than were asked for.
    source.by_ref().take(4).read_to_end(&mut magic)?;
    let is_gzip = magic.starts_with(&[0x1f, 0x8b]);
    // A zstd file may begin with a frame that readers skip, as those of pzstd do.
    let is_skipped_frame = magic.len() == 4 && magic[0] & 0xf0 == 0x50 && magic[1..] == [0x2a, 0x4d, 0x18];
    let is_zstd = magic == [0x28, 0xb5, 0x2f, 0xfd] || is_skipped_frame;
    let whole = io::Cursor::new(magic).chain(source);
    Ok(if is_gzip {
        Box::new(MultiGzDecoder::new(whole))
    } else if is_zstd {
        Box::new(ZstdFrames {
            source: BufReader::with_capacity(CHUNK, whole),
            decoder: FrameDecoder::new(),
            is_in_frame: false,
        })
    } else {
        Box::new(whole)
    })
}

/// Decompresses all frames of a zstd file: tools that compress in parallel or append write several.
struct ZstdFrames<R: Read> {
    source: BufReader<R>,
    decoder: FrameDecoder,
    is_in_frame: bool,
}

impl<R: Read> ZstdFrames<R> {
    /// Begins the next frame. Returns false at the end of the source.
    fn begin_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    io::copy(&mut self.source.by_ref().take(length.into()), &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::new(ErrorKind::InvalidData, error)),
            }
        }
    }

    fn check_frame(&self) -> io::Result<()> {
        let expected = self.decoder.get_checksum_from_data();
        if expected.is_some() && expected != self.decoder.get_calculated_checksum() {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "a wrong checksum in the zstd file",
            ));
        }
        Ok(())
    }
}

impl<R: Read> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.is_in_frame {
                if !self.begin_frame()? {
                    return Ok(0);
                }
                self.is_in_frame = true;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
            }
            let length = self.decoder.read(buffer)?;
            if length > 0 {
                return Ok(length);
            }
            self.check_frame()?;
            self.is_in_frame = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    async fn lines(bytes: &[u8], max_line: usize) -> io::Result<Vec<Result<String, u64>>> {
        let bytes = bytes.to_vec();
        let mut lines = Lines::spawn(move || Ok(io::Cursor::new(bytes)), max_line).unwrap();
        let mut all = Vec::new();
        while let Some(line) = lines.next().await? {
            all.push(line.text.map(|text| String::from_utf8(text.to_vec()).unwrap()));
            assert_eq!(line.number, all.len() as u64);
        }
        Ok(all)
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[tokio::test]
    async fn lines_end_at_newlines_and_at_the_end() {
        assert_eq!(
            lines(b"a\n\nb", 10).await.unwrap(),
            [Ok("a".into()), Ok("".into()), Ok("b".into())]
        );
        assert_eq!(lines(b"", 10).await.unwrap(), []);
        assert_eq!(lines(b"a\n", 10).await.unwrap(), [Ok("a".into())]);
    }

    #[tokio::test]
    async fn a_line_above_the_limit_is_not_kept_and_the_next_one_is_read() {
        let long = [vec![b'x'; 3 * CHUNK], b"\nabcd\nabcde\n".to_vec()].concat();
        let expected = [Err(3 * CHUNK as u64), Ok("abcd".into()), Err(5)];
        assert_eq!(lines(&long, 4).await.unwrap(), expected);
    }

    #[tokio::test]
    async fn a_line_may_be_longer_than_a_piece() {
        let text = "y".repeat(3 * CHUNK + 7);
        assert_eq!(
            lines(format!("{text}\n{text}").as_bytes(), 1 << 20).await.unwrap(),
            [Ok(text.clone()), Ok(text)]
        );
    }

    #[tokio::test]
    async fn gzip_is_recognized_also_in_several_members() {
        let bytes = [gzip(b"a\nb"), gzip(b"c\n")].concat();
        assert_eq!(lines(&bytes, 10).await.unwrap(), [Ok("a".into()), Ok("bc".into())]);
    }

    #[tokio::test]
    async fn zstd_is_recognized_also_in_several_frames() {
        use ruzstd::encoding::{CompressionLevel, compress_to_vec};
        let frame = |text: &'static [u8]| compress_to_vec(text, CompressionLevel::Fastest);
        // A frame that readers skip: its magic number, its length, and its content.
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let bytes = [frame(b"a\nb"), skipped.clone(), frame(b"c\n")].concat();
        for bytes in [[skipped, bytes.clone()].concat(), bytes] {
            assert_eq!(lines(&bytes, 10).await.unwrap(), [Ok("a".into()), Ok("bc".into())]);
        }
    }

    #[tokio::test]
    async fn a_compressed_file_that_was_cut_off_is_an_error() {
        let bytes = gzip("a line\n".repeat(1_000).as_bytes());
        assert!(lines(&bytes[..bytes.len() / 2], 10).await.is_err());
    }
}
