//! Draws a picture: the calls that each limiter admitted over time, and the most calls that an exact bucket would have
//! admitted.
//!
//! The load is one call, then a pause in which the bucket fills up, and then more callers than the limit admits. When
//! these callers arrive, a limiter that counts in windows has most of its first window left, and it opens the next
//! window soon after.

use crate::{
    figures::{Budget, Call, admissions, empirical_burst, envelope, overtakings, waits},
    limiters::{Limiter, Limits},
    load::{CALLERS, Load, Tokens},
};
use anyhow::Context;
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use resvg::{
    tiny_skia::{Pixmap, Transform},
    usvg::{Options, Tree},
};
use std::{env, fs, time::Duration};

const LOAD: Load = Load {
    limits: Limits::requests(Budget::new(200, 20)),
    tokens: Tokens::UpTo(1),
    pause: Duration::from_millis(90),
    length: Duration::from_millis(600),
};

/// The limiters in the picture. It leaves a place for the key.
const DRAWN: [Limiter; 5] = [
    Limiter::TowerOutbound,
    Limiter::Governor,
    Limiter::LeakyBucket,
    Limiter::TowerResilience,
    Limiter::Tower,
];

const SIZE: (u32, u32) = (1_200, 820);
const TITLE_HEIGHT: u32 = 70;
const HEAD_HEIGHT: u32 = 86;
const COLUMNS: usize = 3;

const INK: RGBColor = RGBColor(31, 41, 51);
const FAINT: RGBColor = RGBColor(97, 110, 124);
const GRID: RGBColor = RGBColor(228, 231, 235);
const ALLOWED: RGBColor = RGBColor(225, 236, 246);
const EDGE: RGBColor = RGBColor(130, 165, 198);
const ADMITTED: RGBColor = RGBColor(16, 72, 124);
const EXCESS: RGBColor = RGBColor(207, 17, 36);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

struct Panel {
    limiter: Limiter,
    calls: Vec<Call>,
    admissions: Vec<Call>,
}

/// A part of the curve of admitted calls, and whether that part is above the envelope.
struct Piece {
    points: Vec<(f64, f64)>,
    excess: bool,
}

pub(crate) fn draw() -> anyhow::Result<()> {
    let panels = DRAWN.map(|limiter| {
        let calls = LOAD.run(limiter).calls;
        let admissions = admissions(&calls);
        Panel {
            limiter,
            calls,
            admissions,
        }
    });
    // The executable is in `target/release/deps`, so the target directory is three levels up.
    let executable = env::current_exe().context("finding the target directory")?;
    let target = executable.ancestors().nth(3).context("finding the target directory")?;
    let (svg, png) = (target.join("pacing.svg"), target.join("pacing.png"));
    let mut drawing = String::new();
    draw_on(
        &SVGBackend::with_string(&mut drawing, SIZE).into_drawing_area(),
        &panels,
    )?;
    fs::write(&svg, &drawing).with_context(|| format!("writing {}", svg.display()))?;
    rasterize(&drawing)?
        .save_png(&png)
        .with_context(|| format!("writing {}", png.display()))?;
    println!("{}\n{}", svg.display(), png.display());
    Ok(())
}

/// Renders the drawing at twice its size. The fonts come from a crate, because the machine may have none.
fn rasterize(drawing: &str) -> anyhow::Result<Pixmap> {
    let mut options = Options::default();
    let fonts = options.fontdb_mut();
    fonts.load_font_data(dejavu::sans::regular().to_vec());
    fonts.load_font_data(dejavu::sans::bold().to_vec());
    fonts.set_sans_serif_family("DejaVu Sans");
    let tree = Tree::from_str(drawing, &options)?;
    let mut pixels = Pixmap::new(2 * SIZE.0, 2 * SIZE.1).context("the picture has a size")?;
    resvg::render(&tree, Transform::from_scale(2.0, 2.0), &mut pixels.as_mut());
    Ok(pixels)
}

fn draw_on(root: &Area<'_>, panels: &[Panel]) -> anyhow::Result<()> {
    let Budget { rate, burst } = LOAD.limits.requests;
    root.fill(&WHITE)?;
    let (title, below) = root.split_vertically(TITLE_HEIGHT);
    write_on(
        &title,
        (24, 20),
        bold(24),
        &format!("A limit of {rate} calls a second with a burst of {burst}"),
    )?;
    let story = format!(
        "One call at 0 ms; from {} ms on, {CALLERS} callers that each make one call after the other.",
        LOAD.pause.as_millis()
    );
    write_on(&title, (24, 50), plain(16, FAINT), &story)?;

    let rows = panels.len().div_ceil(COLUMNS);
    let cells = below.split_evenly((rows, COLUMNS));
    for (cell, panel) in cells.iter().zip(panels) {
        panel.draw_on(cell)?;
    }
    if let Some(cell) = cells.get(panels.len()) {
        draw_key(cell)?;
    }
    root.present()?;
    Ok(())
}

fn draw_key(cell: &Area<'_>) -> anyhow::Result<()> {
    let lines = [
        (ADMITTED, "calls admitted"),
        (EXCESS, "more than the limit allows"),
        (EDGE, "the most that the limit allows"),
    ];
    for (line, (color, text)) in (0..).zip(lines) {
        let y = HEAD_HEIGHT as i32 + 30 + 34 * line;
        let swatch = if color == EDGE {
            cell.draw(&Rectangle::new([(64, y - 10), (100, y + 10)], ALLOWED.filled()))?;
            PathElement::new([(64, y - 10), (100, y - 10)], EDGE.stroke_width(2))
        } else {
            PathElement::new([(64, y), (100, y)], color.stroke_width(3))
        };
        cell.draw(&swatch)?;
        write_on(cell, (114, y), plain(16, INK), text)?;
    }
    let notes = [
        "The bucket holds a burst and fills at the rate.",
        "Below its edge, calls wait longer than they need to.",
    ];
    for (line, note) in (0..).zip(notes) {
        let y = HEAD_HEIGHT as i32 + 150 + 24 * line;
        write_on(cell, (64, y), plain(14, FAINT), note)?;
    }
    Ok(())
}

