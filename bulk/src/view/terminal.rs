//! [`Screen`]: redraws a few lines at the bottom of a terminal, in place.
//!
//! ratatui's own inline viewport asks the terminal for its cursor position, through standard output and with standard
//! input in raw mode. Results may go to standard output, and Ctrl-C has to stay a signal. So the lines are drawn
//! relative to the cursor: after each frame, the cursor is at the start of the line below the view. There it also is
//! when the program panics or is killed, so the terminal is in order at any time.

use ratatui::{
    backend::IntoCrossterm,
    buffer::{Buffer, Cell},
    crossterm::{
        QueueableCommand,
        cursor::{MoveToColumn, MoveUp},
        style::{ContentStyle, Print, ResetColor, SetAttributes, SetColors},
        terminal::{self, BeginSynchronizedUpdate, Clear, ClearType, EndSynchronizedUpdate},
    },
    layout::Rect,
    style::Style,
    text::Line,
    widgets::{Paragraph, Widget},
};
use std::{
    env,
    io::{self, IsTerminal, Write, stderr},
};

/// The lines that are drawn on a terminal, and redrawn in place.
pub(super) struct Screen<W> {
    out: W,
    has_colors: bool,
    /// The number of cells of each line that is drawn now.
    drawn: Vec<usize>,
}

/// Returns whether standard error is a terminal that can move its cursor.
pub(super) fn is_capable() -> bool {
    let is_dumb = env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    stderr().is_terminal() && !is_dumb
}

