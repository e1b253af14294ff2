//! The options of what is shown before, during and after a run, and of what it costs.

use crate::price::{Money, PerMillion, Price};
use clap::ArgGroup;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(next_help_heading = "Display")]
pub(crate) struct ViewArgs {
    /// Show problems and the summary only, no progress
    #[arg(long)]
    pub(crate) quiet: bool,

    /// Show progress as lines, also on a terminal. (Without a terminal, or on one that cannot move its cursor, there are
    /// lines in any case)
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) lines: bool,

    /// Send nothing: show what is recognised in the input, its tokens, what it will cost at most, and how long it will
    /// take under the limits. Needs no key
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Write a picture of the run to this file at its end: a page (.html) or a drawing (.svg)
    #[arg(long, value_name = "FILE", value_parser = report_file)]
    pub(crate) report: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) cost: CostArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Cost")]
#[command(group = ArgGroup::new("price").args(["price_in", "price_out"]).multiple(true))]
pub(crate) struct CostArgs {
    /// Price of a million input tokens, in any currency: 0.15. With prices, the cost is in results and summary
    #[arg(long, value_name = "PRICE")]
    price_in: Option<PerMillion>,

    /// Price of a million output tokens
    #[arg(long, value_name = "PRICE")]
    price_out: Option<PerMillion>,

    /// Price of a million input tokens that the provider reads from its cache [default: the value of --price-in]
    #[arg(long, value_name = "PRICE", requires = "price_in")]
    price_cached_in: Option<PerMillion>,

    /// Stop when the next request could exceed this cost: what is spent, and the estimates of the requests that are
    /// under way, count. Exceeded only by requests that use more tokens than estimated. Attempts whose answer is lost
    /// (a timeout, for example) do not count
    #[arg(long, value_name = "AMOUNT", requires = "price")]
    pub(crate) max_cost: Option<Money>,
}

impl CostArgs {
    /// Returns the prices; `None` if neither that of input nor that of output is given. One that is not given is zero.
    pub(crate) fn price(&self) -> Option<Price> {
        self.price_in.or(self.price_out)?;
        let input = self.price_in.unwrap_or_default();
        Some(Price {
            input,
            cached_input: self.price_cached_in.unwrap_or(input),
            output: self.price_out.unwrap_or_default(),
        })
    }
}

fn report_file(text: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(text);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("html" | "svg") => Ok(path),
        _ => Err("must end with .html or .svg"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        view: ViewArgs,
    }

    fn parse(options: &[&str]) -> Result<ViewArgs, clap::Error> {
        let all = std::iter::once(&"bulk").chain(options);
        Command::try_parse_from(all).map(|command| command.view)
    }

    #[test]
    fn the_price_of_cached_input_is_that_of_input_unless_it_is_given() {
        let price = |options: &[&str]| parse(options).unwrap().cost.price();
        assert_eq!(price(&[]), None);
        let plain = price(&["--price-in", "2"]).unwrap();
        assert_eq!((plain.cached_input, plain.output), (plain.input, PerMillion::default()));
        let cached = price(&["--price-in", "2", "--price-cached-in", "0.2", "--price-out", "8"]).unwrap();
        assert_eq!(cached.cached_input, "0.2".parse().unwrap());
    }

    #[test]
    fn a_bound_of_the_cost_needs_a_price() {
        assert!(parse(&["--max-cost", "5"]).is_err());
        assert!(parse(&["--max-cost", "5", "--price-out", "8"]).is_ok());
    }

    #[test]
    fn a_report_is_a_page_or_a_drawing() {
        assert!(parse(&["--report", "run.html"]).is_ok());
        assert!(parse(&["--report", "run.svg"]).is_ok());
        assert!(parse(&["--report", "run.pdf"]).is_err());
    }
}
