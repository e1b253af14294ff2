//! Reads the text page of Prometheus.

use std::collections::BTreeMap;

/// One line of the page: a value of a metric with its labels.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: f64,
}

/// Returns the lines of the page. Labels in this program have no `"`, `,` or `}` in their values.
pub(crate) fn parse(page: &str) -> Vec<Sample> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Sample> {
    let (metric, value) = line.rsplit_once(' ')?;
    let (name, labels) = metric.split_once('{').unwrap_or((metric, ""));
    let labels = labels.trim_end_matches('}').split(',').filter_map(|label| {
        let (name, value) = label.split_once('=')?;
        Some((name.to_owned(), value.trim_matches('"').to_owned()))
    });
    Some(Sample {
        name: name.to_owned(),
        labels: labels.collect(),
        value: value.parse().ok()?,
    })
}

/// Returns the sum of a metric over all lines that have this label, such as `outbound_status` = `COMPLETED`.
pub(crate) fn sum(samples: &[Sample], name: &str, label: Option<(&str, &str)>) -> f64 {
    let has_label = |sample: &&Sample| {
        label.is_none_or(|(label, value)| sample.labels.get(label).is_some_and(|found| found == value))
    };
    let named = samples.iter().filter(|sample| sample.name == name);
    named.filter(has_label).map(|sample| sample.value).sum()
}
