//! The live view of a run, as lines for a terminal of any width.

use super::{
    changes::pause_line,
    state::{Cause, Snapshot},
    text::{grouped, span},
};
use ratatui::{
    style::{Color, Style, Stylize},
    text::{Line, Span},
};

/// The width of the names before the bars.
const NAME_WIDTH: usize = 10;

/// A bar is not made wider than this: the figures beside it would be hard to follow.
const MAX_BAR: usize = 40;

/// Where there is less room than this for the bars, there are none.
const MIN_BAR: usize = 5;

/// What stands behind the limit that the run waits for.
const MARK: &str = " < limits";

/// The narrowest terminal in which figures stand beside each other. In a narrower one, they are shortened and wrapped.
const WIDE: usize = 60;

/// Returns the lines of the view, none of which is wider than `width`. The most important ones come first, so that the
/// last ones can be left out of a terminal that is too low.
pub(super) fn lines(snapshot: &Snapshot, width: u16) -> Vec<Line<'static>> {
    let width = usize::from(width).max(10);
    let mut lines = header(snapshot, width);
    lines.extend(waiting(snapshot, width));
    lines.extend(counts(snapshot, width));
    lines.extend(gauges(snapshot, width));
    if let Some(failure) = &snapshot.last_failure {
        lines.push(Line::from(Span::styled(
            cut(&format!("last failure: {failure}"), width),
            Style::new().fg(Color::Red),
        )));
    }
    lines
}

/// How many requests have ended, the time, and a bar.
fn header(snapshot: &Snapshot, width: usize) -> Vec<Line<'static>> {
    let done = snapshot.ended.requests();
    let mut left = grouped(done);
    let mut share = None;
    if let Some(total) = snapshot.total {
        let ratio = if total > 0 { done as f64 / total as f64 } else { 0.0 };
        share = Some(ratio.min(1.0));
        left = format!("{left} of {}, {:.1} %", grouped(total), 100.0 * ratio);
    } else {
        left.push_str(" requests");
    }
    let mut right = span(snapshot.elapsed);
    if let Some(time_left) = snapshot.time_left {
        right = format!("{right}, {} left", span(time_left.time));
        if width >= WIDE {
            right = format!("{right} by {}", time_left.by.short_name());
        }
    }
    let mut lines = Vec::new();
    let gap = width.saturating_sub(left.chars().count() + right.chars().count());
    if gap > 0 {
        let spaces = " ".repeat(gap);
        lines.push(Line::from(vec![
            Span::from(left).bold(),
            Span::from(spaces),
            Span::from(right),
        ]));
    } else {
        lines.push(Line::from(Span::from(cut(&left, width)).bold()));
        lines.push(Line::from(cut(&right, width)));
    }
    if let Some(share) = share {
        lines.push(Line::from(bar(share, width, Color::Green)));
    }
    lines
}

/// What the run waits for.
fn waiting(snapshot: &Snapshot, width: usize) -> Vec<Line<'static>> {
    if let Some(pause) = &snapshot.pause {
        let text = pause_line(pause, snapshot);
        return wrap(text.split(' '), " ", width, Style::new().fg(Color::Yellow));
    }
    let mut text = format!("waiting for {}", snapshot.waits_for.name());
    if width < WIDE {
        text = format!("waiting for {}", snapshot.waits_for.short_name());
    }
    let mut items = vec![text, format!("{} queued", grouped(snapshot.queued))];
    if snapshot.waiting_to_retry > 0 {
        items.push(format!("{} to retry", grouped(snapshot.waiting_to_retry)));
    }
    wrap(items.iter().map(String::as_str), "   ", width, Style::new())
}

fn counts(snapshot: &Snapshot, width: usize) -> Vec<Line<'static>> {
    let ended = &snapshot.ended;
    let mut items = vec![
        format!("done {}", grouped(ended.completed)),
        format!("failed {}", grouped(ended.failed)),
        format!("retried {}", grouped(ended.retried)),
        format!("429s {}", grouped(snapshot.status_429)),
        format!("tokens {}", grouped(ended.tokens)),
    ];
    if let Some(cost) = ended.cost {
        items.push(match snapshot.max_cost {
            Some(max) => format!("cost {cost} of {max}"),
            None => format!("cost {cost}"),
        });
    }
    wrap(items.iter().map(String::as_str), "   ", width, Style::new())
}

/// A line for each budget with what its bucket holds, and one for the permits with how many are used.
fn gauges(snapshot: &Snapshot, width: usize) -> Vec<Line<'static>> {
    let mut gauges: Vec<_> = snapshot
        .budgets
        .iter()
        .map(|level| {
            let burst = level.pace.burst.max(level.available);
            let mut figures = format!("{} of {}", grouped(level.available), grouped(burst));
            if width >= WIDE {
                figures = format!("{figures}, {}/min", grouped(level.pace.per_minute));
            }
            (level.cause, level.available as f64 / burst.max(1) as f64, figures)
        })
        .collect();
    let permits = format!("{} of {}", snapshot.in_flight, snapshot.concurrency);
    let used = snapshot.in_flight as f64 / snapshot.concurrency.max(1) as f64;
    gauges.push((Cause::Permits, used, permits));

    let longest = gauges.iter().map(|(_, _, figures)| figures.chars().count()).max();
    let room = width.saturating_sub(NAME_WIDTH + 1 + longest.unwrap_or(0) + MARK.len());
    let bar_width = if room >= MIN_BAR { room.min(MAX_BAR) } else { 0 };
    let lines = gauges.into_iter().map(|(cause, ratio, figures)| {
        let binds = snapshot.waits_for == cause;
        let name = format!("{:<NAME_WIDTH$}", cause.short_name());
        let mut spans = vec![Span::from(cut(&name, width))];
        let mut left = width.saturating_sub(NAME_WIDTH);
        if bar_width > 0 {
            let color = if binds { Color::Yellow } else { Color::Cyan };
            spans.extend(bar(ratio.clamp(0.0, 1.0), bar_width, color));
            spans.push(Span::from(" "));
            left -= bar_width + 1;
        }
        let figures = cut(&figures, left);
        left -= figures.chars().count();
        spans.push(Span::from(figures));
        if binds {
            spans.push(Span::from(cut(MARK, left)).bold());
        }
        Line::from(spans)
    });
    lines.collect()
}

