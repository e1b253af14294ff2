//! The report: a table for each section, the verdicts, and lines for other programs.

/// The figures of a section: a column for each kind of figure, a row for each size.
pub(crate) struct Table {
    section: &'static str,
    figures: Vec<(&'static str, usize, f64)>,
    bars: Vec<(&'static str, usize, Bar)>,
}

/// The largest acceptable value of a figure, and the value to aim for.
pub(crate) struct Bar {
    pub(crate) max: f64,
    pub(crate) aim: f64,
}

impl Table {
    pub(crate) const fn new(section: &'static str) -> Self {
        Self {
            section,
            figures: Vec::new(),
            bars: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, column: &'static str, n: usize, figure: f64) {
        self.figures.push((column, n, figure));
    }

    pub(crate) fn bar(&mut self, column: &'static str, n: usize, bar: Bar) {
        self.bars.push((column, n, bar));
    }

    fn figure(&self, column: &str, n: usize) -> Option<f64> {
        let mut figures = self.figures.iter();
        figures.find_map(|&(name, size, figure)| (name == column && size == n).then_some(figure))
    }

    pub(crate) fn print(&self) {
        let (mut columns, mut sizes) = (Vec::new(), Vec::new());
        for &(column, n, _) in &self.figures {
            if !columns.contains(&column) {
                columns.push(column);
            }
            if !sizes.contains(&n) {
                sizes.push(n);
            }
        }
        print!("{:<17}{:>9}", self.section, "n");
        columns.iter().for_each(|column| print!(" {column:>12}"));
        for n in sizes {
            print!("\n{:<17}{n:>9}", "");
            for column in &columns {
                let figure = self.figure(column, n).map(|figure| format!("{figure:.2}"));
                print!(" {:>12}", figure.unwrap_or_default());
            }
        }
        println!("\n");
    }

    pub(crate) fn print_verdicts(&self) {
        for (column, n, Bar { max, aim }) in &self.bars {
            let Some(figure) = self.figure(column, *n) else {
                continue;
            };
            let verdict = match figure {
                figure if figure <= *aim => "ok",
                figure if figure <= *max => "ok, aim not reached",
                _ => "not reached",
            };
            let name = format!("{}-{column}", self.section);
            println!("{name:<32}{n:>9} {figure:>9.2} {max:>6} {aim:>6}  {verdict}");
        }
    }

    pub(crate) fn print_for_programs(&self) {
        for (column, n, figure) in &self.figures {
            println!("scale {}-{column} {n} = {figure:.2}", self.section);
        }
    }
}
