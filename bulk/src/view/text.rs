//! Numbers and times as people read them.

use std::time::{Duration, SystemTime};

/// Returns the number with commas between groups of three digits.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Returns a time in its two largest units: `4.2 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`.
pub(crate) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {:02} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

/// Returns the time of day in UTC: `14:03:20 UTC`; with the date if it is more than half a day from `now`.
pub(crate) fn time_of_day(time: SystemTime, now: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(time).to_string();
    let (date, time_of_day) = (&text[..10], &text[11..19]);
    let distance = time.duration_since(now).unwrap_or_default();
    if distance > Duration::from_secs(12 * 60 * 60) {
        format!("{date} {time_of_day} UTC")
    } else {
        format!("{time_of_day} UTC")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_by_three() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (12_345_678, "12,345,678")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn a_time_has_its_two_largest_units() {
        for (seconds, text) in [
            (4, "4.0 s"),
            (59, "59 s"),
            (200, "3 min 20 s"),
            (7_500, "2 h 05 min"),
            (273_600, "3 d 04 h"),
        ] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_time_far_ahead_is_shown_with_its_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(50_600);
        assert_eq!(time_of_day(now, now), "14:03:20 UTC");
        assert_eq!(
            time_of_day(now + Duration::from_secs(86_400), now),
            "1970-01-02 14:03:20 UTC"
        );
    }
}
