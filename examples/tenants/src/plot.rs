//! Draws a picture: which part of its calls each tenant has had answered over time, in either order.

use crate::{
    load::{ACCOUNT, LARGE, TENANTS, Tenant},
    run::Answered,
};
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::{path::Path, time::Duration};

const SIZE: (u32, u32) = (1_200, 540);
const TITLE_HEIGHT: u32 = 96;
const HEAD_HEIGHT: u32 = 56;

const INK: RGBColor = RGBColor(31, 41, 51);
const FAINT: RGBColor = RGBColor(97, 110, 124);
const GRID: RGBColor = RGBColor(228, 231, 235);
/// One color for each tenant.
const COLORS: [RGBColor; 3] = [RGBColor(150, 160, 172), RGBColor(16, 72, 124), RGBColor(207, 17, 36)];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(crate) fn draw(file: &Path, first_in: &[Answered], fair: &[Answered]) -> anyhow::Result<()> {
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (title, below) = root.split_vertically(TITLE_HEIGHT);
    write_on(
        &title,
        (24, 24),
        bold(24),
        "A flood of calls, and two tenants beside it",
    )?;
    let about = TENANTS
        .map(|tenant| format!("{}: {}", tenant.name, tenant.about))
        .join("; ");
    let limits =
        format!("{about}. {ACCOUNT} calls/s in all, and {LARGE}/s of the large model, which every fifth call is for.");
    write_on(&title, (24, 54), plain(15, FAINT), &limits)?;
    let lines = "Thin lines: calls submitted; thick lines: calls answered. Times: the longest wait for an answer.";
    write_on(&title, (24, 76), plain(15, FAINT), lines)?;

    let runs = [("First in, first out", first_in), ("Fair between tenants", fair)];
    let last = runs
        .iter()
        .flat_map(|(_, run)| *run)
        .filter_map(|tenant| tenant.at.last());
    let end = last.max().map_or(1.0, Duration::as_secs_f64) * 1.03;
    for (cell, (name, answered)) in below.split_evenly((1, 2)).iter().zip(runs) {
        draw_run(cell, name, answered, end)?;
    }
    root.present()?;
    Ok(())
}

fn draw_run(cell: &Area<'_>, name: &str, answered: &[Answered], end: f64) -> anyhow::Result<()> {
    let (head, body) = cell.split_vertically(HEAD_HEIGHT);
    write_on(&head, (64, 14), bold(19), name)?;
    let mut x = 64;
    for ((tenant, answered), color) in TENANTS.iter().zip(answered).zip(COLORS) {
        let text = format!("{}: {:.2} s", tenant.name, answered.longest.as_secs_f64());
        head.draw(&PathElement::new([(x, 40), (x + 22, 40)], color.stroke_width(3)))?;
        write_on(&head, (x + 30, 40), plain(15, INK), &text)?;
        x += 160;
    }
    let mut chart = ChartBuilder::on(&body)
        .margin_right(24)
        .margin_bottom(12)
        .x_label_area_size(34)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0.0..105.0)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(plain(14, FAINT))
        .x_labels(7)
        .y_labels(5)
        .x_label_formatter(&|at| format!("{at:.0} s"))
        .y_label_formatter(&|part| format!("{part:.0} %"))
        .draw()?;
    for ((tenant, answered), color) in TENANTS.iter().zip(answered).zip(COLORS) {
        let submitted = (0..tenant.calls).map(|call| tenant.submitted_at(call));
        let faint = color.mix(0.35).stroke_width(1);
        chart.draw_series(LineSeries::new(steps(submitted, tenant), faint))?;
        chart.draw_series(LineSeries::new(
            steps(answered.at.iter().copied(), tenant),
            color.stroke_width(3),
        ))?;
    }
    Ok(())
}

/// The part of the tenant's calls, in percent, as a step curve over the times of its calls in seconds.
fn steps(times: impl Iterator<Item = Duration>, tenant: &Tenant) -> impl Iterator<Item = (f64, f64)> {
    let part = 100.0 / f64::from(tenant.calls);
    (0..).zip(times).flat_map(move |(before, at)| {
        let at = at.as_secs_f64();
        [(at, f64::from(before) * part), (at, f64::from(before + 1) * part)]
    })
}

fn plain(size: u32, color: RGBColor) -> TextStyle<'static> {
    let middle = Pos::new(HPos::Left, VPos::Center);
    ("sans-serif", size).into_font().color(&color).pos(middle)
}

fn bold(size: u32) -> TextStyle<'static> {
    let middle = Pos::new(HPos::Left, VPos::Center);
    let font = ("sans-serif", size).into_font().style(FontStyle::Bold);
    font.color(&INK).pos(middle)
}

fn write_on(area: &Area<'_>, at: (i32, i32), style: TextStyle<'static>, text: &str) -> anyhow::Result<()> {
    area.draw(&Text::new(text.to_owned(), at, style))?;
    Ok(())
}