/// Returns whether colours are wanted: see <https://no-color.org>.
pub(super) fn has_colors() -> bool {
    env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Returns the columns and rows of the terminal, or 80 x 24 if they cannot be told.
pub(super) fn size() -> (u16, u16) {
    match terminal::size() {
        Ok((columns, rows)) if columns > 0 && rows > 0 => (columns, rows),
        _ => (80, 24),
    }
}

impl<W: Write> Screen<W> {
    pub(super) const fn new(out: W, has_colors: bool) -> Self {
        Self {
            out,
            has_colors,
            drawn: Vec::new(),
        }
    }

    /// Draws the lines in place of those drawn before, on a terminal of this size.
    pub(super) fn draw(&mut self, lines: Vec<Line<'_>>, (columns, rows): (u16, u16)) -> io::Result<()> {
        // The cursor stands below the lines, so they may be one fewer than the rows of the terminal.
        let height = lines.len().min(usize::from(rows.saturating_sub(1))) as u16;
        let area = Rect::new(0, 0, columns, height);
        let mut buffer = Buffer::empty(area);
        Paragraph::new(lines).render(area, &mut buffer);

        self.out.queue(BeginSynchronizedUpdate)?;
        self.rewind(columns)?;
        for row in buffer.content().chunks(usize::from(columns.max(1))) {
            let length = row
                .iter()
                .rposition(|cell| *cell != Cell::EMPTY)
                .map_or(0, |last| last + 1);
            self.row(&row[..length])?;
            self.drawn.push(length);
        }
        self.out.queue(Clear(ClearType::FromCursorDown))?;
        self.out.queue(EndSynchronizedUpdate)?;
        self.out.flush()
    }

    /// Writes a text above the lines, which have to be drawn again after it.
    pub(super) fn print_above(&mut self, text: &str, columns: u16) -> io::Result<()> {
        self.clear(columns)?;
        writeln!(self.out, "{text}")?;
        self.out.flush()
    }

    /// Removes the lines.
    pub(super) fn clear(&mut self, columns: u16) -> io::Result<()> {
        self.rewind(columns)?;
        self.out.queue(Clear(ClearType::FromCursorDown))?;
        self.out.flush()
    }

    /// Moves the cursor to the start of the first line. In a terminal that has become narrower, a line takes several
    /// rows.
    fn rewind(&mut self, columns: u16) -> io::Result<()> {
        let columns = usize::from(columns.max(1));
        let rows: usize = self.drawn.drain(..).map(|length| length.div_ceil(columns).max(1)).sum();
        self.out.queue(MoveToColumn(0))?;
        if rows > 0 {
            self.out.queue(MoveUp(u16::try_from(rows).unwrap_or(u16::MAX)))?;
        }
        Ok(())
    }

    fn row(&mut self, cells: &[Cell]) -> io::Result<()> {
        let mut style = Style::reset();
        for cell in cells {
            let wanted = cell.style();
            if self.has_colors && wanted != style {
                let ContentStyle {
                    foreground_color,
                    background_color,
                    attributes,
                    ..
                } = wanted.into_crossterm();
                self.out.queue(ResetColor)?;
                self.out.queue(SetAttributes(attributes))?;
                self.out.queue(SetColors(ratatui::crossterm::style::Colors {
                    foreground: foreground_color,
                    background: background_color,
                }))?;
                style = wanted;
            }
            self.out.queue(Print(cell.symbol()))?;
        }
        if self.has_colors {
            self.out.queue(ResetColor)?;
        }
        self.out.queue(Clear(ClearType::UntilNewLine))?;
        self.out.queue(Print("\r\n"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(has_colors: bool) -> Screen<Vec<u8>> {
        Screen::new(Vec::new(), has_colors)
    }

    fn lines(texts: &[&'static str]) -> Vec<Line<'static>> {
        texts.iter().copied().map(Line::from).collect()
    }

    fn written(screen: &mut Screen<Vec<u8>>) -> String {
        String::from_utf8(std::mem::take(&mut screen.out)).unwrap()
    }

    #[test]
    fn a_frame_is_drawn_over_the_one_before() {
        let mut screen = screen(false);
        screen.draw(lines(&["one", "two"]), (20, 10)).unwrap();
        assert!(!written(&mut screen).contains("\u{1b}[2A"));
        screen.draw(lines(&["three"]), (20, 10)).unwrap();
        let frame = written(&mut screen);
        assert!(frame.contains("\u{1b}[2A"), "{frame:?}");
        assert!(frame.contains("three\u{1b}[K\r\n\u{1b}[J"), "{frame:?}");
    }

    #[test]
    fn a_line_that_a_narrower_terminal_wraps_counts_as_its_rows() {
        let mut screen = screen(false);
        screen.draw(lines(&["0123456789", "01234"]), (20, 10)).unwrap();
        written(&mut screen);
        screen.draw(lines(&["x"]), (4, 10)).unwrap();
        assert!(written(&mut screen).contains("\u{1b}[5A"));
    }

    #[test]
    fn a_low_terminal_has_the_first_lines() {
        let mut screen = screen(false);
        screen.draw(lines(&["one", "two", "three"]), (20, 3)).unwrap();
        let frame = written(&mut screen);
        assert!(frame.contains("two") && !frame.contains("three"), "{frame:?}");
    }

    #[test]
    fn a_message_stands_where_the_view_was() {
        let mut screen = screen(false);
        screen.draw(lines(&["one", "two"]), (20, 10)).unwrap();
        written(&mut screen);
        screen.print_above("message", 20).unwrap();
        assert_eq!(written(&mut screen), "\u{1b}[1G\u{1b}[2A\u{1b}[Jmessage\n");
    }

    #[test]
    fn colours_are_written_only_where_they_are_wanted() {
        use ratatui::style::Stylize;
        for has_colors in [true, false] {
            let mut screen = screen(has_colors);
            screen.draw(vec![Line::from("red").red()], (20, 10)).unwrap();
            assert_eq!(
                written(&mut screen).contains("\u{1b}[38;5;9m") || has_colors,
                has_colors
            );
            screen.draw(vec![Line::from("red").red()], (20, 10)).unwrap();
            assert_eq!(written(&mut screen).contains('m'), has_colors);
        }
    }
}
