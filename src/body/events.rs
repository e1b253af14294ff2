//! [`EventReader`]: divides a stream of [server-sent
//! events](https://html.spec.whatwg.org/multipage/server-sent-events.html) into its events.

use http::{HeaderMap, header::CONTENT_TYPE};

/// Divides a stream of server-sent events into its events, in whatever pieces the stream arrives.
///
/// The fields `event` and `data` are read; comments and other fields are skipped. Lines end in `\n` or `\r\n`.
pub(crate) struct EventReader {
    /// The name of the current event, as far as it has arrived. Empty if it has none.
    name: Vec<u8>,
    /// The data of the current event, as far as it has arrived.
    data: Vec<u8>,
    /// The part of the current line that has arrived.
    line: Vec<u8>,
    /// The largest event that is kept in memory, in bytes.
    limit: usize,
}

/// One server-sent event.
#[derive(Clone, Copy)]
pub(crate) struct Event<'a> {
    /// The value of the field `event`, or empty.
    pub(crate) name: &'a [u8],
    /// The values of the fields `data`, each with a `\n` at its end.
    pub(crate) data: &'a [u8],
}

/// An event is larger than the limit of its [`EventReader`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct EventTooLarge;

// === impl EventReader ===

impl EventReader {
    /// Creates a reader that keeps events of up to `limit` bytes.
    pub(crate) const fn new(limit: usize) -> Self {
        Self {
            name: Vec::new(),
            data: Vec::new(),
            line: Vec::new(),
            limit,
        }
    }

    /// Reads the next bytes of the stream, and calls `on_event` with each event that they end. An empty line that ends
    /// no event is an event without data.
    pub(crate) fn push(&mut self, bytes: &[u8], mut on_event: impl FnMut(Event<'_>)) -> Result<(), EventTooLarge> {
        bytes
            .split_inclusive(|byte| *byte == b'\n')
            .try_for_each(|part| self.push_part(part, &mut on_event))
    }

    /// Ends the stream, and calls `on_event` with the last event if neither an empty line has ended it nor a `\n` its
    /// last line.
    pub(crate) fn finish(mut self, mut on_event: impl FnMut(Event<'_>)) -> Result<(), EventTooLarge> {
        if !self.line.is_empty() {
            self.push_part(b"\n", &mut on_event)?;
        }
        if !self.data.is_empty() {
            on_event(self.event());
        }
        Ok(())
    }

    /// Reads a part of a line. Only the last part of a line ends in `\n`.
    fn push_part(&mut self, part: &[u8], on_event: &mut impl FnMut(Event<'_>)) -> Result<(), EventTooLarge> {
        self.line.extend_from_slice(part);
        if self.line.len() + self.data.len() > self.limit {
            return Err(EventTooLarge);
        }
        let Some(line) = self.line.strip_suffix(b"\n") else {
            return Ok(());
        };
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(text) = line.strip_prefix(b"data:") {
            self.data.extend_from_slice(text);
            self.data.push(b'\n');
        } else if let Some(name) = line.strip_prefix(b"event:") {
            self.name = name.trim_ascii().to_vec();
        } else if line.is_empty() {
            on_event(self.event());
            self.name.clear();
            self.data.clear();
        }
        self.line.clear();
        Ok(())
    }

    fn event(&self) -> Event<'_> {
        Event {
            name: &self.name,
            data: &self.data,
        }
    }
}

/// Returns whether the header `content-type` tells that the body is a stream of server-sent events.
pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    const KIND: &[u8] = b"text/event-stream";
    let kind = headers.get(CONTENT_TYPE).map_or(&b""[..], |kind| kind.as_bytes());
    kind.get(..KIND.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(KIND))
}
