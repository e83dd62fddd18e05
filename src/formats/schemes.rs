//! The distinct schemes among a model's linears, as a `quantization_config` has to speak of them.

use super::LinearLayout;
use crate::error::{Error, Result};
use crate::numerics::Grid;
use crate::numerics::bits::WIDTHS;

/// What the readers' configs say of a linear: a [`Grid`] without its storage dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scheme {
    pub(super) bits: u32,
    /// `None`: one scale a row, however many columns it has.
    pub(super) group_size: Option<usize>,
    pub(super) symmetric: bool,
}

/// The schemes of the quantized `linears` and who has each, in order of first appearance.
///
/// A linear with one group could be called either grouped or per-channel, the tensors are the same. It joins a grouped
/// scheme of another linear if there is one with its group size, so that `--group-size 128` stays one scheme in a model that has
/// 128 columns somewhere.
pub(super) fn schemes(linears: &[LinearLayout]) -> Vec<(Scheme, Vec<&LinearLayout>)> {
    let exact = |grid: Grid| Scheme {
        bits: grid.bits,
        group_size: Some(grid.group_size),
        symmetric: grid.symmetric,
    };
    let quantized = || linears.iter().filter_map(|it| it.grid.map(|grid| (it, grid)));
    let grouped: Vec<Scheme> = quantized()
        .filter(|(linear, grid)| grid.group_size != linear.columns)
        .map(|(_, grid)| exact(grid))
        .collect();
    let mut found: Vec<(Scheme, Vec<&LinearLayout>)> = Vec::new();
    for (linear, grid) in quantized() {
        let mut scheme = exact(grid);
        if grid.group_size == linear.columns && !grouped.contains(&scheme) {
            scheme.group_size = None;
        }
        match found.iter_mut().find(|(known, _)| *known == scheme) {
            Some((_, members)) => members.push(linear),
            None => found.push((scheme, vec![linear])),
        }
    }
    found
}

/// The checks that all integer layouts share: a known width, whole groups, rows that fill whole words.
pub(super) fn check(linear: &str, rows: usize, columns: usize, grid: Grid) -> Result<()> {
    let Grid { bits, group_size, .. } = grid;
    if !WIDTHS.contains(&bits) {
        return Err(Error::usage(
            "--bits",
            format!("{linear} cannot have {bits}-bit codes"),
            "use 2, 3, 4 or 8",
        ));
    }
    if rows == 0 || columns == 0 {
        return Err(Error::invalid(
            format!("{linear}.weight"),
            format!("has shape [{rows}, {columns}]"),
            "leave it alone with --ignore",
        ));
    }
    if group_size == 0 || !columns.is_multiple_of(group_size) {
        return Err(Error::usage(
            "--group-size",
            format!("{linear} has {columns} columns, which are not whole groups of {group_size}"),
            format!(
                "use a divisor of {columns}, one scale a row (--group-size -1), or leave it alone with --ignore"
            ),
        ));
    }
    expect_whole_words("--bits", linear, "columns", columns, bits)
}

/// Refuses a packed side that does not fill whole words.
pub(super) fn expect_whole_words(
    flag: &str,
    linear: &str,
    side: &str,
    codes: usize,
    bits: u32,
) -> Result<()> {
    let unit = if bits == 3 { 32 } else { 32 / bits as usize };
    if codes.is_multiple_of(unit) {
        return Ok(());
    }
    Err(Error::usage(
        flag,
        format!("{linear} has {codes} {side}; {bits}-bit codes are packed {unit} at a time"),
        "leave it alone with --ignore",
    ))
}
