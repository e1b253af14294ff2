//! The names of budgets, which a process remembers. This test uses all of them, so it is alone in its process.

use tower_outbound::{Cost, Limits, Rate, RateLimiter, rate::Budget};

#[test]
fn a_process_remembers_1024_names_and_what_comes_after_them_is_an_error() {
    let limits = |name: &str| Limits::new().budget(name, Rate::per_second(5));
    let limiter = RateLimiter::new(limits("images")).unwrap();
    // What is not a valid name is not remembered when it is parsed, nor is a name that is known.
    for number in 0..5_000 {
        format!("Not a name {number}").parse::<Budget>().unwrap_err();
        assert_eq!("images".parse(), Ok(Budget::from("images")));
    }
    for number in 1..1_024 {
        let name = format!("name-{number}");
        assert_eq!(name.parse::<Budget>().unwrap().name(), name);
    }
    let error = "one-too-many".parse::<Budget>().unwrap_err();
    assert_eq!(error.field(), "budget");
    assert!(error.to_string().contains("1024"), "{error}");
    assert!(RateLimiter::new(limits("one-too-many")).is_err());
    assert!(limiter.set_limits(limits("another")).is_err());

    // The names that are known still work, and a cost of an unknown one is not charged to any of them.
    let cost = Cost::request().with("images", 2).with("one-too-many", 1_000);
    limiter.try_acquire(cost).unwrap();
    assert_eq!(limiter.available().of("images"), Some(3));
    assert_eq!(limiter.available().of("one-too-many"), None);
    RateLimiter::new(limits("name-1023")).unwrap();
}
