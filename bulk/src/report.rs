//! The picture of a run (`--report`): requests and tokens over time against the limits, what was waited for, failures.

use crate::{
    attempts::clean,
    recording::Recording,
    summary::Summary,
    view::text::{grouped, span},
};
use anyhow::Context;
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::{fs, path::Path, time::Duration};

const WIDTH: u32 = 1_000;
const HEAD: u32 = 50;
const CURVES: u32 = 440;

/// The height above the first bar, and of each bar with the space below it.
const BARS_HEAD: u32 = 34;
const BAR: u32 = 28;

const INK: RGBColor = RGBColor(31, 41, 51);
const FAINT: RGBColor = RGBColor(97, 110, 124);
const GRID: RGBColor = RGBColor(228, 231, 235);
const SENT: RGBColor = RGBColor(16, 72, 124);
const LIMIT: RGBColor = RGBColor(214, 122, 24);
const FAILED: RGBColor = RGBColor(190, 30, 45);
const WAITED: RGBColor = RGBColor(106, 153, 193);

/// The number of kinds of failures that have a bar.
const MAX_BARS: usize = 7;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A bar with its name, its length and what is written behind it.
struct Bar {
    name: String,
    length: f64,
    figure: String,
    color: RGBColor,
}

/// Writes the report of a run to a file: a drawing if its name ends with `.svg`, otherwise a page.
pub(crate) fn write(path: &Path, summary: &Summary) -> anyhow::Result<()> {
    let drawing = draw(summary).context("cannot draw the report")?;
    let is_drawing = path.extension().is_some_and(|extension| extension == "svg");
    let text = if is_drawing { drawing } else { page(&drawing, summary) };
    fs::write(path, text).with_context(|| format!("cannot write the report to {}", path.display()))
}

/// Returns a page without external parts. Its colours are fixed, so that it is readable also where pages are dark.
fn page(drawing: &str, summary: &Summary) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n<style>\n\
         :root {{ color-scheme: light; }}\n\
         body {{ margin: 2rem auto; max-width: 1000px; padding: 0 1rem; background: #fff; color: #1f2933; \
         font-family: system-ui, sans-serif; }}\n\
         svg {{ width: 100%; height: auto; }}\n\
         pre {{ padding: 1rem; background: #f4f6f8; border-radius: 6px; overflow-x: auto; }}\n\
         </style>\n</head>\n<body>\n{drawing}\n<pre>{text}</pre>\n</body>\n</html>\n",
        title = escaped(&headline(summary)),
        text = escaped(&summary.to_string()),
    )
}

fn headline(summary: &Summary) -> String {
    let counts = &summary.counts;
    format!(
        "{} requests completed, {} failed, in {}",
        grouped(counts.completed),
        grouped(counts.failed),
        span(summary.elapsed)
    )
}

fn draw(summary: &Summary) -> anyhow::Result<String> {
    let (waits, failures) = (waits(&summary.recording), failures(summary));
    let rows = waits.len().max(failures.len()).max(1) as u32;
    let height = HEAD + CURVES + BARS_HEAD + rows * BAR + 10;
    let mut drawing = String::new();
    {
        let root = SVGBackend::with_string(&mut drawing, (WIDTH, height)).into_drawing_area();
        // The background is part of the drawing, so that it is readable on a dark page.
        root.fill(&WHITE)?;
        let (head, below) = root.split_vertically(HEAD);
        write_on(&head, (20, 28), 22, INK, HPos::Left, &headline(summary))?;
        let (curves, bars) = below.split_vertically(CURVES);
        let [requests, tokens] = curves_of(&summary.recording);
        let halves = curves.split_evenly((2, 1));
        draw_curve(&halves[0], "requests sent", &requests)?;
        draw_curve(&halves[1], "tokens used", &tokens)?;
        let halves = bars.split_evenly((1, 2));
        draw_bars(&halves[0], "what the run waited for", &waits)?;
        draw_bars(&halves[1], "failed attempts", &failures)?;
        root.present()?;
    }
    Ok(drawing)
}