/// The two parts of a bar. They differ without colours, too.
fn bar(ratio: f64, width: usize, color: Color) -> Vec<Span<'static>> {
    // A bar is full only when everything is done, and not empty when something is.
    let filled = (ratio * width as f64).floor() as usize;
    let filled = if ratio > 0.0 { filled.max(1) } else { 0 };
    vec![
        Span::styled("█".repeat(filled), Style::new().fg(color)),
        Span::styled("░".repeat(width - filled), Style::new().fg(Color::DarkGray)),
    ]
}

/// Puts as many items on each line as there is room for.
fn wrap<'a>(items: impl Iterator<Item = &'a str>, separator: &str, width: usize, style: Style) -> Vec<Line<'static>> {
    let mut texts: Vec<String> = Vec::new();
    for item in items {
        match texts.last_mut() {
            Some(last) if last.chars().count() + separator.len() + item.chars().count() <= width => {
                last.push_str(separator);
                last.push_str(item);
            }
            _ => texts.push(cut(item, width)),
        }
    }
    texts.into_iter().map(|text| Line::styled(text, style)).collect()
}

/// Cuts a text that is wider than `width`, and marks the cut.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept = text.chars().take(width.saturating_sub(1));
    kept.chain((width > 0).then_some('…')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{picture, sample};
    use ratatui::{Terminal, backend::TestBackend, widgets::Paragraph};

    fn draw(snapshot: &Snapshot, width: u16) -> Terminal<TestBackend> {
        let lines = lines(snapshot, width);
        let mut terminal = Terminal::new(TestBackend::new(width, lines.len() as u16)).unwrap();
        let draw = |frame: &mut ratatui::Frame<'_>| frame.render_widget(Paragraph::new(lines), frame.area());
        terminal.draw(draw).unwrap();
        terminal
    }

    fn shown(snapshot: &Snapshot, width: u16) -> Vec<String> {
        let terminal = draw(snapshot, width);
        let buffer = terminal.backend().buffer();
        let rows = buffer.content().chunks(usize::from(width));
        rows.map(|row| {
            row.iter()
                .map(|cell| cell.symbol())
                .collect::<String>()
                .trim_end()
                .to_owned()
        })
        .collect()
    }

    #[test]
    fn eighty_columns_have_the_whole_view() {
        assert_eq!(shown(&sample(), 80), EIGHTY);
    }

    #[test]
    fn forty_columns_have_the_same_in_more_lines() {
        assert_eq!(shown(&sample(), 40), FORTY);
    }

    #[test]
    fn a_pause_takes_the_place_of_what_is_waited_for() {
        let mut snapshot = sample();
        snapshot.pause = Some(crate::view::state::PauseView {
            until: snapshot.now + std::time::Duration::from_secs(75),
            by: "the provider: 429 Too Many Requests, Retry-After 75".to_owned(),
        });
        let pause = "paused until 14:04:35 UTC (1 min 15 s) by the provider: 429 Too Many Requests,";
        assert_eq!(shown(&snapshot, 80)[2..4], [pause, "Retry-After 75"]);
    }

    #[test]
    fn no_width_is_too_small_and_no_line_is_wider() {
        for width in 1..200 {
            for line in lines(&sample(), width) {
                assert!(line.width() <= usize::from(width).max(10), "{width}: {line}");
            }
        }
    }

    #[test]
    fn a_bar_is_full_only_at_the_end() {
        let filled = |ratio| bar(ratio, 10, Color::Green)[0].width();
        assert_eq!([0.0, 0.001, 0.5, 0.999, 1.0].map(filled), [0, 1, 5, 9, 10]);
    }

    #[test]
    fn the_picture_in_the_readme_is_the_view() {
        let terminal = draw(&sample(), 80);
        picture::compare("live.svg", &picture::svg(terminal.backend().buffer()));
    }

    const EIGHTY: &[&str] = &[
        "1,234 of 5,000, 24.7 %                     1 min 12 s, 3 min 40 s left by tokens",
        "███████████████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░",
        "waiting for tokens per minute   100 queued   2 to retry",
        "done 1,231   failed 3   retried 12   429s 12   tokens 345,678",
        "cost 1.2346 of 10.00",
        "requests  ██████████████████████████░░░░░░░░░ 19 of 25, 1,500/min",
        "tokens    ██░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░ 310 of 4,000, 240,000/min < limits",
        "in flight ███████░░░░░░░░░░░░░░░░░░░░░░░░░░░░ 7 of 32",
        r#"last failure: 503 Service Unavailable: {"error": {"message": "overloaded"}}"#,
    ];

    const FORTY: &[&str] = &[
        "1,234 of 5,000, 24.7 %",
        "1 min 12 s, 3 min 40 s left",
        "█████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░",
        "waiting for tokens   100 queued",
        "2 to retry",
        "done 1,231   failed 3   retried 12",
        "429s 12   tokens 345,678",
        "cost 1.2346 of 10.00",
        "requests  ██████░░ 19 of 25",
        "tokens    █░░░░░░░ 310 of 4,000 < limits",
        "in flight █░░░░░░░ 7 of 32",
        "last failure: 503 Service Unavailable: …",
    ];
}
