//! Draws a picture of the scraped pages: four panels of the dashboard `docs/grafana.json`.

use crate::page::{Sample, sum};
use plotters::{coord::Shift, prelude::*};
use std::{path::Path, time::Duration};

/// A page, and when it was scraped.
pub(crate) struct Scraped {
    pub(crate) at: Duration,
    pub(crate) samples: Vec<Sample>,
}

const SIZE: (u32, u32) = (1_200, 720);
const INK: RGBColor = RGBColor(31, 41, 51);
const FAINT: RGBColor = RGBColor(97, 110, 124);
const GRID: RGBColor = RGBColor(228, 231, 235);
const COLORS: [RGBColor; 3] = [RGBColor(16, 72, 124), RGBColor(207, 17, 36), RGBColor(97, 150, 60)];

/// A curve: its name in the legend, the metric, and a label that its lines have.
type Curve = (&'static str, &'static str, Option<(&'static str, &'static str)>);

/// What a panel shows, and whether its curves are the sums so far, of which the change per second is drawn.
const PANELS: [(&str, bool, &[Curve]); 4] = [
    (
        "Calls a second, by status",
        true,
        &[
            (
                "completed",
                "outbound_calls_total",
                Some(("outbound_status", "COMPLETED")),
            ),
            ("throttled", "outbound_throttled_total", None),
            ("retries", "outbound_retries_total", None),
        ],
    ),
    (
        "Queued and in flight",
        false,
        &[
            ("queued", "outbound_queue_depth", None),
            ("in flight", "outbound_in_flight", None),
            ("limit", "outbound_in_flight_limit", None),
        ],
    ),
    (
        "Available of the requests",
        false,
        &[("requests", "outbound_available", Some(("outbound_budget", "requests")))],
    ),
    (
        "Seconds waited in a second, by cause",
        true,
        &[
            ("turn", "outbound_wait_seconds_sum", Some(("outbound_cause", "turn"))),
            (
                "budget",
                "outbound_wait_seconds_sum",
                Some(("outbound_cause", "budget")),
            ),
            (
                "backoff",
                "outbound_wait_seconds_sum",
                Some(("outbound_cause", "backoff")),
            ),
        ],
    ),
];

/// The changes per second are those over this many pages.
const WINDOW: usize = 5;

pub(crate) fn draw(file: &Path, scraped: &[Scraped]) -> anyhow::Result<()> {
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = ("sans-serif", 24).into_font().style(FontStyle::Bold).color(&INK);
    let root = root.titled("Metrics of 300 calls: 100 at once, and then 40 a second", title)?;
    for (cell, (name, is_sum, curves)) in root.split_evenly((2, 2)).iter().zip(PANELS) {
        let points: Vec<_> = curves.iter().map(|curve| points(scraped, curve, is_sum)).collect();
        draw_panel(cell, name, curves, &points)?;
    }
    root.present()?;
    Ok(())
}

fn points(scraped: &[Scraped], (_, metric, label): &Curve, is_sum: bool) -> Vec<(f64, f64)> {
    let all: Vec<_> = scraped
        .iter()
        .map(|page| (page.at.as_secs_f64(), sum(&page.samples, metric, *label)))
        .collect();
    if !is_sum {
        return all;
    }
    let change = |pages: &[(f64, f64)]| {
        let ((from, before), (at, now)) = (pages[0], pages[WINDOW]);
        (at, (now - before) / (at - from))
    };
    all.windows(WINDOW + 1).map(change).collect()
}

fn draw_panel(
    cell: &DrawingArea<SVGBackend<'_>, Shift>,
    name: &str,
    curves: &[Curve],
    points: &[Vec<(f64, f64)>],
) -> anyhow::Result<()> {
    let all = || points.iter().flatten();
    let end = all().map(|(at, _)| *at).fold(1.0, f64::max);
    let top = all().map(|(_, value)| *value).fold(1.0, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(cell)
        .caption(name, ("sans-serif", 18).into_font().color(&INK))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(("sans-serif", 13).into_font().color(&FAINT))
        .x_label_formatter(&|at| format!("{at:.0} s"))
        .draw()?;
    for (((legend, ..), points), color) in curves.iter().zip(points).zip(COLORS) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
            .label(*legend)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 13).into_font().color(&INK))
        .draw()?;
    Ok(())
}
