//! Numbers as people read them.

/// `1.4 GB`
pub(super) fn bytes(count: u64) -> String {
    let count = count as f64;
    match count {
        c if c >= 1e9 => format!("{:.2} GB", c / 1e9),
        c if c >= 1e6 => format!("{:.1} MB", c / 1e6),
        c => format!("{:.0} kB", c / 1e3),
    }
}

/// `2 min 5 s`
pub(super) fn seconds(count: f64) -> String {
    match count {
        c if c >= 3600.0 => format!("{:.0} h {:.0} min", (c / 3600.0).floor(), (c % 3600.0) / 60.0),
        c if c >= 100.0 => format!("{:.0} min {:.0} s", (c / 60.0).floor(), c % 60.0),
        c => format!("{c:.1} s"),
    }
}

/// Ascending numbers as `0-3, 7`.
pub(super) fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    let shown = runs.map(|run| match run {
        [one] => one.to_string(),
        run => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    shown.collect::<Vec<_>>().join(", ")
}