/// The sums over time of what was sent, and of what the limit allowed.
struct Curve {
    sent: Vec<(f64, f64)>,
    /// `None` without a limit.
    allowed: Option<Vec<(f64, f64)>>,
}

fn curves_of(recording: &Recording) -> [Curve; 2] {
    let mut sums = recording.initial.map(|initial| (0.0, initial));
    let mut curves = [0, 1].map(|budget| Curve {
        sent: vec![(0.0, 0.0)],
        allowed: recording.has_limit[budget].then(|| vec![(0.0, recording.initial[budget])]),
    });
    for (end, slot) in recording.slots() {
        let amounts = [
            (slot.requests as f64, slot.allowed_requests),
            (slot.tokens as f64, slot.allowed_tokens),
        ];
        for ((curve, (sent, allowed)), (amount, added)) in curves.iter_mut().zip(&mut sums).zip(amounts) {
            *sent += amount;
            *allowed += added;
            curve.sent.push((end.as_secs_f64(), *sent));
            if let Some(points) = &mut curve.allowed {
                points.push((end.as_secs_f64(), *allowed));
            }
        }
    }
    curves
}

fn draw_curve(area: &Area<'_>, title: &str, curve: &Curve) -> anyhow::Result<()> {
    let Curve { sent, allowed } = curve;
    let (end, total) = sent.last().copied().unwrap_or_default();
    let (unit, unit_name) = match end {
        0.0..600.0 => (1.0, "s"),
        600.0..36_000.0 => (60.0, "min"),
        _ => (3_600.0, "h"),
    };
    // The line of a limit that is far above what was sent would press the other one to the ground.
    let highest = allowed
        .as_ref()
        .and_then(|points| points.last())
        .map_or(total, |(_, allowed)| allowed.min(1.5 * total));
    let top = (1.08 * highest.max(total)).max(1.0);
    write_on(area, (20, 16), 16, INK, HPos::Left, title)?;
    let key = if allowed.is_some() {
        "orange: what the limit allows"
    } else {
        "no limit"
    };
    let right = area.dim_in_pixel().0 as i32 - 20;
    let key_color = if allowed.is_some() { LIMIT } else { FAINT };
    write_on(area, (right, 16), 14, key_color, HPos::Right, key)?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(28)
        .margin_right(20)
        .x_label_area_size(28)
        .y_label_area_size(84)
        .build_cartesian_2d(0.0..(end / unit).max(f64::EPSILON), 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .x_labels(10)
        .y_labels(5)
        .x_label_formatter(&|time| format!("{time:.*} {unit_name}", usize::from(end / unit < 10.0)))
        .y_label_formatter(&|amount| grouped(*amount as u64))
        .label_style(("sans-serif", 13, &FAINT))
        .draw()?;
    let scaled = |points: &[(f64, f64)]| -> Vec<_> {
        points
            .iter()
            .map(|(time, amount)| (time / unit, amount.min(top)))
            .collect()
    };
    chart.draw_series(AreaSeries::new(scaled(sent), 0.0, SENT.mix(0.15)).border_style(SENT.stroke_width(2)))?;
    if let Some(points) = allowed {
        chart.draw_series(LineSeries::new(scaled(points), LIMIT.stroke_width(2)))?;
    }
    Ok(())
}

/// What the run waited for, and how long.
fn waits(recording: &Recording) -> Vec<Bar> {
    let bar = |name: &str, time: Duration, color| Bar {
        name: name.to_owned(),
        length: time.as_secs_f64(),
        figure: span(time),
        color,
    };
    let mut bars: Vec<_> = recording
        .waits()
        .map(|(cause, time)| bar(cause.name(), time, WAITED))
        .collect();
    bars.sort_by(|one, other| other.length.total_cmp(&one.length));
    bars
}

fn failures(summary: &Summary) -> Vec<Bar> {
    let mut kinds: Vec<_> = summary.attempts.kinds.iter().collect();
    kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let bars = kinds.into_iter().take(MAX_BARS).map(|(kind, count)| Bar {
        name: clean(kind, 34),
        length: *count as f64,
        figure: grouped(*count),
        color: FAILED,
    });
    bars.collect()
}

fn draw_bars(area: &Area<'_>, title: &str, bars: &[Bar]) -> anyhow::Result<()> {
    let width = area.dim_in_pixel().0 as i32;
    let (left, right) = (236, width - 90);
    write_on(area, (20, 16), 16, INK, HPos::Left, title)?;
    if bars.is_empty() {
        return write_on(area, (20, BARS_HEAD as i32 + 10), 14, FAINT, HPos::Left, "none");
    }
    let longest = bars.iter().map(|bar| bar.length).fold(f64::MIN_POSITIVE, f64::max);
    for (row, bar) in (0..).zip(bars) {
        let top = (BARS_HEAD + row * BAR) as i32;
        let length = (f64::from(right - left) * bar.length / longest).round().max(1.0) as i32;
        write_on(area, (left - 8, top + 9), 14, INK, HPos::Right, &bar.name)?;
        area.draw(&Rectangle::new(
            [(left, top), (left + length, top + 18)],
            bar.color.filled(),
        ))?;
        write_on(area, (left + length + 6, top + 9), 14, FAINT, HPos::Left, &bar.figure)?;
    }
    Ok(())
}

fn write_on(area: &Area<'_>, at: (i32, i32), size: u32, color: RGBColor, side: HPos, text: &str) -> anyhow::Result<()> {
    let style = ("sans-serif", size)
        .into_font()
        .color(&color)
        .pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style))?;
    Ok(())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attempts::AttemptCounts,
        limits::{Bounds, Pace},
        summary::{Survey, counts::Counts},
    };
    use std::time::SystemTime;

    fn summary() -> Summary {
        let bounds = Bounds {
            requests: Some(Pace {
                per_minute: 1_500,
                burst: 25,
                initial: 25,
                follows: false,
            }),
            tokens: None,
            further: crate::limits::Further::NONE,
            concurrency: 4,
        };
        let mut recording = Recording::new(SystemTime::UNIX_EPOCH, &bounds);
        let mut snapshot = crate::view::sample();
        for second in 0..1_000 {
            snapshot.elapsed = Duration::from_secs(second);
            recording.sample(&snapshot, Duration::from_secs(1));
        }
        let mut attempts = AttemptCounts::default();
        attempts.kinds.insert("<script>alert(1)</script> & more".to_owned(), 3);
        Summary {
            survey: Survey::default(),
            counts: Counts::default(),
            attempts,
            recording,
            bounds,
            elapsed: Duration::from_secs(1_000),
            not_sent: 0,
        }
    }

    #[test]
    fn text_of_a_provider_cannot_become_markup() {
        let drawing = draw(&summary()).unwrap();
        for text in [page(&drawing, &summary()), drawing] {
            assert!(!text.contains("<script"), "{text}");
            assert!(text.contains("&lt;script"), "{text}");
        }
    }

    #[test]
    fn a_page_loads_nothing_and_has_its_own_colours() {
        let page = page(&draw(&summary()).unwrap(), &summary());
        for part in ["src=", "href=", "@import", "url("] {
            assert!(!page.contains(part), "{part}");
        }
        assert!(page.contains("background: #fff"));
        assert!(page.contains("what the run waited for"));
    }

    #[test]
    fn a_run_that_sent_nothing_has_a_report() {
        let mut summary = summary();
        summary.recording = Recording::new(SystemTime::UNIX_EPOCH, &summary.bounds);
        assert!(draw(&summary).unwrap().contains("requests sent"));
    }
}
