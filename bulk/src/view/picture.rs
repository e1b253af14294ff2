//! Draws a view as an SVG file, for the README.

use ratatui::{
    buffer::{Buffer, Cell},
    style::{Color, Modifier},
};
use std::{env, fmt::Write as _, fs, path::Path};

const CELL_WIDTH: f64 = 8.4;
const CELL_HEIGHT: usize = 20;
const MARGIN: usize = 12;

/// Returns a picture of the cells, as a dark terminal shows them.
pub(super) fn svg(buffer: &Buffer) -> String {
    let (columns, rows) = (usize::from(buffer.area.width), usize::from(buffer.area.height));
    let width = (columns as f64 * CELL_WIDTH) as usize + 2 * MARGIN;
    let height = rows * CELL_HEIGHT + 2 * MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\">\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#16191d\"/>\n\
         <g font-family=\"DejaVu Sans Mono, Menlo, Consolas, monospace\" font-size=\"14\" xml:space=\"preserve\">\n"
    );
    for (y, row) in buffer.content().chunks(columns).enumerate() {
        for (x, cells) in runs(row) {
            let text: String = cells.iter().map(Cell::symbol).collect();
            if text.trim().is_empty() {
                continue;
            }
            let (left, base) = (MARGIN as f64 + x as f64 * CELL_WIDTH, MARGIN + y * CELL_HEIGHT + 15);
            let color = color(cells[0].fg);
            let weight = if cells[0].modifier.contains(Modifier::BOLD) {
                " font-weight=\"bold\""
            } else {
                ""
            };
            let length = cells.len() as f64 * CELL_WIDTH;
            // Writing to a string cannot fail.
            let _ = writeln!(
                svg,
                "<text x=\"{left:.1}\" y=\"{base}\" textLength=\"{length:.1}\" fill=\"{color}\"{weight}>{}</text>",
                text.replace('&', "&amp;").replace('<', "&lt;")
            );
        }
    }
    svg.push_str("</g>\n</svg>\n");
    svg
}

/// Compares a picture with the file of this name in `docs/`.
///
/// # Panics
///
/// Panics if they differ. If the environment variable `UPDATE_PICTURES` is set, writes the file instead.
pub(super) fn compare(name: &str, picture: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
    if env::var_os("UPDATE_PICTURES").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, picture).unwrap();
    }
    let is_same = fs::read_to_string(&path).is_ok_and(|file| file == picture);
    assert!(
        is_same,
        "{} is out of date: run this test with UPDATE_PICTURES=1",
        path.display()
    );
}

/// Splits a row where the style changes. Returns the column of each part with its cells.
fn runs(row: &[Cell]) -> Vec<(usize, &[Cell])> {
    let parts = row.chunk_by(|one, other| one.style() == other.style());
    let with_column = parts.scan(0, |column, cells| {
        let start = *column;
        *column += cells.len();
        Some((start, cells))
    });
    with_column.collect()
}

const fn color(color: Color) -> &'static str {
    match color {
        Color::Green => "#7ec77b",
        Color::Yellow => "#e5c07b",
        Color::Cyan => "#63b3d6",
        Color::Red => "#e0737b",
        Color::DarkGray => "#4a515b",
        _ => "#d6dae0",
    }
}