// === impl Panel ===

impl Panel {
    fn draw_on(&self, cell: &Area<'_>) -> anyhow::Result<()> {
        let (head, body) = cell.split_vertically(HEAD_HEIGHT);
        write_on(&head, (64, 18), bold(19), &self.title())?;
        let burst = empirical_burst(&self.admissions, LOAD.limits.requests, Call::one);
        let excess = exceeds(burst, LOAD.limits.requests.burst as f64);
        let color = if excess { EXCESS } else { FAINT };
        let calls = format!(
            "{} of {} calls, largest burst {burst:.1}",
            self.admissions.len(),
            Self::possible()
        );
        write_on(&head, (64, 45), plain(15, color), &calls)?;
        let order = format!(
            "longest wait {:.0} ms, {} calls overtook",
            waits(&self.calls, Duration::ZERO).max,
            overtakings(&self.calls)
        );
        write_on(&head, (64, 67), plain(15, FAINT), &order)?;

        let end = LOAD.length.as_secs_f64() * 1e3;
        let mut chart = ChartBuilder::on(&body)
            .margin_right(24)
            .margin_bottom(12)
            .x_label_area_size(34)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..end, 0.0..f64::from(Self::possible()) * 1.1)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(plain(14, FAINT))
            .x_labels(7)
            .y_labels(6)
            .x_label_formatter(&|at| if *at == 0.0 { "0 ms".into() } else { format!("{at:.0}") })
            .y_label_formatter(&|count| format!("{count:.0}"))
            .draw()?;
        let edge = self.edge();
        chart.draw_series(AreaSeries::new(edge.iter().copied(), 0.0, ALLOWED))?;
        chart.draw_series(LineSeries::new(edge.iter().copied(), EDGE.stroke_width(1)))?;
        for Piece { points, excess } in self.pieces() {
            let style = if excess {
                EXCESS.stroke_width(3)
            } else {
                ADMITTED.stroke_width(2)
            };
            chart.draw_series(LineSeries::new(points, style))?;
        }
        Ok(())
    }

    fn title(&self) -> String {
        match self.limiter.interval(LOAD.limits.requests) {
            Some((amount, interval)) => format!("{}: {amount} every {} ms", self.limiter, interval.as_millis()),
            None => self.limiter.to_string(),
        }
    }

    /// The number of calls that an exact limiter admits: the burst, and the inflow from the end of the pause to the end
    /// of the run.
    fn possible() -> u32 {
        let busy = LOAD.limits.requests.inflow(LOAD.length - LOAD.pause);
        LOAD.limits.requests.burst as u32 + busy.ceil() as u32
    }

    /// The corners of the envelope, with times in milliseconds.
    fn edge(&self) -> Vec<(f64, f64)> {
        let corners = envelope(&self.admissions, LOAD.limits.requests, LOAD.length);
        corners.into_iter().map(|(at, allowed)| (millis(at), allowed)).collect()
    }

    /// The number of admitted calls over time as a step curve, cut where it crosses the envelope.
    fn pieces(&self) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut add = |from: (f64, f64), to: (f64, f64), excess: bool| match pieces.last_mut() {
            Some(piece) if piece.excess == excess => piece.points.push(to),
            _ => pieces.push(Piece {
                points: vec![from, to],
                excess,
            }),
        };
        let per_milli = LOAD.limits.requests.rate as f64 / 1e3;
        let (mut corner, mut allowed) = ((0.0, 0.0), 0.0);
        let mut edge = self.edge().into_iter().peekable();
        let ends = self
            .admissions
            .iter()
            .skip(1)
            .map(|call| call.waited_until)
            .chain([LOAD.length]);
        for (count, (call, end)) in (1..).map(f64::from).zip(self.admissions.iter().zip(ends)) {
            let (at, end) = (millis(call.waited_until), millis(end));
            while let Some((_, most)) = edge.next_if(|(time, _)| *time <= at) {
                allowed = most;
            }
            let excess = exceeds(count, allowed);
            add(corner, (at, corner.1), false);
            add((at, corner.1), (at, count), excess);
            let back = at + (count - allowed) / per_milli;
            if excess && back < end {
                add((at, count), (back, count), true);
                add((back, count), (end, count), false);
            } else {
                add((at, count), (end, count), excess);
            }
            corner = (end, count);
        }
        pieces
    }
}

// === Details ===

/// Returns whether a count is above the allowed one by a call or more. A smaller difference is not counted, because a
/// caller records the time a little after its admission.
fn exceeds(count: f64, allowed: f64) -> bool {
    count >= allowed + 1.0
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn plain(size: u32, color: RGBColor) -> TextStyle<'static> {
    let middle = Pos::new(HPos::Left, VPos::Center);
    ("sans-serif", size).into_font().color(&color).pos(middle)
}

fn bold(size: u32) -> TextStyle<'static> {
    let middle = Pos::new(HPos::Left, VPos::Center);
    ("sans-serif", size)
        .into_font()
        .style(FontStyle::Bold)
        .color(&INK)
        .pos(middle)
}

fn write_on(area: &Area<'_>, at: (i32, i32), style: TextStyle<'static>, text: &str) -> anyhow::Result<()> {
    area.draw(&Text::new(text.to_owned(), at, style))?;
    Ok(())
}
